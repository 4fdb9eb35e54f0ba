"""Routers: weights of the teachers by their formulas, random draws, and the gradients that train a gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, build_term, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import ROUTERS
from kdbench.terms.logits import kd_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, -100])
PARAMS = {
    "uniform": {},
    "random": {},
    "given": {},
    "drop": {},
    "confidence": {},
    "top_k": {"k": 2},
    "policy": {},
}
INJECTED = {"shapes": {"read": (7,)}, "num_classes": 5}
every_router = pytest.mark.parametrize("name", list(PARAMS))


def build_router(name, edges=3, **params):
    return build_part(ROUTERS, name, {**PARAMS[name], **params}, edges=edges, **INJECTED)


def draw_operands(name, dtype=torch.float32):
    torch.manual_seed(1)
    operands = {
        "student": torch.randn(6, 5).to(dtype).requires_grad_(),
        "teachers": [(2 * torch.randn(6, 5)).to(dtype) for _ in range(3)],
        "read": torch.randn(6, 7).to(dtype).requires_grad_(),
        "route": torch.rand(6, 3).to(dtype),
        "label": LABEL,
    }
    return {key: value for key, value in operands.items() if key in ROUTERS.entry(name).inputs}


def route_of(result):
    return result["route"] if isinstance(result, dict) else result


def test_every_router_is_tested_and_documented():
    assert set(PARAMS) == {name for name, entry in ROUTERS.entries.items() if entry.module.startswith("kdbench")}
    for name in PARAMS:
        assert "\nShape:\n" in ROUTERS.entry(name).doc


@pytest.mark.parametrize("name", ["uniform", "random", "confidence", "top_k"])
def test_weights_of_a_sample_sum_to_one(name):
    route = route_of(build_router(name)(**draw_operands(name)))
    assert route.shape == (6, 3) and (route >= 0).all()
    assert_close(route.sum(1), torch.ones(6))


@every_router
def test_no_tensor_is_read_on_the_host(name):
    result = run_without_values(lambda: build_router(name), draw_operands(name))
    assert route_of(result).shape == (6, 3)


@pytest.mark.parametrize("name", ["uniform", "random", "confidence"])
def test_half_precision_gives_float32(name):
    assert route_of(build_router(name)(**draw_operands(name, torch.bfloat16))).dtype == torch.float32


@every_router
def test_router_over_one_teacher_raises(name):
    with pytest.raises(ConfigError, match="the term has 1 pair"):
        build_router(name, edges=1, **({"k": 1} if name == "top_k" else {}))


def test_random_router_selects_every_teacher_equally_often_and_is_reproducible():
    student = torch.zeros(3000, 5)
    torch.manual_seed(3)
    route = build_router("random")(student)
    assert (route.sum(0) / 3000 - 1 / 3).abs().max() < 0.05
    router = build_router("random")
    torch.manual_seed(3)
    first, second = router(student), router(student)
    torch.manual_seed(3)
    assert torch.equal(router(student), first) and not torch.equal(first, second)


@pytest.mark.parametrize("per", ["step", "sample"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_drop_router_drops_the_given_count_and_every_teacher_equally_often(per, count):
    router, student = build_router("drop", count=count, per=per), torch.zeros(40, 5)
    torch.manual_seed(3)
    routes = torch.stack([router(student) for _ in range(200)])
    torch.manual_seed(3)
    assert torch.equal(router(student), routes[0])
    assert set(routes.unique().tolist()) <= {0.0, 1.0} and (routes.sum(2) == 3 - count).all()
    assert (routes.mean((0, 1)) - (3 - count) / 3).abs().max() < 0.12
    equal_over_samples = (routes == routes[:, :1]).all()
    assert equal_over_samples if per == "step" or count == 0 else not equal_over_samples


def test_dropping_all_teachers_raises():
    with pytest.raises(ConfigError, match="count must be from 0 to 2"):
        build_router("drop", count=3)


def test_confidence_gives_the_highest_weight_to_the_teacher_with_the_smallest_cross_entropy():
    operands = draw_operands("confidence")
    route = build_router("confidence")(**operands)
    costs = torch.stack([F.cross_entropy(t, LABEL.clamp(min=0), reduction="none") for t in operands["teachers"]], 1)
    assert_close(route[:5], ((1 - F.softmax(costs, 1)) / 2)[:5])
    assert_close(route[5], torch.full((3,), 1 / 3), msg="hidden label")
    assert (route.argmax(1)[:5] == costs.argmin(1)[:5]).all()


def test_external_weights_are_detached_unless_gradient_is_set():
    route = torch.rand(6, 3, requires_grad=True)
    result = build_router("given")(route * 2)
    assert_close(result, (2 * route).detach())
    assert not result.requires_grad
    assert build_router("given", gradient=True)(route * 2).requires_grad


def test_external_weights_of_the_wrong_width_raise():
    with pytest.raises(ValueError, match="must contain 3 weights per sample"):
        build_router("given")(torch.rand(6, 2))


def routed_loss(router, operands):
    """Returns the routed distillation loss of three teachers, the router's result and the losses per edge."""
    torch.manual_seed(2)
    student, teachers = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(3)]
    result = router(**operands)
    losses = torch.stack([kd_loss(student, teacher, 4.0) for teacher in teachers], 1)
    return (result["route"] * losses).sum(1).mean(), result, losses


@pytest.mark.parametrize("weights", ["gate", "equal"])
def test_top_k_selects_the_k_most_probable_teachers(weights):
    result = build_router("top_k", weights=weights)(**draw_operands("top_k"))
    gate, route = result["gate"], result["route"]
    assert_close(gate.sum(1), torch.ones(6))
    for row, probabilities in zip(route, gate, strict=True):
        top = probabilities.argsort(descending=True)[:2]
        expected = torch.zeros(3)
        expected[top] = probabilities[top] / probabilities[top].sum() if weights == "gate" else 0.5
        assert_close(row, expected)


def test_gate_weights_train_the_gate_by_the_distillation_loss():
    router, operands = build_router("top_k", weights="gate"), draw_operands("top_k")
    loss, _, losses = routed_loss(router, operands)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())
    with torch.no_grad():
        for parameter in router.parameters():
            parameter -= 0.05 * parameter.grad
    assert (router(**operands)["route"] * losses).sum(1).mean() < loss


def test_equal_weights_train_the_gate_only_by_the_load_balance():
    router, operands = build_router("top_k", weights="equal"), draw_operands("top_k")
    loss, result, _ = routed_loss(router, operands)
    assert not loss.requires_grad
    build_term("load_balance")(result["gate"]).backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())


def test_top_k_with_impossible_k_raises():
    with pytest.raises(ConfigError, match="k must be from 1 to 3"):
        build_router("top_k", k=4)
    with pytest.raises(ConfigError, match="the gate would get no gradient"):
        build_router("top_k", k=1)
    assert route_of(build_router("top_k", k=1, weights="equal")(**draw_operands("top_k"))).sum() == 6


def test_policy_selects_each_teacher_with_its_gate_probability_and_is_reproducible():
    router, operands = build_router("policy"), draw_operands("policy")
    torch.manual_seed(3)
    first = router(**operands)
    torch.manual_seed(3)
    assert torch.equal(router(**operands)["route"], first["route"])
    frequency = torch.stack([(router(**operands)["route"] > 0).float() for _ in range(400)]).mean(0)
    assert (frequency - first["gate"]).abs().max() < 0.12
    selection = (first["route"] > 0).float()
    assert_close(first["route"] * selection.sum(1, keepdim=True), selection)


def test_policy_without_a_selected_teacher_selects_nobody_or_the_most_probable_teacher():
    operands = draw_operands("policy")
    for seed in range(20):  # until some sample, but not every sample, has no selected teacher
        torch.manual_seed(seed)
        nobody = build_router("policy")(**operands)["route"]
        torch.manual_seed(seed)
        result = build_router("policy", none="likeliest")(**operands)
        unselected = nobody.sum(1) == 0
        if unselected.any() and not unselected.all():
            break
    assert unselected.any() and not unselected.all()
    assert torch.equal(result["route"][~unselected], nobody[~unselected])
    most_probable = F.one_hot(result["gate"].argmax(1), 3).float()
    assert torch.equal(result["route"][unselected], most_probable[unselected])


def test_policy_gate_depends_on_sample_teacher_and_loss_and_detaches_them():
    router, operands = build_router("policy"), draw_operands("policy")
    gate = router(**operands)["gate"]
    operands["teachers"][1] = operands["teachers"][1] + torch.randn(6, 5)
    new_gate = router(**operands)["gate"]
    assert torch.equal(new_gate[:, [0, 2]], gate[:, [0, 2]]) and (new_gate[:, 1] != gate[:, 1]).all()
    assert (router(**{**operands, "label": LABEL.roll(1)})["gate"] != new_gate).any()
    new_gate.sum().backward()
    assert operands["read"].grad is None
    assert all(p.grad is not None for p in router.parameters())


def test_policy_is_trained_by_reinforce_and_not_by_the_distillation_loss():
    router, operands = build_router("policy"), draw_operands("policy")
    loss, result, losses = routed_loss(router, operands)
    assert not loss.requires_grad
    build_term("reinforce")(result["gate"], result["route"], losses).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())
