"""Terms of games: one player's loss is the other's gain, or a judge's verdict is the loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_parameters
from kdbench.terms.logits import kd_loss
from kdbench.terms.numerics import at_least_float32


def reverse_gradient(values: Tensor, strength: Number) -> Tensor:
    """The values as they are; what flows back through them is times -strength."""
    still = values.detach()
    return still - strength * (values - still)


@TERMS.register("ctkd", space="row", version=1, injected=("shapes",), paper="arXiv:2211.16231")
class CurriculumTemperature(Term):
    """CTKD: kd whose temperature is learnt against the student, so that the task grows harder.

    loss = T^2 * KL(softmax(teacher / T) || softmax(student / T)), T = lowest + span * sigmoid(theta). theta gets the
    gradient of the loss times -reverse: it ascends while the student descends. As in the authors' code: theta starts
    at 1, lowest 1, span 20; `reverse` rises from 0 to 1 along a cosine over the first 10 epochs: give it a schedule.
    scope global: one theta. scope instance: theta of each sample by a two-layer perceptron on both predictions, as the
    text has it (no released code for it; the hidden width is ours). Its inputs are detached, so that the reversed
    gradient reaches the temperature only.

    Li, Li, Yang, Zhao, Song, Luo, Li and Yang, Curriculum Temperature for Knowledge Distillation, AAAI 2023,
    arXiv:2211.16231.
    Shapes: student, teacher logits (batch, classes) -> (batch,), nats times T^2.
    """

    def __init__(
        self,
        shapes: dict[str, Any],
        scope: Literal["global", "instance"] = "global",
        lowest: float = 1.0,
        span: float = 20.0,
        reverse: Number = 1.0,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        check_parameters("ctkd", "above 0", lowest=lowest, span=span)
        check_parameters("ctkd", "at least 0", reverse=reverse)
        check_parameters("ctkd", "at least 1", hidden=hidden)
        self.lowest = lowest
        self.span = span
        self.reverse = reverse
        self.theta = nn.Parameter(torch.ones(1)) if scope == "global" else None
        width = sum(shapes[name][-1] for name in ("student", "teacher"))
        self.net = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)) if scope == "instance" else None
        )

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def temperature(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns T, (1,) or (batch, 1)."""
        if self.net is not None:
            theta = at_least_float32(self.net(torch.cat([student.detach(), teacher.detach()], dim=1)))
        else:
            assert self.theta is not None
            theta = self.theta.to(student.dtype)
        return self.lowest + self.span * torch.sigmoid(reverse_gradient(theta, self.reverse))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        temperature = self.temperature(student, teacher)
        return temperature.squeeze(-1) ** 2 * kd_loss(student / temperature, teacher / temperature, 1.0)


@TERMS.register("binary", space="row", version=1, paper="arXiv:2009.08453")
class BinaryCrossEntropy(Term):
    """A judge's verdict against a constant: binary cross-entropy of one logit with `target`.

    loss = -target * log s - (1 - target) * log(1 - s), s = sigmoid(student). For a discriminator that is a role: two
    terms move it (1 on what is the teacher's, 0 on what is the student's), one with the wrong target moves the student.
    MEAL V2's released code has no such second player: student and discriminator minimise the same loss with the right
    targets, in one update over both.

    Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453; Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014.
    Shapes: student one logit (batch,) or (batch, 1) -> (batch,), nats.
    """

    def __init__(self, target: float = 1.0) -> None:
        super().__init__()
        check_parameters("binary", "in [0, 1]", target=target)
        self.target = target

    def check_shapes(self, **shapes: Size) -> None:
        if len(shapes["student"]) > 2 or (len(shapes["student"]) == 2 and shapes["student"][1] != 1):
            raise ValueError(
                f"reads one logit per sample, but the student's operand is {list(shapes['student'][1:])} per sample"
            )

    def forward(self, student: Tensor) -> Tensor:
        verdict = at_least_float32(student).reshape(student.shape[0])
        return F.softplus(verdict) - self.target * verdict


@TERMS.register("competition", space="row", version=1, paper="arXiv:1912.08795")
class Competition(Term):
    """Adaptive DeepInversion: images on which student and teacher disagree; 0 where they differ most, 1 where not.

    loss = 1 - min(J, 1), J = KL(m || p) / 2 + KL(m || q) / 2, with p, q the softmaxes of student and teacher at
    T and m their mean, all three clamped to [0.01, 0.99]. This is the authors' code, whose divergence is that of the
    mean from the parts, where Jensen-Shannon has the parts from the mean; it bounds the mean of J over the batch, here
    each sample's. Write `teacher_grad: true`: images learn through both networks.

    Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha and Kautz, Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
    Shapes: student, teacher logits (batch, classes) -> (batch,), in [0, 1].
    """

    def __init__(self, temperature: Number = 3.0) -> None:
        super().__init__()
        check_parameters("competition", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p = F.softmax(at_least_float32(student) / self.temperature, dim=1)
        q = F.softmax(at_least_float32(teacher) / self.temperature, dim=1)
        p, q, m = (values.clamp(0.01, 0.99) for values in (p, q, (p + q) / 2))
        apart = (m * (m.log() - (p.log() + q.log()) / 2)).sum(1)
        return 1 - apart.clamp(0, 1)
