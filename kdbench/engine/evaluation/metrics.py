"""Classification metrics, computed from sums that accumulate on the device and are read once.

`update` never waits for the device: shapes are static, excluded rows are masked, and boolean tensors are not used as
indices. The state of a metric consists of tensors of sums, so the states of several ranks are combined by addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.config.schema import PartConfig
from kdbench.errors import ConfigError
from kdbench.registry import METRICS

IGNORE_INDEX = -100
"""Label of a sample whose label is hidden. Metrics that read labels exclude rows with this value."""


class Metric:
    """Base class of all metrics.

    A subclass creates its state in `__init__` with `add_count_state` and `add_sum_state`, and adds batches to the
    state in `update`. A metric that compares student and teacher sets `needs_teacher` in the class and in its
    registration.

    Args:
        num_classes: number of logits.
        device: device of the state.
    """

    registered_name = ""
    needs_teacher = False

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.device = torch.device(device)
        self.state: dict[str, Tensor] = {}

    def add_count_state(self, name: str, *shape: int) -> None:
        """Creates a state tensor of int64 zeros."""
        self.state[name] = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def add_sum_state(self, name: str, *shape: int) -> None:
        """Creates a state tensor of floating-point zeros: float64, or float32 on MPS, which does not have float64."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.state[name] = torch.zeros(shape, dtype=dtype, device=self.device)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Adds one batch to the state.

        Args:
            logits: (batch, classes).
            label: (batch,) int64; `IGNORE_INDEX` for a hidden label.
            teacher_logits: (batch, classes), for metrics with `needs_teacher`.
            valid: (batch,) bool; False for padding rows.
        """
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Computes the values of the metric from its state. Waits for the device.

        Returns:
            Name -> value. A mean over zero rows is NaN.
        """
        raise NotImplementedError

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sums the state over all ranks by calling `all_reduce`, which sums a tensor over all ranks in place, for
        each of its tensors."""
        for tensor in self.state.values():
            all_reduce(tensor)

    def reset(self) -> None:
        """Sets the state to zero."""
        for tensor in self.state.values():
            tensor.zero_()

    def state_on_host(self) -> dict[str, Tensor]:
        """Returns a copy of the state on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.state.items()}


def _mask_labels(label: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns a mask of the included rows, and the labels, in which excluded rows have the valid class index 0."""
    included = label != IGNORE_INDEX
    if valid is not None:
        included = included & valid
    return included, torch.where(included, label, 0)


def _at_least_float32(logits: Tensor) -> Tensor:
    """Converts logits in half precision, which underflows in the tail of a softmax, to float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _percent(part: Tensor, total: Tensor) -> float:
    """Returns 100 * part / total; NaN if the total is 0."""
    return 100.0 * float(part) / float(total) if float(total) else float("nan")


class _TopK(Metric):
    k = 1

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("correct")
        self.add_count_state("count")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        included, target = _mask_labels(label, valid)
        if self.k == 1:
            hit = logits.argmax(1) == target
        else:
            hit = (logits.topk(min(self.k, logits.shape[1]), dim=1).indices == target[:, None]).any(1)
        self.state["correct"] += (hit & included).sum()
        self.state["count"] += included.sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        return {self.registered_name: _percent(state["correct"], state["count"])}


@METRICS.register("top1", injected=("num_classes", "device"), higher=True, unit="%")
class Top1(_TopK):
    """Top-1 accuracy: percentage of samples whose label has the largest logit."""


@METRICS.register("top5", injected=("num_classes", "device"), higher=True, unit="%")
class Top5(_TopK):
    """Top-5 accuracy: percentage of samples whose label has one of the five largest logits; 100 below six classes."""

    k = 5


@METRICS.register("nll", injected=("num_classes", "device"), higher=False, unit="nats")
class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the label in nats: cross-entropy without label smoothing."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_sum_state("nats")
        self.add_count_state("count")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        included, target = _mask_labels(label, valid)
        nats = -F.log_softmax(_at_least_float32(logits), dim=1).gather(1, target[:, None])[:, 0]
        self.state["nats"] += torch.where(included, nats, 0).to(self.state["nats"].dtype).sum()
        self.state["count"] += included.sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        return {"nll": _percent(state["nats"], state["count"]) / 100}


@METRICS.register("ece", injected=("num_classes", "device"), higher=False, unit="%")
class ExpectedCalibrationError(Metric):
    r"""Expected calibration error in percent (Guo et al. 2017, arXiv:1706.04599).

    .. math:: \mathrm{ECE} = \sum_m \frac{|B_m|}{n} \, |\mathrm{accuracy}(B_m) - \mathrm{confidence}(B_m)|

    The confidence of a sample is its largest predicted probability. Bin B_m contains the samples with confidence in
    ((m - 1) / bins, m / bins].

    Args:
        bins: number of bins of equal width.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", bins: int = 15) -> None:
        super().__init__(num_classes, device)
        if bins < 1:
            raise ConfigError(f"metric 'ece': bins must be 1 or more, got {bins}")
        self.bins = bins
        self.inner_edges = torch.arange(1, bins, dtype=torch.float32, device=self.device) / bins
        self.add_sum_state("confidence", bins)
        self.add_count_state("correct", bins)
        self.add_count_state("count", bins)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        included, target = _mask_labels(label, valid)
        confidence, predicted = F.softmax(_at_least_float32(logits), dim=1).max(1)
        bin_index = torch.bucketize(confidence, self.inner_edges.to(confidence.dtype))
        # A one-hot sum: scatter-add on CUDA adds in no fixed order.
        in_bin = (bin_index[:, None] == torch.arange(self.bins, device=bin_index.device)) & included[:, None]
        sum_dtype = self.state["confidence"].dtype
        self.state["confidence"] += torch.where(in_bin, confidence[:, None], 0).to(sum_dtype).sum(0)
        self.state["correct"] += (in_bin & (predicted == target)[:, None]).sum(0)
        self.state["count"] += in_bin.sum(0)

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        gap = (state["correct"].double() - state["confidence"].double()).abs().sum()
        return {"ece": _percent(gap, state["count"].sum())}


@METRICS.register("agreement", injected=("num_classes", "device"), needs_teacher=True, higher=True, unit="%")
class Agreement(Metric):
    """Agreement of student and teacher: `agreement` in percent, `teacher_kl` in nats.

    `agreement` is the percentage of samples for which student and teacher predict the same class (fidelity in Stanton
    et al. 2021, arXiv:2106.05945). `teacher_kl` is the mean of KL(teacher || student) at temperature 1. The metric
    does not read labels, so samples with a hidden label are included.
    """

    needs_teacher = True

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("agreeing")
        self.add_count_state("count")
        self.add_sum_state("nats")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        if teacher_logits is None:
            raise ValueError("the metric 'agreement' needs teacher_logits, got None")
        included = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
        agrees = logits.argmax(1) == teacher_logits.argmax(1)
        student = F.log_softmax(_at_least_float32(logits), dim=1)
        teacher = F.log_softmax(_at_least_float32(teacher_logits), dim=1)
        nats = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        self.state["agreeing"] += (agrees & included).sum()
        self.state["count"] += included.sum()
        self.state["nats"] += torch.where(included, nats, 0).to(self.state["nats"].dtype).sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        agreement = _percent(state["agreeing"], state["count"])
        return {"agreement": agreement, "teacher_kl": _percent(state["nats"], state["count"]) / 100}


@METRICS.register("per_class", injected=("num_classes", "device"), higher=True, unit="%")
class PerClass(Metric):
    """Top-1 accuracy of each class in percent, `per_class/0`, `per_class/1`, ...; NaN for a class without samples."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("correct", num_classes)
        self.add_count_state("count", num_classes)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        included, target = _mask_labels(label, valid)
        self.state["correct"].index_add_(0, target, ((logits.argmax(1) == target) & included).long())
        self.state["count"].index_add_(0, target, included.long())

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        pairs = zip(state["correct"], state["count"], strict=True)
        return {f"per_class/{index}": _percent(correct, count) for index, (correct, count) in enumerate(pairs)}


@METRICS.register("confusion", injected=("num_classes", "device"))
class Confusion(Metric):
    """Confusion matrix: row = label, column = predicted class, entry = number of samples.

    TensorBoard shows the matrix as a figure. The file `metrics.jsonl` does not contain the matrix, because `compute`
    returns an empty mapping.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("matrix", num_classes, num_classes)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        included, target = _mask_labels(label, valid)
        cell = target * self.num_classes + logits.argmax(1)
        self.state["matrix"].view(-1).index_add_(0, cell, included.long())

    def compute(self) -> dict[str, float]:
        return {}


class MetricSet:
    """Several metrics, which are computed for one model on one split.

    Args:
        metrics: names of registered metrics, or a `PartConfig` (name and parameters) for each.
        num_classes: number of logits.
        device: device of the metrics' states.

    Raises:
        ConfigError: a name or parameter is unknown, or a metric is listed twice.
    """

    def __init__(
        self, metrics: Iterable[str | PartConfig], num_classes: int, device: torch.device | str = "cpu"
    ) -> None:
        self.metrics: dict[str, Metric] = {}
        self._updated: set[str] = set()
        for metric in metrics:
            config = PartConfig(type=metric) if isinstance(metric, str) else metric
            if config.type in self.metrics:
                raise ConfigError(f"{config.location}: metric {config.type!r} is listed twice".lstrip(": "))
            self.metrics[config.type] = METRICS.build(
                config.type, config.params, config.location, num_classes=num_classes, device=device
            )

    @property
    def needs_teacher(self) -> bool:
        """True if any metric reads the teacher's logits."""
        return any(metric.needs_teacher for metric in self.metrics.values())

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Adds one batch to every metric. The docstring of `Metric.update` describes the arguments.

        If `teacher_logits` is None, metrics that need a teacher are skipped.
        """
        with torch.no_grad():
            for name, metric in self.metrics.items():
                if metric.needs_teacher and teacher_logits is None:
                    continue
                metric.update(logits, label, teacher_logits, valid)
                self._updated.add(name)

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sums the states of all metrics over all ranks.

        This is a collective: every rank must have the same metrics in the same order.

        Args:
            all_reduce: function that sums one tensor over all ranks, in place.
        """
        for metric in self.metrics.values():
            metric.reduce(all_reduce)

    def compute(self) -> dict[str, float]:
        """Waits for the device, and returns name -> value for all metrics, in their order."""
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            if name in self._updated or not metric.needs_teacher:
                values.update(metric.compute())
        return values

    def confusion(self) -> Tensor | None:
        """Returns the confusion matrix on the CPU; None if the set does not contain the metric `confusion`."""
        metric = self.metrics.get("confusion")
        return metric.state_on_host()["matrix"] if metric else None

    def reset(self) -> None:
        """Sets the states of all metrics to zero."""
        self._updated.clear()
        for metric in self.metrics.values():
            metric.reset()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns metric -> name -> state tensor, for every metric that was updated since the last reset."""
        updated = {name: metric for name, metric in self.metrics.items() if name in self._updated}
        return {name: dict(metric.state) for name, metric in updated.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Loads state tensors that `state_dict` of a `MetricSet` with the same metrics returned."""
        for name, tensors in state.items():
            for key, tensor in tensors.items():
                self.metrics[name].state[key].copy_(tensor)
            self._updated.add(name)


def higher_is_better(name: str) -> bool:
    """Returns True if larger values of a metric are better, or if the metric's registration does not declare `higher`.

    Args:
        name: a key of the return value of `MetricSet.compute`.
    """
    if name == "teacher_kl":
        return False
    entry = METRICS.entries.get(name.partition("/")[0])
    return bool(entry.facts.get("higher", True)) if entry else True
