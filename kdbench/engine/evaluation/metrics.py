"""Metrics of classification: sums that grow on the device and are read once.

`update` never waits for the host: shapes are static, rows that do not count are masked, nothing is indexed by a
boolean. Every state is a tensor of sums, so that several ranks are joined by adding their states.
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
"""The label of a sample whose label is hidden; such rows count in no metric that reads labels."""


class Metric:
    """Base of all metrics.

    A subclass makes its sums with `counts` and `sums` and adds to them in `update`; `needs_teacher=True` stands in
    the registration of one that compares with a teacher.
    """

    registered_name = ""
    needs_teacher = False

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.device = torch.device(device)
        self.state: dict[str, Tensor] = {}

    def add_count_state(self, name: str, *shape: int) -> None:
        """Adds a tensor of whole numbers to the state."""
        self.state[name] = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def add_sum_state(self, name: str, *shape: int) -> None:
        """Adds a tensor of real sums to the state: double precision, where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.state[name] = torch.zeros(shape, dtype=dtype, device=self.device)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Adds one batch.

        Args:
            logits: (batch, classes).
            label: (batch,) int64; -100 where it is hidden.
            teacher_logits: (batch, classes), for a metric that needs them.
            valid: (batch,) bool; False for rows that only pad the batch.
        """
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Reads the sums; waits for the device. A share of nothing is NaN."""
        raise NotImplementedError

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Adds the sums of all ranks; `all_reduce` adds one tensor in place over the ranks."""
        for tensor in self.state.values():
            all_reduce(tensor)

    def reset(self) -> None:
        """Starts again from nothing."""
        for tensor in self.state.values():
            tensor.zero_()

    def state_on_host(self) -> dict[str, Tensor]:
        """Returns the sums on the host."""
        return {name: tensor.detach().cpu() for name, tensor in self.state.items()}


def _labelled(label: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the rows that count, and labels that are safe to index with: 0 where the row does not count."""
    keep = label != IGNORE_INDEX
    if valid is not None:
        keep = keep & valid
    return keep, torch.where(keep, label, 0)


def _wide(logits: Tensor) -> Tensor:
    """Half precision loses the tail of a softmax; float64 stays what it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _share(part: Tensor, whole: Tensor) -> float:
    """100 * part / whole; NaN when nothing was counted."""
    return 100.0 * float(part) / float(whole) if float(whole) else float("nan")


class _TopK(Metric):
    k = 1

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("right")
        self.add_count_state("seen")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        keep, safe = _labelled(label, valid)
        if self.k == 1:
            hit = logits.argmax(1) == safe
        else:
            hit = (logits.topk(min(self.k, logits.shape[1]), dim=1).indices == safe[:, None]).any(1)
        self.state["right"] += (hit & keep).sum()
        self.state["seen"] += keep.sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        return {self.registered_name: _share(state["right"], state["seen"])}


@METRICS.register("top1", injected=("num_classes", "device"), higher=True, unit="%")
class Top1(_TopK):
    """Top-1 accuracy: the share of samples whose largest logit is that of the label, in percent."""


@METRICS.register("top5", injected=("num_classes", "device"), higher=True, unit="%")
class Top5(_TopK):
    """Top-5 accuracy: the share of samples whose label is among the five largest logits, in percent.

    With fewer than five classes all of them are taken, so that it is 100.
    """

    k = 5


@METRICS.register("nll", injected=("num_classes", "device"), higher=False, unit="nats")
class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the label, in nats: the cross-entropy without smoothing."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_sum_state("nats")
        self.add_count_state("seen")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        keep, safe = _labelled(label, valid)
        nats = -F.log_softmax(_wide(logits), dim=1).gather(1, safe[:, None])[:, 0]
        self.state["nats"] += torch.where(keep, nats, 0).to(self.state["nats"].dtype).sum()
        self.state["seen"] += keep.sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        return {"nll": _share(state["nats"], state["seen"]) / 100}


@METRICS.register("ece", injected=("num_classes", "device"), higher=False, unit="%")
class ExpectedCalibrationError(Metric):
    """Expected calibration error, in percent (Guo et al. 2017, arXiv 1706.04599).

    The confidence of a sample is its largest probability. Samples fall into `bins` bins of equal width, the m-th
    being ((m-1)/bins, m/bins]:

        ECE = sum_m |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", bins: int = 15) -> None:
        super().__init__(num_classes, device)
        if bins < 1:
            raise ConfigError(f"metric 'ece': bins must be 1 or more, got {bins}")
        self.bins = bins
        self.inner_edges = torch.arange(1, bins, dtype=torch.float32, device=self.device) / bins
        self.add_sum_state("confidence", bins)
        self.add_count_state("right", bins)
        self.add_count_state("seen", bins)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        keep, safe = _labelled(label, valid)
        confidence, predicted = F.softmax(_wide(logits), dim=1).max(1)
        where = torch.bucketize(confidence, self.inner_edges.to(confidence.dtype))
        member = (where[:, None] == torch.arange(self.bins, device=where.device)) & keep[:, None]
        total = self.state["confidence"].dtype
        self.state["confidence"] += torch.where(member, confidence[:, None], 0).to(total).sum(0)
        self.state["right"] += (member & (predicted == safe)[:, None]).sum(0)
        self.state["seen"] += member.sum(0)

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        gap = (state["right"].double() - state["confidence"].double()).abs().sum()
        return {"ece": _share(gap, state["seen"].sum())}


@METRICS.register("agreement", injected=("num_classes", "device"), needs_teacher=True, higher=True, unit="%")
class Agreement(Metric):
    """How far the student follows the teacher: `agreement` in percent and `teacher_kl` in nats.

    `agreement` is the share of samples on which student and teacher predict the same class (fidelity in Stanton et
    al. 2021, arXiv 2106.05945); `teacher_kl` is the mean of KL(teacher || student) at temperature 1. Neither reads
    the label, so samples with a hidden label count too.
    """

    needs_teacher = True

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("same")
        self.add_count_state("seen")
        self.add_sum_state("nats")

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        if teacher_logits is None:
            raise ValueError("agreement needs teacher_logits")
        keep = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
        same = logits.argmax(1) == teacher_logits.argmax(1)
        student = F.log_softmax(_wide(logits), dim=1)
        teacher = F.log_softmax(_wide(teacher_logits), dim=1)
        nats = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        self.state["same"] += (same & keep).sum()
        self.state["seen"] += keep.sum()
        self.state["nats"] += torch.where(keep, nats, 0).to(self.state["nats"].dtype).sum()

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        share = _share(state["same"], state["seen"])
        return {"agreement": share, "teacher_kl": _share(state["nats"], state["seen"]) / 100}


@METRICS.register("per_class", injected=("num_classes", "device"), higher=True, unit="%")
class PerClass(Metric):
    """Top-1 accuracy of each class, in percent: `per_class/0`, `per_class/1`, ...; NaN for a class without samples."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("right", num_classes)
        self.add_count_state("seen", num_classes)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        keep, safe = _labelled(label, valid)
        self.state["right"].index_add_(0, safe, ((logits.argmax(1) == safe) & keep).long())
        self.state["seen"].index_add_(0, safe, keep.long())

    def compute(self) -> dict[str, float]:
        state = self.state_on_host()
        pairs = zip(state["right"], state["seen"], strict=True)
        return {f"per_class/{index}": _share(right, seen) for index, (right, seen) in enumerate(pairs)}


@METRICS.register("confusion", injected=("num_classes", "device"))
class Confusion(Metric):
    """Confusion matrix, drawn in TensorBoard: row = the label, column = the predicted class, entry = samples.

    It is no scalar, so it adds nothing to the numbers of `metrics.jsonl`.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device)
        self.add_count_state("matrix", num_classes, num_classes)

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        keep, safe = _labelled(label, valid)
        cell = safe * self.num_classes + logits.argmax(1)
        self.state["matrix"].view(-1).index_add_(0, cell, keep.long())

    def compute(self) -> dict[str, float]:
        return {}


class MetricSet:
    """Several metrics of one role on one split.

    Args:
        metrics: names or `Named` entries of METRICS.
        num_classes: the number of logits.
        device: where the sums live.

    Raises:
        ConfigError: an unknown name or parameter, or the same metric twice.
    """

    def __init__(
        self, metrics: Iterable[str | PartConfig], num_classes: int, device: torch.device | str = "cpu"
    ) -> None:
        self.metrics: dict[str, Metric] = {}
        self._fed: set[str] = set()
        for item in metrics:
            named = PartConfig(type=item) if isinstance(item, str) else item
            if named.type in self.metrics:
                raise ConfigError(f"{named.location}: metric {named.type!r} is named twice".lstrip(": "))
            built = METRICS.build(named.type, named.params, named.location, num_classes=num_classes, device=device)
            self.metrics[named.type] = built

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the metrics reads the teacher's logits."""
        return any(metric.needs_teacher for metric in self.metrics.values())

    def update(
        self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        """Adds one batch to every metric; shapes as in `Metric.update`.

        Without teacher logits, the metrics that need them are passed over and give no value.
        """
        with torch.no_grad():
            for name, metric in self.metrics.items():
                if metric.needs_teacher and teacher_logits is None:
                    continue
                metric.update(logits, label, teacher_logits, valid)
                self._fed.add(name)

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Adds the sums of all ranks, metric by metric; every rank must hold the same metrics."""
        for metric in self.metrics.values():
            metric.reduce(all_reduce)

    def compute(self) -> dict[str, float]:
        """Returns all numbers, in the order of the metrics; this waits for the device."""
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            if name in self._fed or not metric.needs_teacher:
                values.update(metric.compute())
        return values

    def confusion(self) -> Tensor | None:
        """Returns the confusion matrix on the host, or None when it is not among the metrics."""
        metric = self.metrics.get("confusion")
        return metric.state_on_host()["matrix"] if metric else None

    def reset(self) -> None:
        """Starts every metric again from nothing."""
        self._fed.clear()
        for metric in self.metrics.values():
            metric.reset()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns all sums, so that a run which is cut off goes on counting."""
        fed = {name: metric for name, metric in self.metrics.items() if name in self._fed}
        return {name: dict(metric.state) for name, metric in fed.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over sums of `state_dict` of a set of the same metrics."""
        for name, tensors in state.items():
            for key, tensor in tensors.items():
                self.metrics[name].state[key].copy_(tensor)
            self._fed.add(name)


def higher_is_better(name: str) -> bool:
    """Says which way a metric improves; `name` is a key of `MetricSet.compute`. True where nothing is declared."""
    if name == "teacher_kl":
        return False
    entry = METRICS.entries.get(name.partition("/")[0])
    return bool(entry.facts.get("higher", True)) if entry else True
