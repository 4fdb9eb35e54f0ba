"""Terms of class-incremental and online continual learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, equal_classes, logits_of, require
from kdbench.terms.numerics import at_least_float32, ratio, row_weights, valid_rows


@TERMS.register("icarl", space="sample", version=1, paper="arXiv:1611.07725")
class ICaRL(Term):
    """iCaRL: binary cross-entropy per class; the target of old classes is the old network, of others the label.

    loss = sum_k BCE(sigmoid(student_k), t_k), t_k = sigmoid(teacher_k) for k in `old`, else 1 for the label's class and
    0 for others. The sum over the classes as in the paper (equation in algorithm 3); its code takes the mean.
    Without old classes (`old: []`, the first task) all targets are labels. Hidden labels (negative) give 0.

    Rebuffi, Kolesnikov, Sperl and Lampert, iCaRL: Incremental Classifier and Representation Learning, CVPR 2017,
    arXiv:1611.07725.
    Shapes: student, teacher logits (batch, classes), label (batch,) -> (batch,), nats.
    """

    def __init__(self, old: list[int]) -> None:
        super().__init__()
        if any(number < 0 for number in old) or len(set(old)) != len(old):
            raise ConfigError(f"icarl: old lists the numbers of the old classes, each once, got {old}")
        self.old = tuple(old)

    def check_shapes(self, **shapes: Size) -> None:
        equal_classes(shapes["student"], shapes["teacher"])
        if self.old and max(self.old) >= shapes["student"][1]:
            raise ValueError(f"names old class {max(self.old)}, but there are {shapes['student'][1]} classes from 0 on")

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        old = torch.zeros(student.shape[1], dtype=torch.bool, device=student.device)
        old = old.scatter(0, torch.tensor(self.old, dtype=torch.int64, device=student.device), True)
        hard = torch.zeros_like(student).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        target = torch.where(old, teacher.sigmoid(), hard)
        return torch.where(label < 0, 0, (F.softplus(student) - target * student).sum(1))


@TERMS.register("proxy_contrastive", space="batch", version=1, paper="arXiv:2304.04408")
class ProxyContrastive(Term):
    """PCR, HPCR: each sample is drawn to its class's proxy, away from the proxies of the classes in the batch.

    loss = mean_i -log(exp(z_i,y_i / T) / sum_j exp(z_i,y_j / T)), j over the batch: a class that occurs twice counts
    twice, one that does not occur does not count. The logits z are similarities to the class's proxy: those of a
    cosine classifier (scale 1) make it the authors' loss, which has T = 0.09.
    Hidden labels (negative) and rows that the mask leaves out count nowhere; a row of weight 2 counts twice.

    Lin, Zhang, Feng, Li and Ye, PCR: Proxy-based Contrastive Replay, CVPR 2023, arXiv:2304.04408, as in the
    authors' code; HPCR, arXiv:2309.15038, whose second temperature multiplies this loss: give the weight a schedule.
    Shapes: student logits (batch, classes), label (batch,) -> scalar, nats.
    """

    def __init__(self, temperature: Number = 0.09) -> None:
        super().__init__()
        require("proxy_contrastive", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        logits_of("student", shapes["student"], least=2)

    def forward(
        self, student: Tensor, label: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        known = label >= 0 if mask is None else mask & (label >= 0)
        scores = valid_rows(student, known) / self.temperature
        counts = row_weights(scores, known, weight)
        own = label.clamp(min=0).unsqueeze(1)
        present = (torch.zeros_like(scores).scatter(1, own, 1) * counts.unsqueeze(1)).sum(0)
        least = torch.finfo(scores.dtype).min / 2  # not -inf: the rows of an empty batch have no class at all
        shares = torch.where(present > 0, torch.where(present > 0, present, 1).log(), least)
        losses = torch.logsumexp(scores + shares, dim=1) - scores.gather(1, own).squeeze(1)
        return ratio((counts * torch.where(counts > 0, losses, 0)).sum(), counts.sum())
