"""Terms of class-incremental and online continual learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_logits, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, flatten_and_mask, row_weights, safe_divide


@TERMS.register("icarl", space="row", version=1, paper="arXiv:1611.07725")
class ICaRL(Term):
    """iCaRL: binary cross-entropy per class; the target of old classes is the old network, of others the label.

    loss = sum_k BCE(sigmoid(student_k), t_k), t_k = sigmoid(teacher_k) for k in `old`, else 1 for the label's class and
    0 for others. The sum over the classes as in the paper (equation in algorithm 3); its code takes the mean.
    Without old classes (`old: []`, the first task) all targets are labels. Hidden labels (negative) give 0.

    Rebuffi, Kolesnikov, Sperl and Lampert, iCaRL: Incremental Classifier and Representation Learning, CVPR 2017,
    arXiv:1611.07725.
    Shapes: student, teacher logits (batch, classes), label (batch,) -> (batch,), nats.
    """

    places: Tensor

    def __init__(self, old: list[int]) -> None:
        super().__init__()
        if any(number < 0 for number in old) or len(set(old)) != len(old):
            raise ConfigError(f"icarl: old lists the numbers of the old classes, each once, got {old}")
        self.old = tuple(old)
        self.register_buffer("places", torch.tensor(self.old, dtype=torch.int64), persistent=False)

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])
        if self.old and max(self.old) >= shapes["student"][1]:
            raise ValueError(f"names old class {max(self.old)}, but there are {shapes['student'][1]} classes from 0 on")

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        old = torch.zeros(student.shape[1], dtype=torch.bool, device=student.device)
        old = old.scatter(0, self.places, True)
        hard = torch.zeros_like(student).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        target = torch.where(old, teacher.sigmoid(), hard)
        return torch.where(label < 0, 0, (F.softplus(student) - target * student).sum(1))


@TERMS.register(
    "proxy_contrastive",
    space="batch",
    version=1,
    operands=("replayed", "replayed_label"),
    paper="arXiv:2304.04408",
)
class ProxyContrastive(Term):
    """PCR, HPCR: each sample is drawn to its class's proxy, away from the proxies of the classes in the batch.

    loss = mean_i -log(exp(z_i,y_i / T) / sum_j exp(z_i,y_j / T)), j over the batch: a class that occurs twice counts
    twice, one that does not occur does not count. The logits z are similarities to the class's proxy: those of a
    cosine classifier make it the authors' loss, which has cosines over 0.09 (`cosine_head` has, so that T is 1 there).
    `replayed` and `replayed_label` are a second batch, such as that of a memory: i and j run over both.
    Hidden labels (negative) and rows that the mask leaves out count nowhere; a row of weight 2 counts twice.

    Lin, Zhang, Feng, Li and Ye, PCR: Proxy-based Contrastive Replay, CVPR 2023, arXiv:2304.04408, as in the
    authors' code; HPCR, arXiv:2309.15038, whose second temperature multiplies this loss: give the weight a schedule.
    Shapes: student logits (batch, classes), label (batch,); replayed logits (rows, classes), replayed_label (rows,)
    -> scalar, nats.
    """

    def __init__(self, temperature: Number = 0.09) -> None:
        super().__init__()
        check_parameters("proxy_contrastive", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)
        if ("replayed" in shapes) != ("replayed_label" in shapes):
            raise ValueError("reads `replayed` and `replayed_label` together: give both or neither")
        if "replayed" in shapes:
            check_equal_classes(shapes["student"], shapes["replayed"])

    def forward(
        self,
        student: Tensor,
        label: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        replayed: Tensor | None = None,
        replayed_label: Tensor | None = None,
    ) -> Tensor:
        known = label >= 0 if mask is None else mask & (label >= 0)
        scores = flatten_and_mask(student, known) / self.temperature
        counts = row_weights(scores, known, weight)
        if replayed is not None and replayed_label is not None:
            again = replayed_label >= 0
            rows = flatten_and_mask(replayed, again) / self.temperature
            scores, label = torch.cat([scores, rows]), torch.cat([label, replayed_label])
            counts = torch.cat([counts, row_weights(rows, again, None)])
        own = label.clamp(min=0).unsqueeze(1)
        least = torch.finfo(scores.dtype).min / 2  # not -inf: the rows of an empty batch have no class at all
        present = class_occurrences(scores, own, counts)
        shares = torch.where(present > 0, torch.where(present > 0, present, 1).log(), least)
        losses = torch.logsumexp(scores + shares, dim=1) - scores.gather(1, own).squeeze(1)
        return safe_divide((counts * torch.where(counts > 0, losses, 0)).sum(), counts.sum())


def class_occurrences(scores: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """How often each class occurs in a batch, (classes,).

    Args:
        scores: (batch, classes). own: int64 (batch, 1), each row's class. counts: (batch,), how much each row counts.
    """
    return (torch.zeros_like(scores).scatter(1, own, 1) * counts.unsqueeze(1)).sum(0)


@TERMS.register("proxy_distance", space="batch", version=1, operands=("new_label",), paper="arXiv:2309.15038")
class ProxyDistance(Term):
    """HPCR's distillation of proxies: the similarities to the classes of the batch stay what they were.

    loss = mean_i mean_j (z_i,y_j - t_i,y_j)^2, i over the replayed samples, j over the labels of the replayed samples
    and, where `new_label` is given, of the new ones of the same step: a class that occurs twice counts twice, one that
    does not occur does not count. Hidden labels (negative) and rows that the mask leaves out count nowhere.

    Lin, Feng, Zhang, Li and Ye, HPCR: Holistic Proxy-based Contrastive Replay, IEEE TNNLS 2025, arXiv:2309.15038, as
    in the authors' code, where it is called PCD and weighs 0.1.
    Shapes: student, teacher logits (batch, classes), label (batch,), new_label (rows,) -> scalar.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        new_label: Tensor | None = None,
    ) -> Tensor:
        known = label >= 0 if mask is None else mask & (label >= 0)
        scores, target = flatten_and_mask(student, known), flatten_and_mask(teacher, known)
        counts = row_weights(scores, known, weight)
        present = class_occurrences(scores, label.clamp(min=0).unsqueeze(1), counts)
        if new_label is not None:
            new = (new_label >= 0).to(scores.dtype)
            wide = scores.new_zeros(len(new), scores.shape[1])
            present = present + class_occurrences(wide, new_label.clamp(min=0).unsqueeze(1), new)
        losses = safe_divide(((scores - target).square() * present).sum(1), present.sum())
        return safe_divide((counts * losses).sum(), counts.sum())


@TERMS.register("similarity_distribution", space="batch", version=1, features=True, paper="arXiv:2309.15038")
class SimilarityDistribution(Term):
    """How alike a sample is to each other one of the batch, as a distribution, stays what it was (HPCR's SCD).

    loss = mean_i -sum_{j != i} p_ij log q_ij, with q_i = softmax over j != i of cos(s_i, s_j) / T and p_i that of the
    teacher. At equality it is the entropy of p, not 0. A row of weight 2 counts twice, in both sums; with fewer than
    two rows that count there is nothing to compare, and the loss is 0.

    Lin, Feng, Zhang, Li and Ye, HPCR: Holistic Proxy-based Contrastive Replay, IEEE TNNLS 2025, arXiv:2309.15038, as
    in the authors' code, with T = 0.09 and weight 0.5.
    Shapes: student (batch, ...), teacher (batch, ...), each flattened -> scalar, nats.
    """

    def __init__(self, temperature: Number = 0.09) -> None:
        super().__init__()
        check_parameters("similarity_distribution", "above 0", temperature=temperature)
        self.temperature = temperature

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        rows = flatten_and_mask(student, mask)
        counts = row_weights(rows, mask, weight)
        others = counts.unsqueeze(0) * (1 - torch.eye(len(counts), dtype=counts.dtype, device=counts.device))
        ours, theirs = (self._log_softmax(side, others) for side in (rows, flatten_and_mask(teacher, mask)))
        losses = -(torch.where(others > 0, theirs.exp() * ours, 0)).sum(1)
        return safe_divide((counts * losses).sum(), counts.sum())

    def _log_softmax(self, rows: Tensor, others: Tensor) -> Tensor:
        """Of the similarities to the other rows, each counted as often as `others` says."""
        with autocast_disabled(rows):
            directions = F.normalize(rows, dim=1, eps=1e-6)
            similar = directions @ directions.t() / self.temperature
        least = torch.finfo(similar.dtype).min / 2
        shares = torch.where(others > 0, torch.where(others > 0, others, 1).log(), least)
        return F.log_softmax(similar + shares, dim=1)
