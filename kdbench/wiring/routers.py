"""Routers: modules that compute the weight of each teacher of a loss term for each sample, (batch, edges).

An edge of a loss term is one (student, teacher) pair.
"""

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
    """Raises ConfigError if a loss term has only one (student, teacher) pair."""
    if edges < 2:
        raise ConfigError(
            f"{router}: a router weights several teachers, but the term has {edges} pair of student and teacher"
        )


@ROUTERS.register("uniform", version=1, injected=("edges",))
class UniformRouter(Router):
    """Router with equal weights: 1 / (number of teachers) for every teacher.

    Shape:
        Returns (batch, teachers).
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("uniform", edges)
        self.edges = edges

    def forward(self, student: Tensor) -> Tensor:
        return at_least_float32(student.detach()).new_full((student.shape[0], self.edges), 1 / self.edges)


@ROUTERS.register("random", version=1, injected=("edges",))
class RandomRouter(Router):
    """Router that selects one random teacher for each sample in each step.

    Shape:
        Returns (batch, teachers): in each row one 1, otherwise zeros.
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
    """DGKD: router that drops random teachers in every step. The losses of the remaining teachers are summed.

    An edge e is one (student, teacher) pair of the loss term: weight_e = 0 for `count` random edges, otherwise 1. As
    in the paper, the authors' code draws the dropped edges once per step.

    Args:
        count: number of dropped edges, at least 0 and below the number of edges.
        per: `step`: one draw for the batch. `sample`: one draw for each sample.

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
            raise ConfigError(f"drop: count must be from 0 to {edges - 1} (the term has {edges} teachers), got {count}")
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
    """Router that uses a given tensor as the weights of the teachers.

    Example: a loss term on features uses the weights of the term `kd` on logits, which has its own router.

    Args:
        gradient: whether the gradient of the loss flows into the weights. By default, the weights are detached.

    Shape:
        route: (batch, teachers). Returns the same shape.

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
            raise ValueError(
                f"route must contain {self.edges} weights per sample, one per teacher, "
                f"got shape {list(route.shape[1:])}"
            )
        return route if self.gradient else route.detach()


@ROUTERS.register("confidence", version=1, injected=("edges",))
class ConfidenceRouter(Router):
    """CA-MKD: router that gives a teacher a higher weight for samples on which it has a lower cross-entropy.

    For E teachers with the cross-entropies CE_1 .. CE_E with the label of the sample:

        weight_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1)

    The weights of a sample sum to 1. If the label is hidden (negative), all weights are 1 / E. The authors' code also
    divides the weighted loss by E; to reproduce this division, divide the weight of the loss term by E.

    The teacher tensors of the loss term must be logits. For a loss term on features, use the router `given` with the
    weights of this router as its input.

    Shape:
        teachers: logits (batch, classes) each. label: (batch,), int64. Returns (batch, teachers).

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
    """MST-Distill: router with a learnt gate that selects the k most probable teachers of each sample.

        gate = softmax(W_2 (W_1 read))

    `read` is the input of the gate. The gate has two linear layers without an activation in between; the hidden width
    is twice the input width. In the authors' code, the input is the student's logits (`read: student`). As in the
    authors' code, gradients flow into `read`.

    Args:
        k: number of selected teachers, from 1 to the number of teachers.
        weights: weights of the selected teachers. `gate`: their gate values, scaled to sum 1, so that the
            distillation loss trains the gate. `equal`: 1 / k each, as in the authors' code. With `equal`, only a
            load-balance loss trains the gate (a term `load_balance` on `term:NAME.gate`).

    Shape:
        read: (batch, ...). Returns a dictionary with `route` (the weights) and `gate`, both (batch, teachers) with
        rows of sum 1.

    References:
        Li et al., MST-Distill, ACM MM 2025, arXiv:2507.07015.
    """

    def __init__(
        self, edges: int, shapes: dict[str, Any], k: int = 1, weights: Literal["gate", "equal"] = "gate"
    ) -> None:
        super().__init__()
        _check_several_edges("top_k", edges)
        if not 1 <= k <= edges:
            raise ConfigError(f"top_k: k must be from 1 to {edges} (the term has {edges} teachers), got {k}")
        if k == 1 and weights == "gate":
            raise ConfigError(
                "top_k: with k = 1 and `weights: gate`, the weight of the selected teacher is always 1, so the gate "
                "would get no gradient. Use k of at least 2, or `weights: equal` with a load_balance term."
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
    """RL-KD: router with a stochastic policy that selects teachers for each sample.

        gate_e = sigmoid(w_e . [read, softmax(teacher_e), CE_e] + b_e)

    The policy selects teacher e with probability gate_e, independently of the other teachers. The selected teachers
    of a sample have equal weights. The inputs of the policy are detached: `read` (a tensor that the recipe sets), the
    teacher's softmax, and CE_e, the teacher's cross-entropy with the label (0 if the label is hidden). No gradient
    flows through the random selection. Train the policy with a term `reinforce` on `term:NAME.gate`. The
    implementation follows the paper, because no code is released.

    Args:
        none: what happens to a sample for which the policy selects no teacher. `nobody`: the sample has no
            distillation loss. `likeliest`: the teacher with the largest gate_e is selected. Use `likeliest` if the
            reward is minus the distillation loss; otherwise the policy would learn to select no teacher, because this
            makes the loss 0.

    Shape:
        read: (batch, ...). teachers: logits (batch, classes) each. label: (batch,), int64. Returns a dictionary with
        `route` (the weights) and `gate`, both (batch, teachers).

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
