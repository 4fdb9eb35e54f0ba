"""Cases of `kdbench.terms.routing`."""

from __future__ import annotations

import math

from helpers.cases.base import Mistake, TermCase, replaced, with_params
from helpers.cases.loops import kl_divergence


def load_balance(student, kind="kl"):
    experts = len(student[0])
    mean = [sum(row[k] for row in student) / len(student) for k in range(experts)]
    if kind == "kl":
        return kl_divergence([1 / experts] * experts, mean)
    center = sum(mean) / experts
    return math.sqrt(sum((m - center) ** 2 for m in mean) / (experts - 1)) / center


LOAD_BALANCE = TermCase(
    "load_balance",
    load_balance,
    teacher=None,
    student_is_distribution=True,
    controls={"cv": with_params(kind="cv")},
    variants={"cv": {"params": {"kind": "cv"}, "controls": {"kl": with_params(kind="kl")}}},
    mistakes=[
        Mistake("at least 2 classes", shapes={"student": (8, 1)}),
        Mistake("kind must be one of kl, cv", {"kind": "gini"}),
    ],
    benchmark={"student": "gate"},
    recipe_operands="student: 'term:routed.route'",
)


def reinforce(student, action, reward, of="loss", reward_baseline=0.0):
    losses = []
    for gate, actions, value in zip(student, action, reward, strict=True):
        selection = [a > 0 for a in actions]
        if isinstance(value, list):
            values = [v for v, is_chosen in zip(value, selection, strict=True) if is_chosen]
            value = sum(values) / len(values) if values else 0.0
        log_pi = sum(math.log(p if is_chosen else 1 - p) for p, is_chosen in zip(gate, selection, strict=True))
        losses.append(-(value if of == "reward" else -value) * log_pi)
    return losses


REINFORCE = TermCase(
    "reinforce",
    reinforce,
    {"reward_baseline": 0.0},
    student=(3,),
    teacher=None,
    row_operands={"action": (3,), "reward": (3,)},
    student_is_distribution=True,
    class_symmetric=False,
    controls={
        "reward": with_params(of="reward"),
        "baseline": with_params(reward_baseline=0.9),
        "opposite actions": replaced(action=lambda action: -action),
    },
    variants={
        "reward": {
            "params": {"of": "reward", "reward_baseline": 0.0},
            "row_operands": {"action": (3,), "reward": ()},
            "controls": {"loss": with_params(of="loss")},
        }
    },
    mistakes=[
        Mistake("compares a gate", shapes={"student": (2, 3), "action": (2, 2), "reward": (2,)}),
        Mistake(r"reinforce: reward_baseline must be in \[0, 1\]", {"reward_baseline": 1.5}),
    ],
    benchmark={"student": "gate", "action": "gate", "reward": "rows"},
    recipe_operands="student: 'term:routed.gate', action: 'term:routed.route', reward: 'term:routed.loss'",
)
