"""A loss taken after a virtual step: its gradient goes through the step, and nothing else notices the step."""

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


def gated(*overrides: str, norm: str = "batch", text: str = GATED) -> StageHarness:
    run = build_stage(text.replace("NORM", norm), *overrides)
    with torch.no_grad():  # a gate whose shares differ from sample to sample
        for parameter in run.model("gate").parameters():
            parameter.mul_(4)
    return run


def gradients(run: StageHarness, number: int = 0, window: list[MicroBatch] | None = None) -> dict[str, Tensor]:
    """What an update leaves in its parameters."""
    update = run.runner.updates[number]
    run.runner.begin_step()
    run.runner.eager.compute_gradients(update, window or next(run.windows()))
    return {name: p.grad.clone() for name, p in zip(update.names, update.parameters, strict=True) if p.grad is not None}


def inner(student: Callable[[Tensor], Tensor], run: StageHarness, batch: MicroBatch, gate: nn.Module) -> Tensor:
    """share * T^2 KL + (1 - share) * CE, written out; the share is no way to the student."""
    image, label = batch["train"].fields["image"], batch["train"].fields["label"]
    ours = student(image)
    with torch.no_grad():
        theirs = run.model("teacher")(image)
    share = gate(ours.detach(), theirs, label).squeeze(1)
    p, log_q = F.softmax(theirs / T, 1), F.log_softmax(ours / T, 1)
    soft = T**2 * (p * (p.log() - log_q)).sum(1)
    hard = -F.log_softmax(ours, 1).gather(1, label[:, None]).squeeze(1)
    return (share * soft + (1 - share) * hard).mean()


def held_loss(student: Callable[[Tensor], Tensor], batch: MicroBatch) -> Tensor:
    return F.cross_entropy(student(batch["held"].fields["image"]), batch["held"].fields["label"])


def unrolled(
    run: StageHarness, batch: MicroBatch, wanted: list[nn.Parameter], rate: float = RATE
) -> tuple[Tensor, ...]:
    """The gradient of the held-out loss after one step, by torch.func on copies of the networks."""
    student, gate = copy.deepcopy(run.model()), copy.deepcopy(run.model("gate"))
    own = dict(run.model().named_parameters())
    mine = dict(run.model("gate").named_parameters())

    def at(weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda image: functional_call(student, weights, (image,))

    def share(*inputs: Tensor) -> Tensor:
        return functional_call(gate, mine, inputs)

    loss = inner(at(own), run, batch, share)  # type: ignore[arg-type]
    steps = torch.autograd.grad(loss, list(own.values()), create_graph=True)
    ahead = {name: p - rate * g for (name, p), g in zip(own.items(), steps, strict=True)}
    return torch.autograd.grad(held_loss(at(ahead), batch), wanted)


@pytest.mark.parametrize("norm", ["", "batch"])
def test_the_gradient_of_the_gate_is_that_of_the_unrolled_step(norm):
    run = gated(norm=norm)
    batch = next(run.windows())[0]
    expected = unrolled(run, batch, list(run.model("gate").parameters()))
    found = gradients(run)
    assert len(found) == len(expected) == 6
    for name, value in zip(found, expected, strict=True):
        assert_close(found[name], value, rtol=1e-9, atol=1e-14)
    assert max(float(value.abs().max()) for value in expected) > 1e-5, "and it is not nothing"


def test_the_gradient_of_the_gate_is_that_of_real_steps_taken_with_a_little_more_and_a_little_less():
    run = gated()
    batch = next(run.windows())[0]
    found = gradients(run)

    def really() -> float:
        """The student steps for good, without any second derivative; then it is measured."""
        student, gate = copy.deepcopy(run.model()), copy.deepcopy(run.model("gate"))
        inner(student, run, batch, gate).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= RATE * parameter.grad  # type: ignore[operator]
        return float(held_loss(student, batch).detach())

    for name, parameter in run.model("gate").named_parameters():
        gradient = found[f"gate.{name}"]
        place = int(gradient.abs().argmax())  # of each tensor the entry that matters most
        step, flat = 1e-5, parameter.data.view(-1)
        flat[place] += step
        more = really()
        flat[place] -= 2 * step
        less = really()
        flat[place] += step
        assert_close((more - less) / (2 * step), float(gradient.view(-1)[place]), rtol=1e-5, atol=1e-10)


def test_without_the_step_or_without_a_way_through_it_the_gate_gets_nothing():
    run = gated()
    run.runner.updates[0].inner_step.rate_source = None  # type: ignore[union-attr]
    run.runner.updates[0].inner_step.rates.zero_()  # type: ignore[union-attr]
    assert all(not gradient.any() for gradient in gradients(run).values())
    run = gated()
    kept = run.network.term("soft").sample_weight, run.network.term("hard").sample_weight
    for weigh in kept:
        part = weigh.part  # type: ignore[union-attr]
        forward = part.forward
        part.forward = lambda by, forward=forward: forward(by.detach())  # as the authors' code has it
    assert all(not gradient.any() for gradient in gradients(run).values())


def test_nobody_notices_the_virtual_step():
    run = gated()
    batch = next(run.windows())
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    own = {name: id(tensor) for name, tensor in [*run.network.named_parameters(), *run.network.named_buffers()]}
    gradients(run, window=batch)
    assert equal_weights(before, run.network.state_dict()), (
        "no weight, no statistic of a BatchNorm and no mean of a class"
    )
    assert own == {n: id(t) for n, t in [*run.network.named_parameters(), *run.network.named_buffers()]}
    gradients(run, 1, window=batch)
    moved = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved) and any("gate.model.mean" in name for name in moved)


def test_tensors_are_back_in_their_places_after_a_failure_inside():
    run = gated()
    state = dict(run.network.state_dict(keep_vars=True))
    weight = run.model().fc.weight
    with pytest.raises(ZeroDivisionError), swapped_parameters(run.network, {weight: torch.zeros_like(weight)}):
        assert not run.model().fc.weight.any() and not run.network.role("judge").model.fc.weight.any()
        raise ZeroDivisionError
    assert all(value is state[name] for name, value in run.network.state_dict(keep_vars=True).items())


def test_a_step_of_several_micro_batches_is_that_of_the_whole_batch():
    whole = gated(norm="layer")
    window = next(whole.windows())
    halves: list[MicroBatch] = [
        {source: batch.slice(slice(half, None, 2)) for source, batch in window[0].items()} for half in (0, 1)
    ]
    run = gated(norm="layer")
    gate = run.model("gate")
    for model in (gate, whole.model("gate")):  # the mean of the classes so far would be that of one half
        model._update_class_means = lambda t, g: None
        model.mean.uniform_(generator=torch.Generator().manual_seed(1))
    expected, found = gradients(whole, window=window), gradients(run, window=halves)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-14)
    single = gradients(run, window=halves[:1])
    assert not torch.allclose(single["gate.net.0.weight"], expected["gate.net.0.weight"], rtol=1e-3), "control"


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


def test_an_update_may_learn_where_its_own_models_begin_and_what_they_are_led_to():
    """MAML's form: the outer loss moves the student from which the step begins, and the network that leads it."""
    run = build_stage(META.replace("LR", "0.5"))
    batch = next(run.windows())[0]
    student, target = run.model(), run.model("target")
    own = dict(student.named_parameters())
    image = batch["train"].fields["image"]
    loss = (student(image) - target(image)).square().mean(1).mean()
    steps = torch.autograd.grad(loss, list(own.values()), create_graph=True)
    ahead = {name: p - 0.5 * g for (name, p), g in zip(own.items(), steps, strict=True)}
    wanted = [*student.parameters(), *target.parameters()]
    outer = F.cross_entropy(
        functional_call(student, ahead, (batch["held"].fields["image"],)), batch["held"].fields["label"]
    )
    expected = torch.autograd.grad(outer, wanted)
    found = gradients(run)
    for (name, value), right in zip(found.items(), expected, strict=True):
        assert_close(value, right, rtol=1e-9, atol=1e-14, msg=name)
    first_order = torch.autograd.grad(held_loss(student, batch), list(student.parameters()))
    assert not torch.allclose(found["student.layer1.0.weight"], first_order[0], rtol=1e-2), "control: no step"


def test_a_loss_that_only_a_virtual_step_takes_is_logged():
    run = build_stage(META.replace("LR", "0.5"))
    batch = next(run.windows())[0]
    image = batch["train"].fields["image"]
    expected = float((run.model()(image) - run.model("target")(image)).square().mean().detach())
    run.step(1)
    assert run.runner.read_log()[0].losses["near"] == pytest.approx(expected, rel=1e-6)


def rates(run: StageHarness, steps: int) -> list[list[float]]:
    """The rates of the virtual step, at every step."""
    found = []
    for window in itertools.islice(run.windows(), steps):
        run.runner.begin_step()
        found.append(run.runner.updates[0].inner_step.rates.tolist())  # type: ignore[union-attr]
        run.runner.step(window)
    return found


def test_the_rate_is_what_the_recipe_says_or_that_of_the_update_that_moves_the_model():
    assert rates(gated(), 2) == [[0.3], [0.3]]
    scheduled = build_stage(META.replace("LR", "{type: linear, start: 1, end: 0, by: step}"))
    assert [rate for [rate] in rates(scheduled, 3)] == pytest.approx(
        [1 - i / scheduled.runner.progress.total_steps for i in range(3)]
    )
    text = GATED.replace("hard], lr: 0.3}", "hard]}")
    grouped = "optimizer={type: SGD, lr: 0.3, groups: [{path: student.fc, lr: 0.03}]}"
    own = gated(grouped, "scheduler={type: step, milestones: [1], gamma: 0.1, by: step}", text=text)
    assert rates(own, 2) == [pytest.approx([0.3, 0.03]), pytest.approx([0.03, 0.003])]


def test_a_virtual_step_at_the_models_own_rates_is_the_step_that_plain_descent_takes():
    text = GATED.replace("hard], lr: 0.3}", "hard]}")
    run = gated("optimizer={type: SGD, lr: 0.3, groups: [{path: student.fc, lr: 0.03}]}", text=text)
    batch = next(run.windows())
    run.runner.begin_step()
    virtual = run.runner.updates[0].inner_step
    assert virtual is not None
    losses, _ = virtual.losses_after(run.network, batch, 1.0, run.runner.autocast)
    counts = run.network.valid_counts(batch, ["held"])
    ahead = losses(batch[0], counts, run.network.wiring(["held"], ["gate"]), 1.0)[0]
    here = run.network(batch[0], counts, run.network.wiring(["held"], ["gate"]), 1.0)[0]
    gradients(run, 1, window=batch)
    run.runner.eager._apply(run.runner.updates[1])
    there = run.network(batch[0], counts, run.network.wiring(["held"], ["gate"]), 1.0)[0]
    assert_close(ahead, there, rtol=1e-12, atol=0)
    assert not torch.allclose(ahead, here, rtol=1e-3), "control: the step leads somewhere"


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


def test_a_virtual_step_moves_the_adapters_of_its_terms_as_well():
    run = build_stage(ADAPTED)
    batch = next(run.windows())[0]
    image = batch["train"].fields["image"]
    first, adapter = run.model().layer1, run.network.term("near").edges[0].adapter
    target = run.model("teacher").layer1(image.flatten(1)).detach()
    own = {f"0.{n}": p for n, p in first.named_parameters()} | {f"1.{n}": p for n, p in adapter.named_parameters()}
    both = nn.Sequential(first, adapter)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (functional_call(both, weights, (image.flatten(1),)) - target).square().mean()

    def outer(moved: str) -> tuple[Tensor, ...]:
        steps = torch.autograd.grad(loss(own), list(own.values()), create_graph=True)
        pairs = zip(own.items(), steps, strict=True)
        return torch.autograd.grad(
            loss({n: p - 0.5 * g if n.startswith(moved) else p for (n, p), g in pairs}), list(own.values())
        )

    found = gradients(run)
    for value, right in zip(found.values(), outer(""), strict=True):
        assert_close(value, right, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(found["student.layer1.0.weight"], outer("0.")[0], rtol=1e-3), "control: it stays"


def test_attention_is_differentiated_twice_as_plain_products(monkeypatch):
    overrides = ["student.model={type: digits_vit, depth: 1, dim: 16}", "precision=float32"]
    assert all(value.isfinite().all() and value.any() for value in gradients(gated(*overrides)).values())
    monkeypatch.setattr("kdbench.engine.train.bilevel.twice_differentiable", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="attention"):  # control: the fused kernel of the CPU
        gradients(gated(*overrides))


def test_it_runs_in_bf16():
    run = gated("precision=bf16")
    found = gradients(run)
    exact = gradients(gated("precision=float64"))
    mine = torch.cat([value.flatten() for value in found.values()]).double()
    right = torch.cat([value.flatten() for value in exact.values()])
    assert float(F.cosine_similarity(mine, right, dim=0)) > 0.9
