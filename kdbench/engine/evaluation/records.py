"""Records that an evaluation produces, and the log that receives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypedDict

from torch import Tensor


class EvaluationRecord(TypedDict, total=False):
    """Metrics of one role on one split.

    stage, split, role: names. epoch: finished epochs of the stage. step: optimizer steps since the run began, over all
    stages. metrics: the return value of `MetricSet.compute`. seconds: training time since the run began.
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

    image: (n, channels, height, width), uint8 or float. label: (n,). student, teacher: logits (n, classes).
    """

    image: Tensor
    label: Tensor
    student: Tensor
    teacher: Tensor | None


class EvaluationLog(Protocol):
    """Receives the results of an `Evaluator`. `kdbench.report.tracking.Tracker` implements it."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Logs the metrics of one role on one split."""
        ...

    def figures(
        self, step: int, *, confusion: Tensor | None = None, samples: PredictionSamples | None = None, split: str = ""
    ) -> None:
        """Draws the confusion matrix (classes, classes) and the predictions of a few samples."""
        ...
