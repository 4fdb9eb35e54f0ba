"""Console output of a run: a progress bar on a terminal, plain aligned lines in a file or a pipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from kdbench.errors import escape_control_characters

REDRAW_SECONDS = 0.2
"""Minimum time between two redraws of the progress bar. Within this time, `progress` only reads the clock."""


QUIET_SECONDS = 30.0
"""Minimum time without output before a log interval prints a line, if the output is a pipe or a file."""


METRIC_ABBREVIATIONS = {
    "top1": "top-1",
    "agreement": "agree",
    "nll": "nll",
    "ece": "ece",
    "top5": "top-5",
    "teacher_kl": "kl",
}
"""Metric -> label on the console, in order of importance."""


PERCENT_METRICS = ("top1", "top5", "ece", "agreement")


class ConsoleReporter:
    """Prints the progress of a run.

    Args:
        console: rich console to print on; None: standard output.
        prefix: first word of every line, such as "teacher" for a teacher run.
        quiet: whether only notices are printed.
        bar: whether a terminal shows a progress bar. False: prints lines, as in a pipe or a file; used if several
            runs share a terminal.
    """

    def __init__(
        self, console: Console | None = None, *, prefix: str = "", quiet: bool = False, bar: bool = True
    ) -> None:
        self.console = console or StdoutConsole(highlight=False)
        self.live = bar and self.console.is_terminal and not self.console.is_dumb_terminal and not quiet
        self.prefix = f"{prefix.rstrip(': ')} │ " if prefix else ""
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._epochs, self._steps = "", None, 1
        self._start_time, self._first_step = 0.0, 0
        self._last_redraw = self._last_print = float("-inf")
        self._steps_done = 0
        self._latest: dict[str, str] = {"loss": "", "accuracy": "", "rate": ""}
        self._mute = False
        self._pending: list[Mapping[str, Any]] = []

    def start(self, info: Mapping[str, Any]) -> None:
        """Prints the header of a run: recipe, device, folder, and the position of a resumed run."""
        if self.quiet:
            return
        head = " · ".join(str(info[key]) for key in ("name", "device") if info.get(key))
        if head:
            self._print(head, style="bold")
        if info.get("folder"):
            self._print(f"folder {info['folder']}", style="dim")
        if info.get("resumed"):
            self._print(str(info["resumed"]), style="yellow")

    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None:
        """Starts a new progress bar for a stage of training."""
        self._stop()
        self._stage, self._epochs, self._steps = name, epochs, max(steps, 1)
        self._start_time, self._first_step, self._steps_done = time.monotonic(), steps_done, steps_done
        self._last_print = self._start_time
        self._latest = {"loss": "", "accuracy": "", "rate": ""}
        if self.live and steps:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn("{task.percentage:>3.0f}%"),
                _LatestColumn("loss"),
                _LatestColumn("accuracy"),
                _LatestColumn("rate"),
                _LatestColumn("left", style="cyan"),
                console=self.console,
                auto_refresh=False,
                expand=True,
                transient=True,
            )
            fields: dict[str, Any] = {"left": "", **self._latest}
            self._task = self._bar.add_task(self._position_text(), total=steps, completed=steps_done, **fields)
            self._bar.start()

    def progress(self, steps_done: int, phase: str = "") -> None:
        """Updates the bar, at most once per `REDRAW_SECONDS` and at the end of the stage."""
        if self._pending and not phase:
            self._flush()
        self._steps_done = steps_done
        if self._bar is None or self._task is None:
            return
        now = time.monotonic()
        if now - self._last_redraw < REDRAW_SECONDS and steps_done < self._steps and not phase:
            return
        if now - self._last_redraw < 0.1:
            return
        self._last_redraw = now
        fields: dict[str, Any] = {**self._latest, "left": phase or self._remaining_text(now)}
        self._bar.update(self._task, completed=steps_done, description=self._position_text(), refresh=True, **fields)

    def train(self, record: Mapping[str, Any]) -> None:
        """Stores the values of a log interval. Prints them to a pipe or file after `QUIET_SECONDS` without output."""
        self._flush()
        if record.get("total") is not None:
            self._latest["loss"] = f"loss {_loss_text(record['total'])}"
        if record.get("images_per_s") is not None:
            self._latest["rate"] = f"{_group_thousands(record['images_per_s'])} img/s"
        if not self.live and time.monotonic() - self._last_print >= QUIET_SECONDS:
            self._print_line([self._latest["loss"], self._latest["rate"], self._remaining_text(time.monotonic())])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Stores the metrics of one role on one split. All metrics of an epoch are printed in one line."""
        role, split, metrics = record.get("role", "student"), record.get("split", ""), record.get("metrics", {})
        names = [name for name in METRIC_ABBREVIATIONS if name in metrics]
        if not names:  # metrics per class are for TensorBoard only
            return
        if self._pending and self._pending[0].get("epoch") != record.get("epoch"):
            self._flush()
        self._pending.append(record)
        if role != "teacher" and "top1" in metrics:
            self._latest["accuracy"] = f"{split} {metrics['top1']:.2f}%"

    def notice(self, text: str) -> None:
        """Prints a sentence above the progress bar, even if `quiet` is True."""
        self._flush()
        self._print(escape_control_characters(text), style="yellow")

    def close(self) -> None:
        """Removes the progress bar. May be called twice."""
        self._stop()

    def _flush(self) -> None:
        """Prints one line for an epoch.

        The line contains the first metric of every role (network) and split, then further metrics of the student.
        """
        records, self._pending = self._pending, []
        if not records:
            return
        parts, more = [], []
        for record in records:
            role, metrics = record.get("role", "student"), record["metrics"]
            source = record.get("split", "") if role == "student" else f"{role} {record.get('split', '')}"
            names = [name for name in METRIC_ABBREVIATIONS if name in metrics]
            label = "" if names[0] == "top1" else f"{METRIC_ABBREVIATIONS[names[0]]} "
            parts.append(f"{source} {label}{_metric_text(names[0], metrics[names[0]])}")
            if role != "teacher" and (record.get("split") != "train" or not more):
                more = [f"{METRIC_ABBREVIATIONS[name]} {_metric_text(name, metrics[name])}" for name in names[1:]]
        loss = [f"{self._latest['loss']:<11}"]  # a fixed column, left out on a narrow terminal
        if not self._latest["loss"] and self.live:
            loss = []
        self._print_line([*loss, *parts, *more], epoch=records[0].get("epoch"))

    def _stop(self) -> None:
        self._flush()
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _position_text(self, epoch: int | None = None) -> str:
        """Returns the position as text: `PREFIX STAGE  epoch 12/240`, or the step in a stage without epochs."""
        if not self._stage:
            return f"{self.prefix}before training"
        if self._epochs:
            width = len(str(self._epochs))
            current = min(self._steps_done * self._epochs // self._steps + 1, self._epochs) if epoch is None else epoch
            position = f"epoch {current:>{width}}/{self._epochs}"
        else:
            position = f"step {self._steps_done:>{len(str(self._steps))}}/{self._steps}"
        return f"{self.prefix}{self._stage}  {position}"

    def _remaining_text(self, now: float) -> str:
        num_steps = self._steps_done - self._first_step
        if num_steps <= 0 or self._steps_done >= self._steps:
            return ""
        return f"{duration_text((now - self._start_time) / num_steps * (self._steps - self._steps_done))} left"

    def _print_line(self, parts: list[str], epoch: int | None = None) -> None:
        if self.quiet:
            return
        self._last_print = time.monotonic()
        parts = [self._position_text(epoch).removeprefix(self.prefix), *filter(None, parts)]
        if self.live:  # a terminal shows one line at most; metrics.jsonl has all metrics
            while len(parts) > 2 and len(self.prefix) + len("  ".join(parts)) > self.console.width:
                parts.pop()
        self._print("  ".join(parts).rstrip())

    def _print(self, text: str, style: str = "") -> None:
        """Prints one line.

        After an error of the output (such as a full disk), nothing more is printed, and the run continues.
        """
        if self._mute:
            return
        try:
            self.console.print(Text(self.prefix + text, style=style), soft_wrap=True)
            self.console.file.flush()
        except OSError:
            self._mute = True


class StdoutConsole(Console):
    """Console on standard output. If the reader closes the pipe (`| head`), the run continues without output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError):  # later output of the process is dropped as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class _LatestColumn(ProgressColumn):
    """Column of a progress bar that shows a field as plain text.

    (rich's TextColumn would interpret brackets as markup.)
    """

    def __init__(self, field: str, style: str = "") -> None:
        super().__init__()
        self.field, self.style = field, style

    def render(self, task: Task) -> Text:
        return Text(task.fields.get(self.field, ""), style=self.style, no_wrap=True)


def duration_text(seconds: float) -> str:
    """Formats a duration: 42s, 3m 07s or 5h 02m."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m {rounded % 60:02d}s"
    return f"{rounded // 3600}h {rounded % 3600 // 60:02d}m"


def with_unit_prefix(number: float) -> str:
    """Formats a large number with a unit prefix: 12.3 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _loss_text(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3e}"


def _group_thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _metric_text(name: str, value: float) -> str:
    return f"{value:6.2f}%" if name in PERCENT_METRICS else f"{value:.4f}"
