"""How much each edge of a term, each teacher, counts for each sample. Weights (batch, edges)."""

from __future__ import annotations

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
    if edges < 2:
        raise ConfigError(f"{router}: a router divides a term among several teachers, but the term has {edges} edge")


@ROUTERS.register("uniform", version=1, injected=("edges",))
class UniformRouter(Router):
    """Every teacher counts alike: 1 / edges.

    Shapes: -> (batch, edges).
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("uniform", edges)
        self.edges = edges

    def forward(self, student: Tensor) -> Tensor:
        return at_least_float32(student.detach()).new_full((student.shape[0], self.edges), 1 / self.edges)


@ROUTERS.register("random", version=1, injected=("edges",))
class RandomRouter(Router):
    """One teacher for each sample, drawn anew in every step.

    Shapes: -> (batch, edges), one 1 in each row.
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("random", edges)
        self.edges = edges

    def forward(self, student: Tensor) -> Tensor:
        drawn = torch.rand((student.shape[0], self.edges), device=student.device).argmax(1, keepdim=True)
        return at_least_float32(student.detach()).new_zeros(student.shape[0], self.edges).scatter(1, drawn, 1)


@ROUTERS.register("drop", version=1, injected=("edges",))
class DropRouter(Router):
    """DGKD: all teachers but some, which are left out by chance, other ones in every step.

    weight_e = 0 for `count` of the edges, drawn anew in every step (or, with `per: sample`, for every sample), else 1:
    the losses of the others are added, not averaged. The authors' code draws once for each step, as the text has it.

    Son, Na, Choi and Hwang, Densely Guided Knowledge Distillation using Multiple Teacher Assistants, ICCV 2021,
    arXiv:2009.08825.
    Shapes: -> (batch, edges), each row with `count` zeros.
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
        drawn = torch.rand((1 if self.per == "step" else rows, self.edges), device=student.device)
        kept = drawn.argsort(dim=1).argsort(dim=1) >= self.count
        return kept.to(at_least_float32(student.detach()).dtype).expand(rows, self.edges)


@ROUTERS.register("given", version=1, operands=("route",), injected=("edges",))
class ExternalRouter(Router):
    """Weights that are there already: those of another term's router, say, for a term on features.

    `route: {type: given, route: "term:kd.route"}`. Detached, unless `gradient` lets whatever made the weights learn
    from this term too.

    Shapes: route (batch, edges) -> the same.
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
    """CA-MKD: a teacher counts more the better it predicts the sample's label.

    weight_e = (1 - softmax_e(CE_1 .. CE_E)) / (E - 1): they sum to 1. As in the authors' code, which divides the loss
    by the number of teachers once more: fold that into the term's weight. Hidden labels (negative): 1 / E.
    The teachers' operands are logits; a term on features takes `given` with this one's route.

    Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, arXiv:2201.00007.
    Shapes: teachers logits (batch, classes) each, label (batch,) -> (batch, edges).
    """

    def __init__(self, edges: int) -> None:
        super().__init__()
        _check_several_edges("confidence", edges)

    def forward(self, teachers: list[Tensor], label: Tensor) -> Tensor:
        costs = torch.stack([cross_entropy_loss(teacher.detach(), label) for teacher in teachers], dim=1)
        return (1 - F.softmax(costs, dim=1)) / (len(teachers) - 1)


@ROUTERS.register("top_k", version=1, operands=("read",), injected=("edges", "shapes"))
class TopKRouter(Router):
    """MST-Distill: a learnt gate picks the k best teachers for each sample.

    gate = softmax(W_2 W_1 read), two linear layers of width 2 * inputs and no non-linearity, as in the authors' code,
    which reads the student's logits: `read: student`. Among the k largest,
        weights gate: gate_e over their sum, so that the distillation loss trains the gate;
        weights equal: 1 / k each, the authors' code: the gate gets no gradient from the distillation loss there, only
            from the load balance term (`load_balance` on `term:NAME.gate`).
    Gradients flow on into what is read, as there.

    Li et al., MST-Distill, ACM MM 2025, arXiv:2507.07015.
    Shapes: read (batch, ...) -> route, gate (batch, edges), each row of sum 1.
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
                "Take k 2 or more, or `weights: equal` with a load_balance term."
            )
        width = 1
        for size in shapes["read"]:
            width *= size
        self.k = k
        self.weights = weights
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, edges))

    def forward(self, read: Tensor) -> dict[str, Tensor]:
        gate = F.softmax(at_least_float32(self.net(read.flatten(1))), dim=1)
        best = gate.detach().topk(self.k, dim=1).indices
        chosen = torch.zeros_like(gate).scatter(1, best, 1)
        route = (
            safe_divide(chosen * gate, (chosen * gate).sum(1, keepdim=True))
            if self.weights == "gate"
            else chosen / self.k
        )
        return {"route": route, "gate": gate}


@ROUTERS.register("policy", version=1, operands=("read",), injected=("edges", "shapes", "num_classes"))
class PolicyRouter(Router):
    """RL-KD: a policy takes or leaves each teacher for each sample, by chance.

    gate_e = sigmoid(w_e . [read, softmax(teacher_e), CE_e] + b_e): what is read of the sample, the teacher's prediction
    and its cross-entropy with the label (0 where hidden). Each teacher is taken with that probability, drawn from
    torch's generator; those taken count alike. Where none is, the sample is not distilled, or, with `none: likeliest`,
    the likeliest teacher is taken: a policy whose reward is minus the distillation loss would else learn to take
    nobody, at no loss. No gradient reaches the gate through the draw: train it by `reinforce` on `term:NAME.gate`.
    Inputs are detached. By the text; no code is released.

    Yuan, Shou, Pei, Lin, Gong, Fu and Jiang, Reinforced Multi-Teacher Selection for Knowledge Distillation, AAAI 2021,
    arXiv:2012.06048.
    Shapes: read (batch, ...), teachers logits (batch, classes) each, label (batch,) -> route, gate (batch, edges).
    """

    def __init__(
        self, edges: int, shapes: dict[str, Any], num_classes: int, none: Literal["nobody", "likeliest"] = "nobody"
    ) -> None:
        super().__init__()
        _check_several_edges("policy", edges)
        self.none = none
        width = num_classes + 1
        read = 1
        for size in shapes["read"]:
            read *= size
        self.agents = nn.ModuleList([nn.Linear(read + width, 1) for _ in range(edges)])

    def forward(self, read: Tensor, teachers: list[Tensor], label: Tensor) -> dict[str, Tensor]:
        seen = at_least_float32(read.detach()).flatten(1)
        found = []
        for agent, teacher in zip(self.agents, teachers, strict=True):
            logits = at_least_float32(teacher.detach())
            cost = cross_entropy_loss(logits, label).unsqueeze(1)
            found.append(agent(torch.cat([seen, F.softmax(logits, dim=1), cost], dim=1)))
        gate = torch.sigmoid(at_least_float32(torch.cat(found, dim=1)))
        taken = torch.bernoulli(gate.detach())
        if self.none == "likeliest":
            likeliest = torch.zeros_like(taken).scatter(1, gate.detach().argmax(1, keepdim=True), 1)
            taken = torch.where(taken.sum(1, keepdim=True) > 0, taken, likeliest)
        return {"route": safe_divide(taken, taken.sum(1, keepdim=True)), "gate": gate}
