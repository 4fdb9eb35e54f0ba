"""Cost of a step in operations and host reads: what a recipe does not use adds no operation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.recipes import StageHarness, build_stage, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.network.operands import operand_feature

OVERHEAD = {"digits/kd": 45, "cifar100/kd": 35}
"""Upper bounds of the operations beyond those of a hand-written loop over the same networks: the reduction over valid
samples, the weighted sum, the meters of every term with their check for finite values, and the logged gradient norm.
Routers, sample weights and further kinds of operands add none where a recipe has none."""


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher: every kernel, and every read of a value on the host."""

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
    def host_reads(self) -> int:
        return self.counts["aten._local_scalar_dense.default"]


def count_operations(work: Callable[[], None]) -> Operations:
    with Operations() as operations:
        work()
    return operations


def next_step(stage: StageHarness) -> Callable[[], None]:
    """Returns the next step of a stage as a function."""
    window = next(itertools.islice(stage.windows(), 1))

    def work() -> None:
        stage.runner.begin_step()
        stage.runner.step(window)

    return work


def second_step(stage: StageHarness) -> Callable[[], None]:
    """Returns the second step; the first one creates the optimizer's state."""
    return next_step(stage.step(1))


def hand_written_step(stage: StageHarness) -> Callable[[], None]:
    """Returns a step of the same networks, losses and optimizer without the framework."""
    student, teacher = stage.network.role("student").model, stage.network.role("teacher").model
    terms = stage.plan.stage.terms
    optimizer = stage.runner.updates[0].optimizer
    temperature = terms["kd"].params["temperature"]
    batch = next(itertools.islice(stage.windows(), 1))[0]["train"]

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


@pytest.mark.parametrize("name", OVERHEAD)
def test_plain_step_has_a_bounded_number_of_operations_beyond_a_hand_written_one(name):
    stage = build_stage(with_synthetic_data(load_recipe(name, [])))
    operations, bare = count_operations(second_step(stage)), count_operations(hand_written_step(stage))
    assert operations.host_reads == bare.host_reads == 0
    assert 0 < operations.total - bare.total <= OVERHEAD[name]


def test_sample_weights_exceed_the_bound_of_the_plain_step():
    """Negative control of the test above."""
    stage = build_stage(with_synthetic_data(load_recipe("digits/kd", ["terms.kd.sample_weight={type: focal}"])))
    additional = count_operations(second_step(stage)).total - count_operations(hand_written_step(stage)).total
    assert additional > OVERHEAD["digits/kd"]


def test_host_read_is_counted():
    stage = build_stage(with_synthetic_data(load_recipe("digits/kd", [])))
    step = second_step(stage)

    def step_with_read() -> None:
        step()
        float(stage.runner.meters.sums.sum())

    assert count_operations(step_with_read).host_reads == 1


def test_operand_without_adapter_is_read_without_an_operation():
    stage = build_stage(with_synthetic_data(load_recipe("digits/kd", [])))
    reader = stage.network.term("kd").edges[0].student
    value, key = torch.randn(2, 10), (reader.operand.role, operand_feature(reader.operand))
    assert count_operations(lambda: reader({key: value}, {})).total == 0
    detached = count_operations(lambda: reader({key: value}, {}, True))
    assert detached.total == detached.counts["aten.detach.default"] == 1  # control


PLAIN = """
student: t_layers
teacher: {model: {type: t_layers, hidden: 9}}
terms:
  ce: cross_entropy
  kd: {type: kd, temperature: 2}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
log_every: 1000
epochs: 30
batch_size: 16
"""
UNUSED_WIRING = {
    "term": ("", "{type: logit_mse, weight: W}"),
    "adapter": ("", "{type: hint, student: {path: layer1, adapter: mlp}, teacher: layer1, weight: W}"),
    "sample weight": ("", "{type: kd, sample_weight: {type: focal}, weight: W}"),
    "several teachers": ("second", "{type: kd, teacher: [teacher, second], weight: W}"),
    "router": ("second", "{type: kd, teacher: [teacher, second], route: confidence, weight: W}"),
    "operand of another term": ("", "{type: kd, sample_weight: {type: learnt, by: gate}, weight: W}"),
    "role": ("second", "{type: kd, teacher: second, weight: W}"),
}
"""What a recipe declares without using it: a role, and a term of weight W."""


def stage_with(role: str, term: str, weight: str) -> StageHarness:
    roles = "models: {gate: {model: {type: t_linear, num_classes: 1}}"
    roles += f", {role}: {{model: t_layers, frozen: true}}" if role else ""
    text = PLAIN.replace("terms:\n", f"{roles}}}\nterms:\n  further: {term.replace('W', weight)}\n")
    return build_stage(text)


@pytest.mark.parametrize(("role", "term"), UNUSED_WIRING.values(), ids=UNUSED_WIRING)
def test_term_of_constant_weight_zero_and_its_wiring_add_no_operation(role, term):
    plain = count_operations(second_step(build_stage(PLAIN)))
    unused = count_operations(second_step(stage_with(role, term, "0")))
    assert unused.counts == plain.counts
    used = count_operations(second_step(stage_with(role, term, "1.0e-9")))  # negative control
    assert used.total > plain.total


FEATURES = """
student: t_layers
teacher: t_layers
terms: {near: {type: feature_distance, student: STUDENT, teacher: layer2}}
optimizer: {type: SGD, lr: 0.1}
log_every: 1000
epochs: 30
batch_size: 16
"""


def test_identity_adapter_adds_no_operation():
    operands = ("layer2", "{path: layer2, adapter: identity}", "{path: layer2, adapter: linear}")
    texts = [FEATURES.replace("STUDENT", operand) for operand in operands]
    plain, identity, linear = (count_operations(second_step(build_stage(text))) for text in texts)
    assert identity.counts == plain.counts
    assert linear.counts["aten.addmm.default"] == plain.counts["aten.addmm.default"] + 1  # negative control


def operations_by_section(stage: StageHarness) -> dict[str, Operations]:
    """Takes the second step and counts its operations in each section of the timer."""
    step = second_step(stage)
    operations = Operations()
    sections: dict[str, Operations] = {}

    def end_section(name: str) -> None:
        section = sections.setdefault(name, Operations())
        section.counts += operations.counts
        operations.counts.clear()

    with operations, stage.runner.timer.forwarded_to(end_section):
        step()
    return sections


TEACHERS = {
    "frozen": "{model: {type: t_layers, hidden: 9}}",
    "deeper": "{model: {type: t_conv, norm: batch}}",
    "trainable": "{model: {type: t_layers, hidden: 9}, trainable: true}",
}


def stage_with_teacher(kind: str, teacher_grad: bool = False) -> StageHarness:
    text = PLAIN.replace(TEACHERS["frozen"], TEACHERS[kind])
    return build_stage(text.replace("temperature: 2", "temperature: 2, teacher_grad: true") if teacher_grad else text)


def precompute_teacher(stage: StageHarness) -> StageHarness:
    """Adds the teacher's features to all batches of a stage, so that its steps do not run the teacher."""
    windows = stage.feed.windows

    def windows_with_features(step: int) -> Iterator[list[MicroBatch]]:
        for [batches] in windows(step):
            features = stage.network.run_frozen(batches, ["teacher"])
            yield [{**batches, "train": batches["train"].with_precomputed(features)}]

    stage.feed.windows = windows_with_features  # type: ignore[method-assign]
    return stage


def test_frozen_role_adds_no_backward_operation():
    small, deep = (operations_by_section(stage_with_teacher(kind)) for kind in ("frozen", "deeper"))
    absent = operations_by_section(precompute_teacher(stage_with_teacher("frozen")))
    assert small["teacher"].counts != deep["teacher"].counts and "teacher" not in absent
    assert small["backward"].counts == deep["backward"].counts == absent["backward"].counts
    assert small["terms"].counts == deep["terms"].counts == absent["terms"].counts
    trained = operations_by_section(stage_with_teacher("trainable", teacher_grad=True))  # negative control
    assert trained["backward"].total > small["backward"].total


def test_frozen_role_adds_its_forward_to_the_step_and_nothing_else():
    stage = stage_with_teacher("deeper")
    image = next(stage.windows())[0]["train"].fields["image"]
    with torch.no_grad():
        forward = count_operations(lambda: stage.model("teacher")(image))
    present = count_operations(second_step(stage))
    absent = count_operations(second_step(precompute_teacher(stage_with_teacher("deeper"))))
    assert present.counts - absent.counts == forward.counts and not absent.counts - present.counts
    recorded = count_operations(lambda: stage.model("teacher").train()(image))  # negative control: training mode
    assert recorded.counts != forward.counts


RECIPES = ("digits/kd", "digits/fitnets", "digits/ca_mkd", "digits/dfad", "digits/tgeo_kd", "digits/acid")


def build_small(name: str) -> StageHarness:
    return build_stage(with_synthetic_data(load_recipe(name, ["log_every=1000"]), samples=960, batch_size=4))


@pytest.mark.parametrize("name", RECIPES)
def test_equal_steps_have_equal_operations(name):
    stage = build_small(name)
    stage.step(1)
    counts = [count_operations(next_step(stage)).counts for _ in range(3)]
    assert counts[0] == counts[1] == counts[2] and counts[0].total() > 50


def test_step_whose_work_grows_has_more_operations_each_time():
    """Negative control of the test above: a term that keeps every loss and adds all of them."""
    stage = build_small("digits/kd")
    term = stage.network.term("kd").edges[0].term
    forward, losses = term.forward, []

    def growing(**operands: Any) -> torch.Tensor:
        losses.append(forward(**operands))
        return torch.stack([losses[-1], *(loss.detach() for loss in losses[:-1])]).mean(0)

    term.forward = growing
    stage.step(1)
    first, second = (count_operations(next_step(stage)).total for _ in range(2))
    assert second > first


def test_logging_step_adds_the_gradient_norm_without_a_host_read():
    stage = build_stage(PLAIN.replace("log_every: 1000", "log_every: 3")).step(1)
    silent, logging = (count_operations(next_step(stage)) for _ in range(2))
    assert stage.runner.progress.logs_after(3) and not stage.runner.progress.logs_after(2)
    additional = logging.counts - silent.counts
    assert not silent.counts - logging.counts and logging.host_reads == 0
    assert additional and all("norm" in name or name == "aten.stack.default" for name in additional)
