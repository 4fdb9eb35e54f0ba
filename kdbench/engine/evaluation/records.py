"""Types of the records that an evaluation produces, and the interface of the log that receives the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypedDict

from torch import Tensor


class EvaluationRecord(TypedDict, total=False):
    """Metrics of one role (network) on one split.

    Attributes:
        stage, split, role: names.
        epoch: number of finished epochs of the stage.
        step: number of optimizer steps since the run began, over all stages.
        metrics: the return value of `MetricSet.compute`.
        seconds: training time in seconds since the run began.
    """

    stage: str
    epoch: int
    step: int
    split: str
    role: str
    metrics: Mapping[str, float]
    seconds: float


class PredictionSamples(TypedDict, total=False):
    """A few samples of a split with the predictions of student and teacher, for a figure.

    Attributes:
        image: (n, channels, height, width), uint8 or float.
        label: (n,).
        student, teacher: logits (n, classes).
    """

    image: Tensor
    label: Tensor
    student: Tensor
    teacher: Tensor | None


class EvaluationLog(Protocol):
    """Interface of the log that receives an `Evaluator`'s results; `kdbench.report.tracking.Tracker` implements it."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Logs the metrics of one role on one split."""
        ...

    def figures(
        self, step: int, *, confusion: Tensor | None = None, samples: PredictionSamples | None = None, split: str = ""
    ) -> None:
        """Draws figures of a split: the confusion matrix (classes, classes), and the predictions for a few samples."""
        ...
