"""Step strategies: the eager step with gradients from elsewhere, and other strategies that a runner uses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.testing import assert_close

from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.data.loading.batch import Window
from kdbench.engine.train.steps import StepStrategy
from kdbench.engine.train.updates import Update

TWO_UPDATES = """
models: {a: {model: t_layers}, b: {model: {type: t_layers, hidden: 9}}, shadow: {ema: a, decay: 0.8}}
export: a
terms:
  ce: {type: cross_entropy, student: a}
  cf: {type: cross_entropy, student: b}
  follow: {type: kd, student: b, teacher: a}
updates:
  - {models: [a], terms: [ce], repeat: 2}
  - {models: [b], terms: [cf, follow]}
optimizer: {type: SGD, lr: 0.2, momentum: 0.9}
ema: 0.9
precision: float64
log_every: 3
epochs: 3
batch_size: 16
"""


class CountingStep:
    """Counts steps and micro-batches, and delegates to another strategy."""

    def __init__(self, strategy: StepStrategy) -> None:
        self.strategy = strategy
        self.window_sizes: list[int] = []

    def run(self, window: Window) -> None:
        self.window_sizes.append(len(window))
        self.strategy.run(window)


class EmptyStep:
    """Computes nothing."""

    def run(self, window: Window) -> None:
        pass


def all_weights(stage: StageHarness) -> dict[str, torch.Tensor]:
    """Copies the state of the network and of the moving average."""
    state = {name: value.clone() for name, value in stage.network.state_dict().items()}
    assert stage.runner.average is not None
    return state | {f"average.{name}": value.clone() for name, value in stage.runner.average.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_strategy_that_delegates_leaves_equal_weights_and_logs(accumulate):
    text = TWO_UPDATES + f"accumulate: {accumulate}\n"
    eager, delegating = build_stage(text), build_stage(text)
    assert eager.runner.strategy is eager.runner.eager
    strategy = CountingStep(delegating.runner.eager)
    delegating.runner.use(strategy)
    eager.step(5)
    delegating.step(5)
    assert delegating.runner.strategy is strategy and strategy.window_sizes == [accumulate] * 5
    assert equal_weights(all_weights(eager), all_weights(delegating))
    assert delegating.runner.progress.steps_done == 5
    assert eager.runner.read_log() == delegating.runner.read_log()


def test_runner_counts_steps_for_every_strategy_and_computes_nothing_itself():
    """Negative control of the test above: the strategy does all of the device work."""
    stage = build_stage(TWO_UPDATES)
    before = all_weights(stage)
    stage.runner.use(EmptyStep())
    stage.step(3)
    assert equal_weights(before, all_weights(stage))
    assert stage.runner.progress.steps_done == stage.runner.meters.steps == 3


def test_strategy_takes_effect_from_the_next_step_on_and_can_be_replaced():
    stage, control = build_stage(TWO_UPDATES), build_stage(TWO_UPDATES)
    strategy = CountingStep(stage.runner.eager)
    stage.step(1)
    stage.runner.use(strategy)
    stage.step(2)
    stage.runner.use(stage.runner.eager)
    stage.step(1)
    assert len(strategy.window_sizes) == 2
    assert equal_weights(all_weights(stage), all_weights(control.step(4)))


def test_eager_step_uses_given_gradients_in_place_of_its_own():
    stage = build_stage(TWO_UPDATES.replace(", momentum: 0.9", ""))
    calls: list[tuple[Update, int]] = []

    def constant_gradients(update: Update, window: Window) -> None:
        calls.append((update, len(window)))
        for parameter in update.parameters:
            parameter.grad = torch.full_like(parameter, 0.5)

    before = {name: stage.weights(name) for name in ("a", "b")}
    window = next(stage.windows())
    stage.runner.begin_step()
    stage.runner.eager.run(window, constant_gradients)
    first, second = stage.runner.updates
    assert calls == [(first, 1), (first, 1), (second, 1)]  # in order; the first update repeats
    for name, count in (("a", 2), ("b", 1)):
        for key, value in stage.weights(name).items():
            assert_close(value, before[name][key] - count * 0.2 * 0.5, rtol=1e-12, atol=0)
    # The eager step still moves averages and counts the step; the given gradients add no loss.
    shadow = {key: 0.8 * value + 0.2 * stage.weights("a")[key] for key, value in before["a"].items()}
    for key, value in stage.weights("shadow").items():
        assert_close(value, shadow[key], rtol=1e-12, atol=1e-14)
    assert int(stage.runner.meters.step_counter) == 1 and not stage.runner.meters.sums.any()


def test_eager_step_with_its_own_gradients_passed_explicitly_is_unchanged():
    implicit, explicit, constant = (build_stage(TWO_UPDATES) for _ in range(3))
    for window in itertools.islice(implicit.windows(), 3):
        for stage in (implicit, explicit, constant):
            stage.runner.begin_step()
        implicit.runner.eager.run(window)
        explicit.runner.eager.run(window, explicit.runner.eager.compute_gradients)
        constant.runner.eager.run(window, lambda update, window: None)
    assert equal_weights(all_weights(implicit), all_weights(explicit))
    assert not equal_weights(all_weights(implicit), all_weights(constant))  # negative control


def test_gradients_of_updates_in_one_group_are_computed_before_either_is_applied():
    grouped = TWO_UPDATES.replace(
        "  - {models: [a], terms: [ce], repeat: 2}\n  - {models: [b], terms: [cf, follow]}\n",
        "  - - {models: [a], terms: [ce]}\n    - {models: [b], terms: [cf, follow]}\n",
    )

    def weights_at_gradients(text: str) -> list[bool]:
        """Returns for each computation of gradients whether role `a` has its initial weights."""
        stage = build_stage(text)
        initial = copy.deepcopy(stage.weights("a"))
        unchanged: list[bool] = []
        eager = stage.runner.eager

        def compute(update: Update, window: Window) -> None:
            unchanged.append(equal_weights(initial, stage.weights("a")))
            eager.compute_gradients(update, window)

        stage.runner.begin_step()
        eager.run(next(stage.windows()), compute)
        return unchanged

    assert weights_at_gradients(grouped) == [True, True]
    assert weights_at_gradients(TWO_UPDATES) == [True, False, False]  # negative control: updates in order
