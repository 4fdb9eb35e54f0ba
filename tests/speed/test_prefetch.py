"""Prefetched and cached frozen roles give a step the same rows as inline ones; roles that cannot are detected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.frozen_teacher import (
    BATCH_TERMS,
    DATA,
    FEATURES,
    SECOND_TEACHER,
    TWO_TEACHERS_TERM,
    TWO_VIEWS,
    close,
    recipe_text,
)
from helpers.plugin_parts import CALLS
from helpers.recipes import (  # noqa: F401
    StageHarness,
    build_stage,
    equal_weights,
    plugin_registration,
    recipe_from_text,
    stage_plan,
    step_on_fake_tensors,
)
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.network.features import Feature
from kdbench.engine.train import steps as steps_module
from kdbench.engine.train.loop import Feed
from kdbench.speed.teacher_cache import prefetch as prefetch_module
from kdbench.speed.teacher_cache.frozen_forward import (
    FrozenForwardPlan,
    describe_frozen_roles,
    plan_frozen_forward,
    requested_mode,
)
from kdbench.speed.teacher_cache.prefetch import Prefetcher, equal_up_to_rounding, prefetch_obstacles

CASES = {
    "plain": "",
    "accumulated": "accumulate: 3\n",
    "number of steps": "epochs: null\nsteps: 11\n",
    "one role, two views": "models: {again: {reuse: teacher, input: strong}}\n"
    + TWO_VIEWS
    + TWO_TEACHERS_TERM.replace("second", "again"),
    "two teachers": SECOND_TEACHER + TWO_VIEWS + TWO_TEACHERS_TERM,
    "features": FEATURES,
    "batch terms": BATCH_TERMS,
    "repeated update": "models: {peer: {model: t_layers}}\n"
    "terms: {ce: cross_entropy, kd: kd, dml: {type: kd, student: peer, teacher: teacher}}\n"
    "updates: [{models: [student], terms: [ce, kd], repeat: 2}, {models: [peer], terms: [dml]}]\n",
    "selected rows": "updates: [{models: [student], terms: [ce, kd], "
    "select: {type: learnability, keep: 4, reference: teacher, student: student}}]\n",
    "validation split": "validation: 0.25\n",
}
MIXUP = "augment: [{type: crop, padding: 1}, mixup]\n"
TWO_SOURCES = (
    "data: {other: {dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 21}, batch_size: 4}}\n"
    "models: {second: {model: t_layers, frozen: true, input: other.image}, "
    "shown: {reuse: student, input: other.image}}\n"
    "terms: {kd: kd, more: {type: kd, student: shown, teacher: second}}\n"
)
UPSTREAM = (
    "models: {head: {model: {type: t_layers, hidden: 9}, frozen: true, input: 'teacher:conv1'}, "
    "twin: {reuse: teacher, input: image}}\n"
    "terms: {kd: kd, more: {type: kd, teacher: head}, third: {type: kd, teacher: twin}}\n"
)


def build_with_mode(
    extra: str, mode: str, *overrides: str, exact: bool = True
) -> tuple[StageHarness, FrozenForwardPlan]:
    """Builds a stage whose frozen roles run in the given mode."""
    data = "" if extra.startswith("dataset:") else DATA
    recipe = recipe_from_text(recipe_text(extra, exact=exact), f"frozen_forward={mode}", *overrides, data=data)
    harness = build_stage(recipe)
    plan = plan_frozen_forward(harness.feed, harness.runner, harness.recipe, Path("caches"))
    harness.feed = plan.feed  # type: ignore[assignment]
    return harness, plan


def train(harness: StageHarness, steps: int | None = None) -> dict[str, Tensor]:
    """Trains some steps, or the full stage; returns all weights, the terms' state and the meters."""
    harness.step(harness.runner.progress.total_steps if steps is None else steps)
    weights = {f"{name}.{key}": value for name in harness.network.roles for key, value in harness.weights(name).items()}
    terms = {f"terms.{key}": value.clone() for key, value in harness.network.terms.state_dict().items()}
    return weights | terms | {"meters": harness.runner.meters.sums.clone()}


@pytest.mark.parametrize("mode", ["prefetch", "cache"])
@pytest.mark.parametrize("case", CASES)
def test_result_of_a_stage_equals_the_inline_run(case, mode):
    """Equal bits if all features of frozen roles come from convolutions, which compute image by image."""
    expected = train(build_with_mode(CASES[case], "inline")[0])
    harness, plan = build_with_mode(CASES[case], mode)
    result = train(harness)
    assert close(result, expected) and (case != "features" or equal_weights(result, expected))
    assert set(plan.modes.values()) == {mode}


@pytest.mark.parametrize(
    ("extra", "reason"), [(MIXUP, "mixup blends"), (TWO_SOURCES, ""), (UPSTREAM, "output of another role")]
)
def test_roles_without_a_cache_are_prefetched_to_the_same_result(extra, reason):
    expected = train(build_with_mode(extra, "inline")[0])
    assert close(train(build_with_mode(extra, "prefetch")[0]), expected)
    harness, plan = build_with_mode(extra, "cache")
    assert close(train(harness), expected)
    if reason:
        assert "prefetch" in plan.modes.values() and reason in plan.describe()


def test_float32_results_differ_by_rounding_only():
    extra = FEATURES + SECOND_TEACHER + TWO_VIEWS
    expected = train(build_with_mode(extra, "inline", exact=False)[0])
    for mode in ("prefetch", "cache"):
        result = train(build_with_mode(extra, mode, exact=False)[0])
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-4, atol=1e-5)


def record_batch_sizes(harness: StageHarness, name: str = "teacher") -> list[int]:
    """Returns a list that grows by the number of rows of each call of a role."""
    batch_sizes: list[int] = []
    harness.model(name).register_forward_pre_hook(lambda module, inputs: batch_sizes.append(len(inputs[0])))
    return batch_sizes


def test_prefetched_role_runs_once_for_several_steps_with_one_shape():
    harness, _ = build_with_mode("", "prefetch", "epochs=3")
    batch_sizes = record_batch_sizes(harness)
    train(harness)
    assert harness.runner.progress.total_steps == 24
    assert batch_sizes == [32, 8, *[32] * 6], "first block, the subset to compare, then 4 steps at once"
    inline, _ = build_with_mode("", "inline", "epochs=3")
    batch_sizes = record_batch_sizes(inline)
    train(inline)
    assert batch_sizes == [8, 8, 8, 8, 8, 8, 8, 5] * 3


def test_largest_source_determines_the_number_of_steps_in_a_block():
    harness, _ = build_with_mode(TWO_SOURCES, "prefetch", "accumulate=2")
    assert isinstance(harness.feed, Prefetcher)
    assert (harness.feed.steps_per_block, harness.feed.rows_per_block) == (2, {"train": 32, "other": 16})


@pytest.mark.parametrize("mode", ["inline", "prefetch", "cache"])
def test_frozen_network_stops_after_the_last_feature(mode):
    extra = (
        "teacher: {model: {type: t_layers, label: frozen}}\n"
        "terms: {ce: cross_entropy, hint: {type: hint, student: {path: fc, adapter: linear}, teacher: layer2}}\n"
    )
    harness, plan = build_with_mode(extra, mode)
    CALLS.clear()
    train(harness)
    assert plan.modes == {"teacher": mode}
    assert set(CALLS) == {"frozen.layer1", "frozen.layer2"}, "layer3 never runs"


@pytest.mark.parametrize("steps", [3, 11, 12])
def test_batches_after_the_last_step_are_not_read(monkeypatch, steps):
    steps_read: list[int] = []
    original = Feed.windows

    def windows(self: Feed, step: int) -> Iterator[list[MicroBatch]]:
        for number, window in enumerate(original(self, step), step):
            steps_read.append(number)
            yield window

    monkeypatch.setattr(Feed, "windows", windows)
    harness, _ = build_with_mode("epochs: null\n", "prefetch", f"steps={steps}")
    assert len(list(harness.windows())) == steps
    assert steps_read == list(range(steps))


def teacher_batches(harness: StageHarness, step: int) -> list[Tensor]:
    """Returns the batches that the teacher runs on from a step on, without the check of the first block."""
    batches: list[Tensor] = []
    assert isinstance(harness.feed, Prefetcher)
    harness.feed.rows_checked = True
    harness.model("teacher").register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].clone()))
    harness.runner.progress.steps_done = step
    list(harness.windows())
    return batches


def test_run_resumed_inside_a_block_computes_the_same_blocks():
    uninterrupted = teacher_batches(build_with_mode("", "prefetch")[0], 0)
    resumed = teacher_batches(build_with_mode("", "prefetch")[0], 6)  # the third step of the second block
    assert len(uninterrupted) == 4 and len(resumed) == 3
    assert all(torch.equal(first, second) for first, second in zip(uninterrupted[1:], resumed, strict=True))


def test_windows_from_a_step_on_equal_the_end_of_all_windows():
    all_windows = list(build_with_mode(FEATURES, "prefetch")[0].windows())
    harness = build_with_mode(FEATURES, "prefetch")[0]
    harness.runner.progress.steps_done = 6
    windows = list(harness.windows())
    assert len(windows) == len(all_windows) - 6
    for (expected,), (batches,) in zip(all_windows[6:], windows, strict=True):
        precomputed = batches["train"].precomputed
        assert {("teacher", Feature("conv1")), ("teacher", Feature("conv2", 1, "in"))} == set(precomputed)
        assert equal_weights(batches["train"].fields, expected["train"].fields)
        assert all(torch.equal(value, expected["train"].precomputed[key]) for key, value in precomputed.items())


def test_blocks_relative_to_the_resumed_step_would_differ(monkeypatch):
    """Negative control of the two tests above: blocks must not depend on the first step of a session."""
    original = Prefetcher.windows

    def windows(self: Prefetcher, step: int) -> Iterator[list[MicroBatch]]:
        feed = self.feed
        self.feed = type("Shifted", (), {"windows": lambda _, first: feed.windows(first + step)})()  # type: ignore[assignment]
        return original(self, 0)

    uninterrupted = teacher_batches(build_with_mode("", "prefetch")[0], 0)
    monkeypatch.setattr(Prefetcher, "windows", windows)
    resumed = teacher_batches(build_with_mode("", "prefetch")[0], 6)
    assert not any(torch.equal(first, second) for first, second in zip(uninterrupted[1:], resumed[:3], strict=True))


def test_step_reads_no_value_on_the_host():
    for mode in ("prefetch", "cache"):
        step_on_fake_tensors(build_with_mode(FEATURES, mode)[0], steps=5)


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_only_the_first_block_reads_values_on_the_host():
    harness, _ = build_with_mode(FEATURES, "prefetch")
    windows = harness.windows()
    with HostReads() as first_block:
        next(windows)
    with HostReads() as later_blocks:
        assert len(list(windows)) == harness.runner.progress.total_steps - 1
    assert first_block.counts and not later_blocks.counts


def test_step_with_precomputed_features_compiles_without_a_graph_break(monkeypatch):
    def compile_eagerly(network: Any, **options: Any) -> Any:
        return torch.compile(network, backend="aot_eager", **options)

    monkeypatch.setattr(steps_module, "compile_network", compile_eagerly)
    for mode in ("prefetch", "cache"):
        harness, _ = build_with_mode("", mode, "compile=true")
        result = train(harness, 9)
        assert harness.runner.eager.compiled
        for key, value in train(build_with_mode("", "inline")[0], 9).items():
            torch.testing.assert_close(result[key], value, rtol=1e-9, atol=1e-9)


REJECTED = {
    "teacher: {model: t_mixes_rows}\n": "other rows",
    "teacher: {model: t_draws}\n": "random numbers",
    "teacher: {model: t_layers, input: 'student:conv1'}\n": "it reads the output of role 'student', which changes",
    "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 64}\n"
    "data: {noise: {type: gaussian, shape: [6], batch_size: 8}}\n"
    "teacher: {model: t_two, input: [image, noise.z]}\n": "combines rows of the sources noise and train",
}


@pytest.mark.parametrize("mode", ["prefetch", "cache"])
@pytest.mark.parametrize("extra", REJECTED)
def test_role_whose_rows_depend_on_more_than_its_image_runs_inline_with_a_reason(extra, mode):
    harness, plan = build_with_mode(extra, mode)
    result = train(harness)
    assert plan.modes == {"teacher": "inline"}
    assert REJECTED[extra] in plan.reasons["teacher"] and REJECTED[extra] in plan.describe()
    assert equal_weights(result, train(build_with_mode(extra, "inline")[0]))


def test_without_the_check_a_network_that_mixes_rows_would_give_another_result(monkeypatch):
    """Negative control of the check."""
    extra = next(iter(REJECTED))
    expected = train(build_with_mode(extra, "inline")[0])
    monkeypatch.setattr(prefetch_module, "find_coupled_roles", lambda *args: {})
    harness, plan = build_with_mode(extra, "prefetch")
    assert not close(train(harness), expected) and plan.modes == {"teacher": "prefetch"}


def test_head_on_a_rejected_network_runs_inline_too():
    extra = (
        "teacher: {model: t_draws}\n"
        "models: {head: {model: linear_head, frozen: true, input: 'teacher:fc'}}\n"
        "terms: {kd: kd, more: {type: kd, teacher: head}}\n"
    )
    harness, plan = build_with_mode(extra, "prefetch")
    assert equal_weights(train(harness), train(build_with_mode(extra, "inline")[0]))
    assert plan.modes == {"teacher": "inline", "head": "inline"}
    assert "random numbers" in plan.reasons["teacher"] and plan.reasons["head"]


def test_role_with_a_feature_of_more_rows_than_samples_runs_inline():
    extra = (
        "teacher: {model: t_doubles_rows}\nterms: {kd: kd, hint: {type: t_coupled, student: fc, teacher: doubled}}\n"
    )
    harness, plan = build_with_mode(extra, "prefetch")
    assert equal_weights(train(harness), train(build_with_mode(extra, "inline")[0]))
    assert plan.modes == {"teacher": "inline"}
    assert "doubled of teacher does not have one row for each sample" in plan.reasons["teacher"]


def test_only_frozen_roles_are_candidates():
    extra = "models: {shadow: {ema: student}, old: {snapshot: student}}\n"
    plan = stage_plan(
        recipe_from_text(recipe_text(extra + TWO_TEACHERS_TERM.replace("second", "shadow, old")), data=DATA)
    )
    assert prefetch_obstacles(plan) == {"teacher": ""}


def test_rows_are_compared_up_to_rounding():
    values = torch.randn(4, 5, dtype=torch.float64)
    single = values.float()
    integers = torch.zeros(3, dtype=torch.int64)
    assert equal_up_to_rounding(values * (1 + 1e-12), values) and not equal_up_to_rounding(values * (1 + 1e-7), values)
    assert equal_up_to_rounding(single * (1 + 1e-5), single) and not equal_up_to_rounding(single * 1.01, single)
    assert not equal_up_to_rounding(values[:3], values)
    assert not equal_up_to_rounding(torch.full_like(values, torch.nan), values)
    assert equal_up_to_rounding(integers, integers.clone())
    assert not equal_up_to_rounding(integers, torch.tensor([0, 0, 1]))


def test_role_runs_inline_if_a_block_would_be_a_single_step():
    harness, plan = build_with_mode("", "prefetch", "frozen_batch_size=15")
    assert plan.modes == {"teacher": "inline"} and isinstance(harness.feed, Feed)
    assert "more rows than frozen_batch_size, which is 15" in plan.reasons["teacher"]


def test_auto_is_inline_on_the_cpu_and_prefetch_on_a_gpu():
    recipe = recipe_from_text(recipe_text(), data=DATA)
    assert requested_mode(recipe, torch.device("cpu"))[0] == "inline"
    assert requested_mode(recipe, torch.device("cuda"))[0] == "prefetch"
    harness, plan = build_with_mode("", "auto")
    assert plan.modes == {"teacher": "inline"} and not plan.describe() and isinstance(harness.feed, Feed)


def describe(extra: str) -> str:
    """Returns the sentences of `kdbench check` about frozen roles."""
    return " ".join(describe_frozen_roles(stage_plan(recipe_from_text(recipe_text(extra), data=DATA))))


def test_check_describes_prefetching_and_the_size_of_the_cache():
    text = describe(SECOND_TEACHER + TWO_VIEWS + TWO_TEACHERS_TERM)
    prefetched = "is frozen, so its outputs can be prefetched; "
    assert f"role 'teacher' {prefetched}a cache of them has 61 samples x 18 augmented variants, 35.1 kB." in text
    assert f"role 'second' {prefetched}a cache of them has 61 samples x 100 augmented variants" in text
    assert f"role 'teacher' {prefetched}they cannot be cached: mixup blends samples." in describe(MIXUP)
    text = describe("teacher: {model: t_layers, input: 'student:conv1'}\n")
    inside = (
        "role 'teacher' is frozen, but must run inside the step: it reads the output of role 'student', "
        "which changes during"
    )
    assert inside in text
