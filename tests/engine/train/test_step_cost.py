"""What a step costs: tensor operations, host reads and graph breaks of the plain recipes, which no wiring may raise."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.recipes import StageHarness, build_stage, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.engine.network.operands import operand_feature

MORE_THAN_BARE = {"digits/kd": 45, "cifar100/kd": 35}
"""Operations beyond those of a hand-written loop over the same networks: reduction by valid samples, the weighted sum,
meters of every term and of what is not finite, and the log line's gradient norm. Routers, weighers and operands of
other kinds add none where there are none."""


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher: every kernel, and every read of a value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def reads(self) -> int:
        return self.counts["aten._local_scalar_dense.default"]


def operations(work: Callable[[], None]) -> Operations:
    with Operations() as counted:
        work()
    return counted


def one_step(run: StageHarness) -> Callable[[], None]:
    """The second step: the first one makes the optimiser's state."""
    run.step(1)
    window = next(itertools.islice(run.windows(), 1))

    def work() -> None:
        run.runner.begin_step()
        run.runner.step(window)

    return work


def bare_step(run: StageHarness) -> Callable[[], None]:
    """The same networks, losses and optimiser as a person would write them down."""
    student, teacher = run.network.role("student").model, run.network.role("teacher").model
    terms = run.plan.stage.terms
    optimizer = run.runner.updates[0].optimizer
    temperature = terms["kd"].params["temperature"]
    batch = next(itertools.islice(run.windows(), 1))[0]["train"]

    def work() -> None:
        with torch.no_grad():
            target = F.log_softmax(teacher(batch.fields["image"]) / temperature, dim=1)
        logits = student(batch.fields["image"])
        loss = terms["ce"].weight * F.cross_entropy(logits, batch.fields["label"])
        soft = F.log_softmax(logits / temperature, dim=1)
        kl = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (loss + terms["kd"].weight * temperature**2 * kl).backward()
        optimizer.step()

    return work


@pytest.mark.parametrize("name", MORE_THAN_BARE)
def test_the_plain_step_costs_what_it_did(name):
    run = build_stage(with_synthetic_data(load_recipe(name, [])))
    ours, bare = operations(one_step(run)), operations(bare_step(run))
    assert ours.reads == bare.reads == 0
    assert 0 < ours.total - bare.total <= MORE_THAN_BARE[name]


def test_more_work_would_be_noticed():
    run = build_stage(with_synthetic_data(load_recipe("digits/kd", ["terms.kd.sample_weight={type: focal}"])))
    assert operations(one_step(run)).total - operations(bare_step(run)).total > MORE_THAN_BARE["digits/kd"]


def test_a_read_would_be_noticed():
    run = build_stage(with_synthetic_data(load_recipe("digits/kd", [])))
    work = one_step(run)

    def reading() -> None:
        work()
        float(run.network.term("kd").edges[0].student.operand.role == "student" and run.runner.meters.sums.sum())

    assert operations(reading).reads == 1


def test_what_a_plain_term_reads_is_looked_up_and_nothing_else():
    run = build_stage(with_synthetic_data(load_recipe("digits/kd", [])))
    edge = run.network.term("kd").edges[0]
    value = torch.randn(2, 10)
    key = (edge.student.operand.role, operand_feature(edge.student.operand))
    counted = operations(lambda: edge.student({key: value}, {}))
    assert counted.total == 0
