"""Routers: which teacher counts how much for which sample, and what trains the choice."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.term_inputs import build_part, build_term, run_without_values
from kdbench.errors import ConfigError
from kdbench.registry import ROUTERS
from kdbench.terms.logits import kd_loss

LABEL = torch.tensor([0, 2, 1, 4, 3, -100])
ALL = {
    "uniform": {},
    "random": {},
    "given": {},
    "drop": {},
    "confidence": {},
    "top_k": {"k": 2},
    "policy": {},
}
FACTS = {"shapes": {"read": (7,)}, "num_classes": 5}
every_router = pytest.mark.parametrize("name", list(ALL))


def router(name, edges=3, **params):
    return build_part(ROUTERS, name, {**ALL[name], **params}, edges=edges, **FACTS)


def operands(name, dtype=torch.float32):
    torch.manual_seed(1)
    given = {
        "student": torch.randn(6, 5).to(dtype).requires_grad_(),
        "teachers": [(2 * torch.randn(6, 5)).to(dtype) for _ in range(3)],
        "read": torch.randn(6, 7).to(dtype).requires_grad_(),
        "route": torch.rand(6, 3).to(dtype),
        "label": LABEL,
    }
    return {key: value for key, value in given.items() if key in ROUTERS.entry(name).inputs}


def route_of(result):
    return result["route"] if isinstance(result, dict) else result


def test_every_router_is_tested():
    assert set(ALL) == {name for name, entry in ROUTERS.entries.items() if entry.module.startswith("kdbench")}


@pytest.mark.parametrize("name", ["uniform", "random", "confidence", "top_k"])
def test_the_weights_of_a_sample_sum_to_one(name):
    route = route_of(router(name)(**operands(name)))
    assert route.shape == (6, 3) and (route >= 0).all()
    assert_close(route.sum(1), torch.ones(6))


@every_router
def test_nothing_is_read_on_the_host(name):
    result = run_without_values(lambda: router(name), operands(name))
    assert route_of(result).shape == (6, 3)


@pytest.mark.parametrize("name", ["uniform", "random", "confidence"])
def test_half_precision_gives_float32(name):
    assert route_of(router(name)(**operands(name, torch.bfloat16))).dtype == torch.float32


@every_router
def test_a_router_over_one_teacher_is_refused(name):
    with pytest.raises(ConfigError, match="the term has 1 edge"):
        router(name, edges=1, **({"k": 1} if name == "top_k" else {}))


def test_a_random_route_takes_each_teacher_about_as_often_and_follows_the_generator():
    student = torch.zeros(3000, 5)
    torch.manual_seed(3)
    first = router("random")(student)  # built under its own seed
    assert (first.sum(0) / 3000 - 1 / 3).abs().max() < 0.05
    made = router("random")
    torch.manual_seed(3)
    one, two = made(student), made(student)
    torch.manual_seed(3)
    assert torch.equal(made(student), one) and not torch.equal(one, two)


@pytest.mark.parametrize("per", ["step", "sample"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_as_many_teachers_as_asked_for_are_dropped_others_every_time_and_all_equally_often(per, count):
    made, student = router("drop", count=count, per=per), torch.zeros(40, 5)
    torch.manual_seed(3)
    drawn = torch.stack([made(student) for _ in range(200)])
    torch.manual_seed(3)
    assert torch.equal(made(student), drawn[0])
    assert set(drawn.unique().tolist()) <= {0.0, 1.0} and (drawn.sum(2) == 3 - count).all()
    assert (drawn.mean((0, 1)) - (3 - count) / 3).abs().max() < 0.12
    alike = (drawn == drawn[:, :1]).all()
    assert alike if per == "step" or count == 0 else not alike


def test_all_teachers_cannot_be_dropped():
    with pytest.raises(ConfigError, match="count must be from 0 to below the 3 edges"):
        router("drop", count=3)


def test_confidence_favours_the_teacher_that_knows_the_label():
    given = operands("confidence")
    route = router("confidence")(**given)
    costs = torch.stack([F.cross_entropy(t, LABEL.clamp(min=0), reduction="none") for t in given["teachers"]], 1)
    assert_close(route[:5], ((1 - F.softmax(costs, 1)) / 2)[:5])
    assert_close(route[5], torch.full((3,), 1 / 3), msg="hidden label")
    assert (route.argmax(1)[:5] == costs.argmin(1)[:5]).all()


def test_given_weights_are_passed_on_detached():
    route = torch.rand(6, 3, requires_grad=True)
    passed = router("given")(route * 2)
    assert_close(passed, (2 * route).detach())
    assert not passed.requires_grad
    assert router("given", gradient=True)(route * 2).requires_grad
    with pytest.raises(ValueError, match="weights for 3 edges"):
        router("given")(torch.rand(6, 2))


def distil(made, given):
    """The routed distillation loss of the three teachers, and what the router gave."""
    torch.manual_seed(2)
    student, teachers = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(3)]
    result = made(**given)
    losses = torch.stack([kd_loss(student, teacher, 4.0) for teacher in teachers], 1)
    return (result["route"] * losses).sum(1).mean(), result, losses


@pytest.mark.parametrize("weights", ["gate", "equal"])
def test_top_k_keeps_the_k_likeliest(weights):
    made = router("top_k", weights=weights)
    result = made(**operands("top_k"))
    gate, route = result["gate"], result["route"]
    assert_close(gate.sum(1), torch.ones(6))
    for row, chances in zip(route, gate, strict=True):
        best = chances.argsort(descending=True)[:2]
        expected = torch.zeros(3)
        expected[best] = chances[best] / chances[best].sum() if weights == "gate" else 0.5
        assert_close(row, expected)


def test_the_gate_learns_from_the_distillation_loss_where_its_weights_count():
    made, given = router("top_k", weights="gate"), operands("top_k")
    loss, _, losses = distil(made, given)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter -= 0.05 * parameter.grad
    assert (made(**given)["route"] * losses).sum(1).mean() < loss


def test_as_the_authors_code_has_it_the_gate_learns_from_the_balance_only():
    made, given = router("top_k", weights="equal"), operands("top_k")
    loss, result, _ = distil(made, given)
    assert not loss.requires_grad
    build_term("load_balance")(result["gate"]).backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_a_top_k_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="k must be from 1 to the 3 edges"):
        router("top_k", k=4)
    with pytest.raises(ConfigError, match="the gate would learn nothing"):
        router("top_k", k=1)
    assert route_of(router("top_k", k=1, weights="equal")(**operands("top_k"))).sum() == 6


def test_a_policy_draws_each_teacher_by_its_gate_and_follows_the_generator():
    made, given = router("policy"), operands("policy")
    torch.manual_seed(3)
    one = made(**given)
    torch.manual_seed(3)
    assert torch.equal(made(**given)["route"], one["route"])
    taken = torch.stack([(made(**given)["route"] > 0).float() for _ in range(400)]).mean(0)
    assert (taken - one["gate"]).abs().max() < 0.12
    chosen = (one["route"] > 0).float()
    assert_close(one["route"] * chosen.sum(1, keepdim=True), chosen)


def test_where_a_policy_draws_none_it_takes_nobody_or_the_likeliest():
    given = operands("policy")
    torch.manual_seed(3)
    free = router("policy")(**given)["route"]
    torch.manual_seed(3)
    result = router("policy", none="likeliest")(**given)
    none = free.sum(1) == 0
    for seed in range(20):  # until some sample draws nobody and some draws somebody
        if none.any() and not none.all():
            break
        torch.manual_seed(seed)
        free = router("policy")(**given)["route"]
        torch.manual_seed(seed)
        result = router("policy", none="likeliest")(**given)
        none = free.sum(1) == 0
    assert none.any() and not none.all()
    assert torch.equal(result["route"][~none], free[~none])
    assert torch.equal(result["route"][none], F.one_hot(result["gate"].argmax(1), 3).float()[none])


def test_a_policy_reads_the_sample_each_teacher_and_its_loss_and_detaches_them():
    made, given = router("policy"), operands("policy")
    gate = made(**given)["gate"]
    given["teachers"][1] = given["teachers"][1] + torch.randn(6, 5)
    moved = made(**given)["gate"]
    assert torch.equal(moved[:, [0, 2]], gate[:, [0, 2]]) and (moved[:, 1] != gate[:, 1]).all()
    changed = made(**{**given, "label": LABEL.roll(1)})["gate"]
    assert (changed != moved).any()
    moved.sum().backward()
    assert given["read"].grad is None
    assert all(p.grad is not None for p in made.parameters())


def test_reinforce_trains_the_policy_and_the_distillation_loss_does_not():
    made, given = router("policy"), operands("policy")
    loss, result, losses = distil(made, given)
    assert not loss.requires_grad
    build_term("reinforce")(result["gate"], result["route"], losses).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
