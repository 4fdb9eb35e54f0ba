"""Bilevel updates: gradients flow through the inner step, and the inner step changes no weight and no statistic."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.train.bilevel import swapped_parameters

T, RATE = 2.0, 0.3

GATED = """
student: {model: {type: t_layers, norm: "NORM"}}
teacher: {model: {type: t_layers, hidden: 16}}
models:
  judge: {reuse: student, input: held.image}
  gate: {model: fusion_gate, input: ["student:logits", "teacher:logits", train.label]}
data: {held: {subset: {type: balanced, amount: 0.25}}}
terms:
  soft: {type: kd, temperature: 2, sample_weight: {type: learnt, by: gate}}
  hard: {type: cross_entropy, sample_weight: {type: learnt, by: gate, complement: true}}
  held: {type: cross_entropy, student: judge}
updates:
  - models: [gate]
    terms: [held]
    inner_step: {models: [student], terms: [soft, hard], lr: 0.3}
    optimizer: {type: SGD, lr: 0.1}
  - {models: [student], terms: [soft, hard]}
optimizer: {type: SGD, lr: 0.3}
precision: float64
epochs: 2
batch_size: 16
"""
"""The first update trains the gate by the loss of the student, after an inner step, on held-out samples."""


def build_gated(*overrides: str, norm: str = "batch", text: str = GATED) -> StageHarness:
    """Builds the stage with a gate whose fractions differ from sample to sample."""
    stage = build_stage(text.replace("NORM", norm), *overrides)
    with torch.no_grad():
        for parameter in stage.model("gate").parameters():
            parameter.mul_(4)
    return stage


def update_gradients(stage: StageHarness, number: int = 0, window: list[MicroBatch] | None = None) -> dict[str, Tensor]:
    """Computes the gradients of an update, by the names of its parameters."""
    update = stage.runner.updates[number]
    stage.runner.begin_step()
    stage.runner.eager.compute_gradients(update, window or next(stage.windows()))
    pairs = zip(update.names, update.parameters, strict=True)
    return {name: parameter.grad.clone() for name, parameter in pairs if parameter.grad is not None}


def inner_loss(
    student: Callable[[Tensor], Tensor], stage: StageHarness, batches: MicroBatch, gate: nn.Module
) -> Tensor:
    """Computes fraction * T^2 KL + (1 - fraction) * CE; no gradient flows into the student through the fraction."""
    image, label = batches["train"].fields["image"], batches["train"].fields["label"]
    logits = student(image)
    with torch.no_grad():
        teacher_logits = stage.model("teacher")(image)
    fraction = gate(logits.detach(), teacher_logits, label).squeeze(1)
    p, log_q = F.softmax(teacher_logits / T, 1), F.log_softmax(logits / T, 1)
    soft = T**2 * (p * (p.log() - log_q)).sum(1)
    hard = -F.log_softmax(logits, 1).gather(1, label[:, None]).squeeze(1)
    return (fraction * soft + (1 - fraction) * hard).mean()


def held_out_loss(student: Callable[[Tensor], Tensor], batches: MicroBatch) -> Tensor:
    return F.cross_entropy(student(batches["held"].fields["image"]), batches["held"].fields["label"])


def unrolled_gradients(stage: StageHarness, batches: MicroBatch, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Computes the gradients of the held-out loss after one step, by torch.func on copies of the networks."""
    student, gate = copy.deepcopy(stage.model()), copy.deepcopy(stage.model("gate"))
    student_weights = dict(stage.model().named_parameters())
    gate_weights = dict(stage.model("gate").named_parameters())

    def student_with(weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda image: functional_call(student, weights, (image,))

    def gate_fraction(*inputs: Tensor) -> Tensor:
        return functional_call(gate, gate_weights, inputs)

    loss = inner_loss(student_with(student_weights), stage, batches, gate_fraction)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss, list(student_weights.values()), create_graph=True)
    pairs = zip(student_weights.items(), gradients, strict=True)
    weights_after = {name: parameter - RATE * gradient for (name, parameter), gradient in pairs}
    return torch.autograd.grad(held_out_loss(student_with(weights_after), batches), parameters)


@pytest.mark.parametrize("norm", ["", "batch"])
def test_gradient_of_the_gate_equals_that_of_the_unrolled_inner_step(norm):
    stage = build_gated(norm=norm)
    batches = next(stage.windows())[0]
    expected = unrolled_gradients(stage, batches, list(stage.model("gate").parameters()))
    gradients = update_gradients(stage)
    assert len(gradients) == len(expected) == 6
    for name, value in zip(gradients, expected, strict=True):
        assert_close(gradients[name], value, rtol=1e-9, atol=1e-14)
    assert max(float(value.abs().max()) for value in expected) > 1e-5  # control: the gradients are not zero


def test_gradient_of_the_gate_equals_central_differences_of_real_steps():
    stage = build_gated()
    batches = next(stage.windows())[0]
    gradients = update_gradients(stage)

    def loss_after_a_real_step() -> float:
        """Takes a step of the student without second derivatives, and computes its held-out loss."""
        student, gate = copy.deepcopy(stage.model()), copy.deepcopy(stage.model("gate"))
        inner_loss(student, stage, batches, gate).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= RATE * parameter.grad  # type: ignore[operator]
        return float(held_out_loss(student, batches).detach())

    for name, parameter in stage.model("gate").named_parameters():
        gradient = gradients[f"gate.{name}"]
        index = int(gradient.abs().argmax())  # the entry of each tensor with the largest effect
        step, flat = 1e-5, parameter.data.view(-1)
        flat[index] += step
        loss_above = loss_after_a_real_step()
        flat[index] -= 2 * step
        loss_below = loss_after_a_real_step()
        flat[index] += step
        difference = (loss_above - loss_below) / (2 * step)
        assert_close(difference, float(gradient.view(-1)[index]), rtol=1e-5, atol=1e-10)


def test_gate_gets_no_gradient_without_inner_step_or_without_a_path_through_it():
    """Negative control of the tests above."""
    stage = build_gated()
    stage.runner.updates[0].inner_step.rate_source = None  # type: ignore[union-attr]
    stage.runner.updates[0].inner_step.rates.zero_()  # type: ignore[union-attr]
    assert all(not gradient.any() for gradient in update_gradients(stage).values())
    stage = build_gated()
    for name in ("soft", "hard"):
        part = stage.network.term(name).sample_weight.part  # type: ignore[union-attr]
        forward = part.forward
        part.forward = lambda by, forward=forward: forward(by.detach())  # as in the authors' code
    assert all(not gradient.any() for gradient in update_gradients(stage).values())


def test_inner_step_changes_no_weight_no_statistic_and_no_tensor_object():
    stage = build_gated()
    window = next(stage.windows())

    def tensor_ids() -> dict[str, int]:
        tensors = [*stage.network.named_parameters(), *stage.network.named_buffers()]
        return {name: id(tensor) for name, tensor in tensors}

    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    ids_before = tensor_ids()
    update_gradients(stage, window=window)
    # The state includes the statistics of BatchNorm and the gate's class means.
    assert equal_weights(before, stage.network.state_dict())
    assert ids_before == tensor_ids()
    update_gradients(stage, 1, window=window)  # negative control: an update without inner step
    state = stage.network.state_dict()
    changed_names = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in changed_names)
    assert any("gate.model.mean" in name for name in changed_names)


def test_swapped_parameters_are_restored_after_an_error():
    stage = build_gated()
    state = dict(stage.network.state_dict(keep_vars=True))
    weight = stage.model().fc.weight
    with pytest.raises(ZeroDivisionError), swapped_parameters(stage.network, {weight: torch.zeros_like(weight)}):
        assert not stage.model().fc.weight.any() and not stage.network.role("judge").model.fc.weight.any()
        raise ZeroDivisionError
    assert all(value is state[name] for name, value in stage.network.state_dict(keep_vars=True).items())


def test_gradient_of_several_micro_batches_equals_that_of_one_batch():
    single, accumulated = build_gated(norm="layer"), build_gated(norm="layer")
    window = next(single.windows())
    halves: list[MicroBatch] = [
        {source: batch.slice(slice(half, None, 2)) for source, batch in window[0].items()} for half in (0, 1)
    ]
    for model in (single.model("gate"), accumulated.model("gate")):
        # The gate's running class means would be those of the first half when the second one is computed.
        model._update_class_means = lambda t, g: None
        model.mean.uniform_(generator=torch.Generator().manual_seed(1))
    expected, gradients = update_gradients(single, window=window), update_gradients(accumulated, window=halves)
    for name, value in expected.items():
        assert_close(gradients[name], value, rtol=1e-9, atol=1e-14)
    of_one_half = update_gradients(accumulated, window=halves[:1])  # negative control
    assert not torch.allclose(of_one_half["gate.net.0.weight"], expected["gate.net.0.weight"], rtol=1e-3)


META = """
student: {model: t_layers}
models:
  target: {model: {type: t_layers, hidden: 9}}
  judge: {reuse: student, input: held.image}
data: {held: {subset: {type: balanced, amount: 0.25}}}
terms:
  near: {type: logit_mse, student: student, teacher: target, teacher_grad: true}
  held: {type: cross_entropy, student: judge}
updates:
  - {models: [student, target], terms: [held], inner_step: {models: [student], terms: [near], lr: LR}}
optimizer: {type: SGD, lr: 0.1}
precision: float64
epochs: 2
batch_size: 16
log_every: 1
"""
"""As in MAML: the outer loss trains the initial student of the inner step, and the network that is its target."""


def test_update_may_train_the_initial_weights_and_the_target_of_its_inner_step():
    stage = build_stage(META.replace("LR", "0.5"))
    batches = next(stage.windows())[0]
    student, target = stage.model(), stage.model("target")
    weights = dict(student.named_parameters())
    image = batches["train"].fields["image"]
    loss = (student(image) - target(image)).square().mean(1).mean()
    inner_gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    pairs = zip(weights.items(), inner_gradients, strict=True)
    weights_after = {name: parameter - 0.5 * gradient for (name, parameter), gradient in pairs}
    held_out = batches["held"].fields
    outer_loss = F.cross_entropy(functional_call(student, weights_after, (held_out["image"],)), held_out["label"])
    expected = torch.autograd.grad(outer_loss, [*student.parameters(), *target.parameters()])
    gradients = update_gradients(stage)
    for (name, value), expected_value in zip(gradients.items(), expected, strict=True):
        assert_close(value, expected_value, rtol=1e-9, atol=1e-14, msg=name)
    without_step = torch.autograd.grad(held_out_loss(student, batches), list(student.parameters()))
    assert not torch.allclose(gradients["student.layer1.0.weight"], without_step[0], rtol=1e-2)  # negative control


def test_loss_of_an_inner_step_is_logged():
    stage = build_stage(META.replace("LR", "0.5"))
    batches = next(stage.windows())[0]
    image = batches["train"].fields["image"]
    expected = float((stage.model()(image) - stage.model("target")(image)).square().mean().detach())
    stage.step(1)
    assert stage.runner.read_log()[0].losses["near"] == pytest.approx(expected, rel=1e-6)


def rates_of_steps(stage: StageHarness, steps: int) -> list[list[float]]:
    """Takes steps and returns the rates of each inner step."""
    rates = []
    for window in itertools.islice(stage.windows(), steps):
        stage.runner.begin_step()
        rates.append(stage.runner.updates[0].inner_step.rates.tolist())  # type: ignore[union-attr]
        stage.runner.step(window)
    return rates


WITHOUT_RATE = GATED.replace("hard], lr: 0.3}", "hard]}")
GROUPED = "optimizer={type: SGD, lr: 0.3, groups: [{path: student.fc, lr: 0.03}]}"


def test_rate_of_the_inner_step_is_that_of_the_recipe_or_of_the_optimizer():
    assert rates_of_steps(build_gated(), 2) == [[0.3], [0.3]]
    scheduled = build_stage(META.replace("LR", "{type: linear, start: 1, end: 0, by: step}"))
    total = scheduled.runner.progress.total_steps
    assert [rate for [rate] in rates_of_steps(scheduled, 3)] == pytest.approx([1 - i / total for i in range(3)])
    schedule = "scheduler={type: step, milestones: [1], gamma: 0.1, by: step}"
    of_optimizer = build_gated(GROUPED, schedule, text=WITHOUT_RATE)
    assert rates_of_steps(of_optimizer, 2) == [pytest.approx([0.3, 0.03]), pytest.approx([0.03, 0.003])]


def test_inner_step_at_the_optimizers_rates_equals_a_step_of_plain_gradient_descent():
    stage = build_gated(GROUPED, text=WITHOUT_RATE)
    window = next(stage.windows())
    stage.runner.begin_step()
    inner_step = stage.runner.updates[0].inner_step
    assert inner_step is not None
    losses_after_step, _ = inner_step.losses_after(stage.network, window, 1.0, stage.runner.autocast)
    counts, wiring = stage.network.valid_counts(window, ["held"]), stage.network.wiring(["held"], ["gate"])
    after_inner_step = losses_after_step(window[0], counts, wiring, 1.0)[0]
    before = stage.network(window[0], counts, wiring, 1.0)[0]
    update_gradients(stage, 1, window=window)
    stage.runner.eager._apply(stage.runner.updates[1])
    after_real_step = stage.network(window[0], counts, wiring, 1.0)[0]
    assert_close(after_inner_step, after_real_step, rtol=1e-12, atol=0)
    assert not torch.allclose(after_inner_step, before, rtol=1e-3)  # negative control: the step has an effect


ADAPTED = """
student: {model: t_layers}
teacher: {model: t_layers}
terms: {near: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer1}}
updates: [{models: [student], terms: [near], inner_step: {models: [student], terms: [near], lr: 0.5}}]
optimizer: {type: SGD, lr: 0.1}
precision: float64
epochs: 1
batch_size: 16
"""


def test_inner_step_trains_the_adapters_of_its_terms():
    stage = build_stage(ADAPTED)
    image = next(stage.windows())[0]["train"].fields["image"].flatten(1)
    layer, adapter = stage.model().layer1, stage.network.term("near").edges[0].adapter
    target = stage.model("teacher").layer1(image).detach()
    weights = {f"0.{name}": p for name, p in layer.named_parameters()}
    weights |= {f"1.{name}": p for name, p in adapter.named_parameters()}
    adapted_layer = nn.Sequential(layer, adapter)

    def hint_loss(weights: dict[str, Tensor]) -> Tensor:
        return (functional_call(adapted_layer, weights, (image,)) - target).square().mean()

    def outer_gradients(prefix: str) -> tuple[Tensor, ...]:
        """Returns the gradients if the inner step trains the weights whose names have a prefix."""
        gradients = torch.autograd.grad(hint_loss(weights), list(weights.values()), create_graph=True)
        pairs = zip(weights.items(), gradients, strict=True)
        weights_after = {name: p - 0.5 * g if name.startswith(prefix) else p for (name, p), g in pairs}
        return torch.autograd.grad(hint_loss(weights_after), list(weights.values()))

    gradients = update_gradients(stage)
    for value, expected in zip(gradients.values(), outer_gradients(""), strict=True):
        assert_close(value, expected, rtol=1e-9, atol=1e-14)
    with_fixed_adapter = outer_gradients("0.")  # negative control
    assert not torch.allclose(gradients["student.layer1.0.weight"], with_fixed_adapter[0], rtol=1e-3)


def test_attention_has_a_second_derivative(monkeypatch):
    overrides = ["student.model={type: digits_vit, depth: 1, dim: 16}", "precision=float32"]
    gradients = update_gradients(build_gated(*overrides))
    assert all(value.isfinite().all() and value.any() for value in gradients.values())
    monkeypatch.setattr("kdbench.engine.train.bilevel.twice_differentiable", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="attention"):  # negative control: the fused kernel of the CPU
        update_gradients(build_gated(*overrides))


def test_gradient_in_bf16_has_the_direction_of_that_in_float64():
    low, high = (
        torch.cat([value.flatten() for value in update_gradients(build_gated(f"precision={precision}")).values()])
        for precision in ("bf16", "float64")
    )
    assert float(F.cosine_similarity(low.double(), high, dim=0)) > 0.9
