"""What a run tells while it runs: metrics.jsonl, TensorBoard and the console, fed by one set of calls.

The engine calls a `Tracker` and knows nothing of the three. Only rank 0 writes. No call reads a tensor except
`figures`, so none of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from kdbench.files import JsonLinesLog, write_atomic
from kdbench.report.console import ConsoleReporter
from kdbench.report.tensorboard import EventFile, flatten

if TYPE_CHECKING:
    from torch import Tensor

    from kdbench.engine.evaluation.records import EvaluationRecord, PredictionSamples


TIMING_FIELDS = ("images_per_s", "seconds", "shares")
"""The fields of metrics.jsonl that two equal runs may differ in; everything else is byte-equal after a resume."""


class TermValues(TypedDict):
    """One term over a log interval. `loss` is its mean, `weighted` the mean of weight * loss, `weight` the last."""

    loss: float
    weight: float
    weighted: float


class TrainRecord(TypedDict, total=False):
    """One log interval; every mean is over the steps since the last record.

    stage, epoch: the stage and its epochs begun so far (1 in the first).
    step: optimiser steps since the run began, all stages together: the axis of every curve.
    total: the loss that was minimised. lr: of the first parameter group. grad_norm: of the last step, before clipping.
    seconds: time in training steps since the run began. shares: of the interval's time, in [0, 1], by part.
    """

    stage: str
    epoch: int
    step: int
    total: float
    lr: float
    grad_norm: float
    images_per_s: float
    seconds: float
    terms: Mapping[str, TermValues]
    shares: Mapping[str, float]


class ConsoleSink(Protocol):
    """What the tracker needs of a console; tests pass their own."""

    def start(self, info: Mapping[str, Any]) -> None: ...
    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None: ...
    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Fans every record out to the logs of a run's folder and to the console.

    Args:
        folder: the run's folder; gets `metrics.jsonl`, `tensorboard/` and `figures/`.
        main: whether this is rank 0; every call on another rank does nothing.
        tensorboard: whether event files are written.
        console: what the person sees; a `ConsoleReporter` on stdout when None.
    """

    def __init__(
        self, folder: Path | str, *, is_main: bool = True, tensorboard: bool = True, console: ConsoleSink | None = None
    ) -> None:
        self.folder = Path(folder)
        self.is_main = is_main
        self.metrics_log = JsonLinesLog(self.folder / "metrics.jsonl")
        self.event_file = EventFile(self.folder / "tensorboard") if tensorboard else None
        self.console: ConsoleSink = (console or ConsoleReporter()) if is_main else _SilentConsole()
        self.classes: Sequence[str] | None = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Says what begins.

        Args:
            info: `name` (of the recipe), `folder`, `device` (in words) for the console; `classes` (names of the
                classes) for the pictures; `recipe` (the resolved recipe as YAML text) for TensorBoard's Text tab.
                Each may be absent; `resumed` (a sentence) says where an interrupted run goes on.
        """
        self.classes = info.get("classes")
        self.console.start(info)
        if self.is_main and self.event_file and info.get("recipe") and not self.event_file.file.offset:
            indented = "\n".join(f"    {line}" for line in str(info["recipe"]).splitlines())
            self.event_file.text(0, "recipe", indented)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Writes the row of the HParams tab, once per run; nested mappings get dotted names."""
        if self.is_main and self.event_file and not self._has_hparams:
            self.event_file.hparams(flatten(values))
            self._has_hparams = True

    _has_hparams = False

    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None:
        """Begins a stage of `steps` steps in all, `done` of them before this process started."""
        self.console.stage(name, epochs, steps, steps_done)

    def progress(self, steps_done: int, phase: str = "") -> None:
        """Moves the bar; called after every step.

        Args:
            done: finished steps of this stage.
            phase: what is going on when it is not training, such as "evaluating".
        """
        self.console.progress(steps_done, phase)

    def train(self, record: TrainRecord) -> None:
        """Logs one interval of training."""
        if not self.is_main:
            return
        self.metrics_log.write({"event": "train", **record})
        if self.event_file:
            self.event_file.scalars(record.get("step", 0), _train_scalars(record))
        self.console.train(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Logs the metrics of one role on one split."""
        if not self.is_main:
            return
        self.metrics_log.write({"event": "evaluation", **record})
        values = _evaluation_scalars(record)
        if self.event_file and values:
            self.event_file.scalars(record.get("step", 0), values)
        self.console.evaluation(record)

    def notice(self, text: str) -> None:
        """Tells the person something, above the bar; it is in no log."""
        self.console.notice(text)

    def figures(
        self, step: int, *, confusion: Tensor | None = None, samples: PredictionSamples | None = None, split: str = "test"
    ) -> None:
        """Draws pictures into TensorBoard and `figures/`; reads the tensors.

        Args:
            confusion: (classes, classes) counts, row = label, column = prediction.
            samples: some inputs with labels and logits.
            split: what they come from.
        """
        if not self.is_main:
            return
        from kdbench.report import figures

        pictures = {}
        if confusion is not None:
            pictures["confusion"] = figures.draw_confusion(confusion, self.classes, title=f"student on {split}")
        if samples is not None:
            pictures["predictions"] = figures.draw_predictions(samples, self.classes)
        for name, picture in pictures.items():
            (self.folder / "figures").mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "figures" / f"{name}_{split}.png", picture.png)
            if self.event_file:
                self.event_file.image(step, f"{name}/{split}", picture.png, picture.width, picture.height)

    def state_dict(self) -> dict[str, int]:
        """Returns the byte offset of each log, for the checkpoint; everything before it is on the disk by then."""
        state = {"metrics.jsonl": self.metrics_log.file.sync()}
        if self.event_file:
            state["tensorboard"] = self.event_file.file.sync()
            state["hparams"] = int(self._has_hparams)
        return state

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the logs go on at these offsets; before the first record. Later lines are cut off and come again."""
        if not self.is_main:
            return
        whole = self.metrics_log.file.resume(state.get("metrics.jsonl", 0))
        if self.event_file:
            whole &= self.event_file.file.resume(state.get("tensorboard", 0))
            self._has_hparams = bool(state.get("hparams", 0))
        if not whole:
            self.notice(f"Part of the logs in {self.folder} is missing: lines before this point were lost or removed.")

    def close(self) -> None:
        """Takes the bar off the terminal and closes the files. Safe to call twice, and after an error."""
        self.console.close()
        self.metrics_log.file.close()
        if self.event_file:
            self.event_file.file.close()


class _SilentConsole:
    """The console of every rank but the first."""

    def start(self, info: Mapping[str, Any]) -> None: ...
    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None: ...
    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


def _train_scalars(record: TrainRecord) -> dict[str, float]:
    values = {}
    if "total" in record:
        values["loss/total"] = record["total"]
    for name, term in record.get("terms", {}).items():
        values[f"term/{name}"] = term["loss"]
        values[f"weighted/{name}"] = term["weighted"]
        values[f"weight/{name}"] = term["weight"]
    for key, tag in (
        ("lr", "optimizer/lr"),
        ("grad_norm", "optimizer/grad_norm"),
        ("images_per_s", "speed/images_per_s"),
    ):
        if record.get(key) is not None:
            values[tag] = record[key]
    for part, share in record.get("shares", {}).items():
        values[f"time_share/{part}"] = share
    values["progress/epoch"] = record.get("epoch", 0)
    return values


def _evaluation_scalars(record: EvaluationRecord) -> dict[str, float]:
    """Tags such as `eval/test/top1`, `eval_teacher/test/top1` and, in a group of its own, `per_class/test/3`."""
    role, split = record.get("role", "student"), record.get("split", "test")
    suffix = "" if role == "student" else f"_{role}"
    values = {}
    for name, value in record.get("metrics", {}).items():
        group, _, rest = name.rpartition("/")
        values[f"{group or 'eval'}{suffix}/{split}/{rest}"] = value
    return values
