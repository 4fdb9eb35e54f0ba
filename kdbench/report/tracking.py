"""The tracker of a run, which writes metrics.jsonl and TensorBoard events and shows the progress on the console.

Only rank 0 writes. No method except `figures` reads a tensor, so the others do not wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from kdbench.files import JsonLinesLog, translate_disk_errors, write_atomic
from kdbench.report.console import ConsoleReporter
from kdbench.report.tensorboard import EventFile, flatten

if TYPE_CHECKING:
    from torch import Tensor

    from kdbench.engine.evaluation.records import EvaluationRecord, PredictionSamples


TIMING_FIELDS = ("images_per_s", "seconds", "time_fractions")
"""Fields of metrics.jsonl in which two equal runs may differ. All other fields are byte-equal, also after a resume."""


class TermValues(TypedDict):
    """Values of one term over a log interval: mean `loss`, mean `weighted` loss, and `weight` at the last step."""

    loss: float
    weight: float
    weighted: float


class TrainRecord(TypedDict, total=False):
    """The values of one log interval. Means are taken over the steps since the last record.

    Attributes:
        stage: name of the stage.
        epoch: current epoch of the stage, from 1.
        step: number of optimizer steps since the run began, over all stages; the x axis of every curve.
        total: mean of the total loss.
        lr: learning rate of the first parameter group.
        grad_norm: gradient norm of the last step, before clipping.
        seconds: time in training steps since the run began.
        time_fractions: section of a step -> its fraction of the interval's time, in [0, 1].
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
    time_fractions: Mapping[str, float]


class ConsoleSink(Protocol):
    """Protocol of a console on which the tracker shows progress."""

    def start(self, info: Mapping[str, Any]) -> None: ...
    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None: ...
    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Writes every record to the logs in the run folder and shows it on the console.

    Args:
        folder: the run folder, in which `metrics.jsonl`, `tensorboard/` and `figures/` are written.
        is_main: whether this process is rank 0. On any other rank, every call has no effect.
        tensorboard: whether event files are written.
        console: console that shows the progress; None: a `ConsoleReporter` on standard output.
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
        self._has_hparams = False

    def start(self, info: Mapping[str, Any]) -> None:
        """Shows the header of a run.

        Args:
            info: `name` of the recipe, `folder` and `device` for the console; `classes` (names) for the figures;
                `recipe` (the resolved recipe as YAML) for TensorBoard's Text tab; `resumed` (a sentence with the
                position at which an interrupted run continues). Each may be absent.
        """
        self.classes = info.get("classes")
        self.console.start(info)
        if self.is_main and self.event_file and info.get("recipe") and not self.event_file.file.offset:
            code_block = "\n".join(f"    {line}" for line in str(info["recipe"]).splitlines())
            self.event_file.text(0, "recipe", code_block)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Writes the run's row of the HParams tab, once per run. Keys of nested mappings are joined by dots."""
        if self.is_main and self.event_file and not self._has_hparams:
            self.event_file.hparams(flatten(values))
            self._has_hparams = True

    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None:
        """Shows on the console that a stage of training begins.

        Args:
            epochs: number of epochs of the stage; None if the recipe states steps.
            steps: number of steps of the whole stage.
            steps_done: number of steps that earlier sessions have done.
        """
        self.console.stage(name, epochs, steps, steps_done)

    def progress(self, steps_done: int, phase: str = "") -> None:
        """Updates the progress bar. The training loop calls it after every step.

        Args:
            steps_done: number of finished steps of the stage.
            phase: current activity other than training, such as "evaluating".
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
        """Shows a sentence above the progress bar. It is not written into any log."""
        self.console.notice(text)

    def figures(
        self,
        step: int,
        *,
        confusion: Tensor | None = None,
        samples: PredictionSamples | None = None,
        split: str = "test",
    ) -> None:
        """Draws figures into TensorBoard and `figures/`. Reads the tensors.

        Args:
            confusion: (classes, classes) counts, row = label, column = prediction.
            samples: a few inputs with labels and logits (see `draw_predictions`).
            split: name of the split that contains the samples.
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
            path = self.folder / "figures" / f"{name}_{split}.png"
            with translate_disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, picture.png)
            if self.event_file:
                self.event_file.image(step, f"{name}/{split}", picture.png, picture.width, picture.height)

    def state_dict(self) -> dict[str, int]:
        """Flushes the logs to the disk and returns log -> byte offset, for the checkpoint."""
        state = {"metrics.jsonl": self.metrics_log.file.sync()}
        if self.event_file:
            state["tensorboard"] = self.event_file.file.sync()
            state["hparams"] = int(self._has_hparams)
        return state

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Truncates each log to its byte offset in `state`. Must be called before the first record is written."""
        if not self.is_main:
            return
        is_complete = self.metrics_log.file.resume(state.get("metrics.jsonl", 0))
        if self.event_file:
            is_complete &= self.event_file.file.resume(state.get("tensorboard", 0))
            self._has_hparams = bool(state.get("hparams", 0))
        if not is_complete:
            self.notice(f"Part of the logs in {self.folder} is missing: lines before this point were lost or removed.")

    def close(self) -> None:
        """Removes the progress bar and closes the files. May be called twice, and after an error."""
        self.console.close()
        self.metrics_log.file.close()
        if self.event_file:
            self.event_file.file.close()


class _SilentConsole:
    """Console without output, for every rank except rank 0."""

    def start(self, info: Mapping[str, Any]) -> None: ...
    def stage(self, name: str, epochs: int | None, steps: int, steps_done: int = 0) -> None: ...
    def progress(self, steps_done: int, phase: str = "") -> None: ...
    def train(self, record: Mapping[str, Any]) -> None: ...
    def evaluation(self, record: Mapping[str, Any]) -> None: ...
    def notice(self, text: str) -> None: ...
    def close(self) -> None: ...


def _train_scalars(record: TrainRecord) -> dict[str, float]:
    """Returns tag -> value, with tags such as `loss/total`, `term/kd`, `optimizer/lr` and `time_fraction/backward`."""
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
    for section, fraction in record.get("time_fractions", {}).items():
        values[f"time_fraction/{section}"] = fraction
    values["progress/epoch"] = record.get("epoch", 0)
    return values


def _evaluation_scalars(record: EvaluationRecord) -> dict[str, float]:
    """Returns tag -> value, with tags such as `eval/test/top1`, `eval_teacher/test/top1` and `per_class/test/3`."""
    role, split = record.get("role", "student"), record.get("split", "test")
    suffix = "" if role == "student" else f"_{role}"
    values = {}
    for name, value in record.get("metrics", {}).items():
        group, _, metric = name.rpartition("/")
        values[f"{group or 'eval'}{suffix}/{split}/{metric}"] = value
    return values
