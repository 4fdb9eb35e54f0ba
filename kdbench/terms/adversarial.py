"""Terms of adversarial training: reversed gradients, discriminators and competition between networks."""

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
    """Returns the values unchanged. In the backward pass, the gradient is multiplied by -strength."""
    constant = values.detach()
    return constant - strength * (values - constant)


@TERMS.register("ctkd", space="row", version=1, injected=("shapes",), paper="arXiv:2211.16231")
class CurriculumTemperature(Term):
    """CTKD: `kd` with a temperature that is trained to raise the loss, so that the task grows harder.

    loss = T^2 * KL(softmax(teacher / T) || softmax(student / T)), T = lowest + span * sigmoid(theta)

    The gradient of theta is multiplied by -reverse, so that the temperature is trained to raise the loss while the
    student is trained to lower it. The initial theta is 1, as in the authors' code.

    Args:
        scope: `global`: one theta for all samples. `instance`: a two-layer perceptron computes the theta of each
            sample from the predictions of student and teacher, as the paper describes it. (The authors released no
            code for it. The hidden width is our choice.) No gradient flows to the inputs of the perceptron.
        lowest: lower end of T, above 0.
        span: width of the interval of T, above 0.
        reverse: strength of the reversal, at least 0. The authors raise it from 0 to 1 along a cosine over the first
            10 epochs, which a recipe does with a schedule.
        hidden: hidden width of the perceptron for the scope `instance`.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), nats times T^2.

    References:
        Li, Li, Yang, Zhao, Song, Luo, Li and Yang, Curriculum Temperature for Knowledge Distillation, AAAI 2023,
        arXiv:2211.16231.
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
        """Computes T: (1,) for `scope: global`, (batch, 1) for `scope: instance`."""
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
    """Binary cross-entropy of a discriminator's logit with a constant target.

    loss = -target * log s - (1 - target) * log(1 - s), s = sigmoid(student)

    Two such terms train a discriminator, with target 1 on the teacher's output and target 0 on the student's output.
    A third term, with the wrong target, trains the student. In MEAL V2's released code, student and discriminator
    minimise one loss with the right targets, in one update.

    Args:
        target: constant target, in [0, 1].

    Shape:
        student: one logit, (batch,) or (batch, 1).
        Returns (batch,), nats.

    References:
        Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453; Goodfellow et al., Generative Adversarial Nets, NeurIPS
        2014.
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
        logit = at_least_float32(student).reshape(student.shape[0])
        return F.softplus(logit) - self.target * logit


@TERMS.register("competition", space="row", version=1, paper="arXiv:1912.08795")
class Competition(Term):
    """Adaptive DeepInversion: 1 minus the divergence of student and teacher, for images on which they disagree.

    loss = 1 - min(J, 1), J = KL(m || p) / 2 + KL(m || q) / 2, m = (p + q) / 2

    p and q are the softmaxes of student and teacher at temperature T. p, q and m are clamped to [0.01, 0.99]. As in
    the authors' code, J is the divergence of the mean m from p and q. (The Jensen-Shannon divergence is that of p and
    q from m.) The code clamps the mean of J over the batch at 1; this term clamps J of each sample. The term needs
    `teacher_grad: true`, because the images receive gradients through student and teacher.

    Args:
        temperature: T > 0.

    Shape:
        student, teacher: logits (batch, classes).
        Returns (batch,), in [0, 1].

    References:
        Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha and Kautz, Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
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
        divergence = (m * (m.log() - (p.log() + q.log()) / 2)).sum(1)
        return 1 - divergence.clamp(0, 1)
