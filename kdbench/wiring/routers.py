"""Routers: the weight of each edge of a term (each teacher) for each sample, (batch, edges)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.registry import ROUTERS
from kdbench.terms.logits import cross_entropy_loss
from kdbench.terms.numerics import at_least_float32, safe_divide
from kdbench.wiring.base import Router


def _check_several_edges(router: str, edges: int) -> None:
    """Raises ConfigError for a term with a single edge."""
    if edges < 2:
        raise ConfigError(f"{router}: a router divides a term among several teachers, but the term has {edges} edge")


@ROUTERS.register("uniform", version=1, injected=("edges",))
class UniformRouter(Router):
    """Equal weights: 1 / edges for every teacher.

    Shape:
        Returns (batch, edges).
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("uniform", edges)
        self.edges = edges

    def forward(self, student: Tensor) -> Tensor:
        return at_least_float32(student.detach()).new_full((student.shape[0], self.edges), 1 / self.edges)


@ROUTERS.register("random", version=1, injected=("edges",))
class RandomRouter(Router):
    """One random teacher per sample and step.

    Shape:
        Returns (batch, edges), one 1 in each row.
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("random", edges)
        self.edges = edges

    def forward(self, student: Tensor) -> Tensor:
        draw = torch.rand((student.shape[0], self.edges), device=student.device).argmax(1, keepdim=True)
        return at_least_float32(student.detach()).new_zeros(student.shape[0], self.edges).scatter(1, draw, 1)


@ROUTERS.register("drop", version=1, injected=("edges",))
class DropRouter(Router):
    """DGKD: drops random teachers in every step; the losses of the rest are added, not averaged.

    weight_e = 0 for `count` random edges, else 1

    The authors' code draws once per step, as in the text.

    Args:
        count: number of dropped edges, from 0 to below the number of edges.
        per: `step` or `sample`: one draw for the batch, or one for each sample.

    Shape:
        Returns (batch, edges), each row with `count` zeros.

    References:
        Son, Na, Choi and Hwang, Densely Guided Knowledge Distillation using Multiple Teacher Assistants, ICCV 2021,
        arXiv:2009.08825.
    """

    def __init__(self, edges: int, count: int = 1, per: Literal["step", "sample"] = "step") -> None:
        super().__init__()
        _check_several_edges("drop", edges)
        if not 0 <= count < edges:
            raise ConfigError(f"drop: count must be from 0 to below the {edges} edges of the term, got {count}")
        self.edges = edges
        self.count = count
        self.per = per

    def forward(self, student: Tensor) -> Tensor:
        rows = student.shape[0]
        draw = torch.rand((1 if self.per == "step" else rows, self.edges), device=student.device)
        remaining = draw.argsort(dim=1).argsort(dim=1) >= self.count
        return remaining.to(at_least_float32(student.detach()).dtype).expand(rows, self.edges)


@ROUTERS.register("given", version=1, operands=("route",), injected=("edges",))
class ExternalRouter(Router):
    """Weights from an operand, such as those of another term's router for a term on features.

    Args:
        gradient: pass the gradient of this term to the weights; by default they are detached.

    Shape:
        route: (batch, edges). Returns the same.

    Example (recipe):
        route: {type: given, route: "term:kd.route"}
    """

    def __init__(self, edges: int, gradient: bool = False) -> None:
        super().__init__()
        _check_several_edges("given", edges)
        self.edges = edges
        self.gradient = gradient

    def forward(self, route: Tensor) -> Tensor:
        if route.dim() != 2 or route.shape[1] != self.edges:
            raise ValueError(f"needs weights for {self.edges} edges per sample, got {list(route.shape[1:])}")
        return route if self.gradient else route.detach()


@ROUTERS.register("confidence", version=1, injected=("edges",))
class ConfidenceRouter(Router):
    """CA-MKD: weight of each teacher per sample, by its cross-entropy with the label.

    weight_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1), of sum 1

    As in the authors' code, which divides the loss by the number of teachers once more: include that in the term's
    weight. The teachers' operands are logits; a term on features has the router `given` with this one's route. Hidden
    labels (negative): 1 / E.

    Shape:
        teachers: logits (batch, classes) each. label: (batch,), int64. Returns (batch, edges).

    References:
        Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv:2201.00007.
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("confidence", edges)

    def forward(self, teachers: list[Tensor], label: Tensor) -> Tensor:
        costs = torch.stack([cross_entropy_loss(teacher.detach(), label) for teacher in teachers], dim=1)
        return (1 - F.softmax(costs, dim=1)) / (len(teachers) - 1)


@ROUTERS.register("top_k", version=1, operands=("read",), injected=("edges", "shapes"))
class TopKRouter(Router):
    """MST-Distill: a learnt gate selects the k most probable teachers of each sample.

    gate = softmax(W_2 W_1 read): two linear layers of width 2 * inputs without non-linearity, as in the authors' code,
    which reads the student's logits (`read: student`). Gradients pass into `read`, as there.

    Args:
        k: number of selected teachers, from 1 to the number of edges.
        weights: weights of the selected teachers. `gate`: their gate values, scaled to sum 1, so that the distillation
            loss trains the gate. `equal`: 1 / k each, as in the authors' code; the gate then gets no gradient from the
            distillation loss, only from the load balance term (`load_balance` on `term:NAME.gate`).

    Shape:
        read: (batch, ...). Returns route and gate, (batch, edges) each, each row of sum 1.

    References:
        Li et al., MST-Distill, ACM MM 2025, arXiv:2507.07015.
    """

    def __init__(
        self, edges: int, shapes: dict[str, Any], k: int = 1, weights: Literal["gate", "equal"] = "gate"
    ) -> None:
        super().__init__()
        _check_several_edges("top_k", edges)
        if not 1 <= k <= edges:
            raise ConfigError(f"top_k: k must be from 1 to the {edges} edges of the term, got {k}")
        if k == 1 and weights == "gate":
            raise ConfigError(
                "top_k: with k 1 the one weight is always 1, and the gate would learn nothing from the term. "
                "Use k 2 or more, or `weights: equal` with a load_balance term."
            )
        width = math.prod(shapes["read"])
        self.k = k
        self.weights = weights
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, edges))

    def forward(self, read: Tensor) -> dict[str, Tensor]:
        gate = F.softmax(at_least_float32(self.net(read.flatten(1))), dim=1)
        top_edges = gate.detach().topk(self.k, dim=1).indices
        selection = torch.zeros_like(gate).scatter(1, top_edges, 1)
        if self.weights == "gate":
            route = safe_divide(selection * gate, (selection * gate).sum(1, keepdim=True))
        else:
            route = selection / self.k
        return {"route": route, "gate": gate}


@ROUTERS.register("policy", version=1, operands=("read",), injected=("edges", "shapes", "num_classes"))
class PolicyRouter(Router):
    """RL-KD: a stochastic policy selects teachers for each sample.

    gate_e = sigmoid(w_e . [read, softmax(teacher_e), CE_e] + b_e)

    Its inputs are an operand of the sample, the teacher's prediction and its cross-entropy with the label (0 for a
    hidden label); all are detached. Each teacher is selected with the probability gate_e, drawn from torch's generator;
    the selected teachers have equal weights. No gradient passes through the draw: train the gate by `reinforce` on
    `term:NAME.gate`. By the text; no code is released.

    Args:
        none: for samples without a selected teacher. `nobody`: the sample is not distilled. `likeliest`: select the
            most probable teacher; if the reward is minus the distillation loss, a policy would otherwise learn to
            select no teacher, which has no loss.

    Shape:
        read: (batch, ...). teachers: logits (batch, classes) each. label: (batch,), int64.
        Returns route and gate, (batch, edges) each.

    References:
        Yuan, Shou, Pei, Lin, Gong, Fu and Jiang, Reinforced Multi-Teacher Selection for Knowledge Distillation, AAAI
        2021, arXiv:2012.06048.
    """

    def __init__(
        self, edges: int, shapes: dict[str, Any], num_classes: int, none: Literal["nobody", "likeliest"] = "nobody"
    ) -> None:
        super().__init__()
        _check_several_edges("policy", edges)
        self.none = none
        width = math.prod(shapes["read"]) + num_classes + 1
        self.agents = nn.ModuleList([nn.Linear(width, 1) for _ in range(edges)])

    def forward(self, read: Tensor, teachers: list[Tensor], label: Tensor) -> dict[str, Tensor]:
        state = at_least_float32(read.detach()).flatten(1)
        scores = []
        for agent, teacher in zip(self.agents, teachers, strict=True):
            logits = at_least_float32(teacher.detach())
            cost = cross_entropy_loss(logits, label).unsqueeze(1)
            scores.append(agent(torch.cat([state, F.softmax(logits, dim=1), cost], dim=1)))
        gate = torch.sigmoid(at_least_float32(torch.cat(scores, dim=1)))
        selection = torch.bernoulli(gate.detach())
        if self.none == "likeliest":
            likeliest = torch.zeros_like(selection).scatter(1, gate.detach().argmax(1, keepdim=True), 1)
            selection = torch.where(selection.sum(1, keepdim=True) > 0, selection, likeliest)
        return {"route": safe_divide(selection, selection.sum(1, keepdim=True)), "gate": gate}
