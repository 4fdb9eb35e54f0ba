"""KDCL, ONE, BD-KD and codistillation: teachers that train beside their students, each with its negative control."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.recipes import StageHarness, build_stage, equal_weights
from helpers.shipped_recipes import resume_differences, run_recipe, short_recipe, top1_scores
from kdbench.config.load import load_recipe
from kdbench.engine.network.network import RoleChain

EXACT = "precision=float64"


def learning(name: str, *overrides: str) -> StageHarness:
    return build_stage(load_recipe(f"digits/{name}", [EXACT, *overrides]))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max(float((one[key] - other[key]).abs().max()) for key in one if one[key].is_floating_point())


def swap_gap(name: str, pair: tuple[str, str], alike: tuple[str, ...], swapped: tuple[str, ...]) -> float:
    """How much it matters which network has which name.

    Args:
        alike: overrides that make the two the same kind of network.
        swapped: overrides that exchange what they see.
    """
    one, other = learning(name, *alike), learning(name, *alike, *swapped)
    for mine, theirs in (pair, pair[::-1]):
        other.model(mine).load_state_dict(one.weights(theirs))
    one.step(5)
    other.step(5)
    return max(apart(one.weights(mine), other.weights(theirs)) for mine, theirs in (pair, pair[::-1]))


def first(run: StageHarness) -> dict[str, Tensor]:
    """The first batch of the source `train`, with every network in train mode."""
    run.network.train()
    return next(run.windows())[0]["train"]


def read(run: StageHarness) -> dict[str, float]:
    """Every term's loss in the first step."""
    run.step(1)
    return dict(run.runner.read()[0].losses)


def kl(target: Tensor, own: Tensor, temperature: float = 1) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(own / T)) of each sample."""
    q, p = (target / temperature).softmax(1), (own / temperature).softmax(1)
    return temperature**2 * (q * (q / p).log()).sum(1)


# KDCL


def kdcl_gap(*overrides: str) -> float:
    """How far the soft targets are from KDCL-MinLogit, written out class by class."""
    hand = learning("kdcl")
    batch = first(hand)
    ours, theirs = hand.model()(batch["image"]).detach(), hand.model("large")(batch["second"]).detach()
    target = torch.zeros_like(ours)
    for row, label in enumerate(batch["label"].tolist()):
        for k in range(ours.shape[1]):
            target[row, k] = min(float(z[row, k] - z[row, label]) for z in (ours, theirs))
    expected = float((kl(target, ours, 2) + kl(target, theirs, 2)).mean())
    return abs(read(learning("kdcl", *overrides))["kd"] / expected - 1)


def test_both_follow_the_least_of_their_logits():
    assert kdcl_gap() < 1e-5
    assert kdcl_gap("terms.kd.teacher={combine: mean_logits, of: [student, large]}") > 1e-3  # control
    assert kdcl_gap("models.large.input=train.image") > 1e-3  # control: one view for both


def test_the_names_in_kdcl_do_not_matter():
    alike, views = ("models.large.model=digits_mlp",), ("student.input=train.second", "models.large.input=train.image")
    assert swap_gap("kdcl", ("student", "large"), alike, views) < 1e-12
    ordered = "updates=[{models: [student], terms: [ce, kd]}, {models: [large], terms: [ce, kd]}]"
    assert swap_gap("kdcl", ("student", "large"), (*alike, ordered), views) > 1e-6  # control


# ONE

BRANCHES = ("student", "second", "third")


def one_gap(*overrides: str) -> tuple[float, float]:
    """How far the loss of the ensemble and the branches' soft targets are from the paper's."""
    full = "terms.kd.weight=1"
    hand = learning("one", full)
    batch = first(hand)
    shared = hand.model("trunk")(batch["image"])
    gate = hand.model("gate")(shared).softmax(1)
    logits = torch.stack([hand.model(name)(shared) for name in BRANCHES], 1).detach()
    ensemble = (gate.unsqueeze(2) * logits).sum(1).detach()
    expected = {
        "ensemble": float(F.cross_entropy(ensemble, batch["label"])),
        "kd": float(sum(kl(ensemble, logits[:, number], 3).mean() for number in range(3))),
    }
    found = read(learning("one", full, *overrides))
    return abs(found["ensemble"] / expected["ensemble"] - 1), abs(found["kd"] / expected["kd"] - 1)


def test_the_gated_ensemble_learns_labels_and_teaches_the_branches():
    assert max(one_gap()) < 1e-5
    mean = "{combine: mean_logits, of: [student, second, third]}"
    ensemble, kd = one_gap(f"terms.ensemble.student={mean}", f"terms.kd.teacher={mean}")
    assert min(ensemble, kd) > 1e-6  # control: an ensemble without a gate


def gate_moves(*overrides: str) -> float:
    run = learning("one", "optimizer.weight_decay=0", *overrides)
    before = run.weights("gate")
    return apart(before, run.step(3).weights("gate"))


def test_the_gate_learns_from_the_labels_of_the_ensemble_alone():
    assert gate_moves() > 1e-4
    assert gate_moves("models.gate.frozen=true") == 0  # control
    assert gate_moves("terms.ensemble.weight=0.0000001") < 1e-6  # nothing comes to it from the soft targets


def exported_needs(*scrambled: str) -> bool:
    """Whether what is evaluated and exported changes with the weights of these roles."""
    run = learning("one").step(1)
    chain = RoleChain(run.network, run.recipe.stages[0].export).eval()
    image = first(run)["image"]
    run.network.eval()
    with torch.no_grad():
        before = chain(image)
        for role in scrambled:
            for parameter in run.model(role).parameters():
                parameter.add_(1)
        return not torch.equal(before, chain(image))


def test_the_trunk_and_one_branch_are_what_is_exported():
    assert not exported_needs("second", "third", "gate")
    assert exported_needs("trunk") and exported_needs("student")  # control


# BD-KD


def bd_kd(*overrides: str) -> StageHarness:
    """The pair after some steps, when neither is always the surer one."""
    run, trained = learning("bd_kd", *overrides), _trained_pair()
    for role, state in trained.items():
        run.model(role).load_state_dict(state)
    return run


@functools.cache
def _trained_pair() -> dict[str, dict[str, Tensor]]:
    run = learning("bd_kd").step(12)
    states = {role: run.weights(role) for role in ("student", "teacher")}
    states["teacher"]["fc.weight"] *= 0.5  # a teacher that is less sure of some samples
    return states


def bd_kd_gaps(*overrides: str) -> dict[str, float]:
    """How far each divergence is from the one that is balanced by the entropies, sample by sample."""
    hand = bd_kd()
    batch = first(hand)
    ours, theirs = hand.model()(batch["image"]).detach(), hand.model("teacher")(batch["image"]).detach()
    surer = _entropy(ours) < _entropy(theirs)
    assert 0 < int(surer.sum()) < len(surer), "both kinds of sample are needed"
    expected = {
        "forward": (torch.where(surer, 2.0, 1.0) * kl(theirs, ours)).mean(),
        "reverse": (torch.where(surer, 1.0, 2.0) * kl(ours, theirs)).mean(),
        "regularise": kl(theirs, ours).mean(),
    }
    found = read(bd_kd(*overrides))
    return {name: abs(found[name] / float(value) - 1) for name, value in expected.items()}


def _entropy(logits: Tensor) -> Tensor:
    p = logits.detach().softmax(1)
    return -(p * p.log()).sum(1)


def test_the_surer_side_decides_which_divergence_counts():
    assert max(bd_kd_gaps().values()) < 1e-5
    plain = bd_kd_gaps("terms.forward.weigh=null", "terms.reverse.weigh=null")  # control
    assert min(plain["forward"], plain["reverse"]) > 1e-3
    turned = bd_kd_gaps("terms.forward.weigh.surer=teacher")
    assert turned["forward"] > 1e-3 and turned["reverse"] < 1e-5


def bd_kd_step_gap(*overrides: str) -> float:
    """How far a step is from one in which student and teacher move at once, by losses of their own."""
    hand, run = bd_kd(), bd_kd(*overrides)
    batch = first(hand)
    student, teacher = hand.model(), hand.model("teacher")
    ours, theirs = student(batch["image"]), teacher(batch["image"])
    surer = _entropy(ours) < _entropy(theirs)
    one = torch.where(surer, 2.0, 1.0) * kl(theirs.detach(), ours)
    two = torch.where(surer, 1.0, 2.0) * kl(ours, theirs.detach())
    loss = F.cross_entropy(ours, batch["label"]) + (one + two).mean()
    loss = loss + F.cross_entropy(theirs, batch["label"]) + kl(theirs, ours.detach()).mean()
    parameters = [*student.parameters(), *teacher.parameters()]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 0.05 * (gradient + 5e-4 * parameter.data)
    run.step(1)
    return max(apart(run.weights(role), hand.weights(role)) for role in ("student", "teacher"))


def test_teacher_and_student_move_at_once_by_losses_of_their_own():
    assert bd_kd_step_gap() < 1e-12
    ordered = "{models: [teacher], terms: [ce, regularise]}, {models: [student], terms: [ce, forward, reverse]}"
    assert bd_kd_step_gap(f"updates=[{ordered}]") > 1e-6  # controls: one after the other,
    assert bd_kd_step_gap("terms.regularise=null") > 1e-6  # a teacher that does not look at its student,
    assert bd_kd_step_gap("teacher.trainable=null") > 1e-3  # and one that does not learn


# Codistillation

EVERY = "models.old_{0}.every={{steps: {1}}}"


def ages(every: int, steps: int = 8) -> list[int]:
    """Before each step after the initial: how many steps ago the checkpoint of `b` was taken by which `a` is taught."""
    run = learning("codistillation", *(EVERY.format(role, every) for role in "ab"))
    past, found = [run.weights("b")], []
    for _ in range(steps):
        run.step()
        found.append(next(age for age, old in enumerate(reversed(past)) if equal_weights(old, run.weights("old_b"))))
        past.append(run.weights("b"))
    return found


def test_a_checkpoint_is_exchanged_every_so_many_steps():
    assert ages(3) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert ages(1) == [0] * 8  # control: never stale


def seen(*overrides: str) -> set[int]:
    """The training samples that both workers read in an epoch."""
    run = learning("codistillation", *overrides)
    windows = list(itertools.islice(run.windows(), run.runner.steps_per_epoch))
    workers = [{int(i) for w in windows for i in w[0][source]["index"]} for source in ("train", "other")]
    assert all(len(worker) > 400 for worker in workers)
    return workers[0] & workers[1]


def test_the_workers_share_no_sample():
    assert seen() == set()
    assert len(seen("data.other.subset.number=0")) > 400  # control


def test_the_names_of_the_workers_do_not_matter():
    alike = ("terms.codistil.weight=1", *(EVERY.format(role, 2) for role in "ab"))
    other, train = "other.image", "train.image"
    views = [f"models.{n}.input={s}" for n, s in (("a", other), ("old_b", other), ("b", train), ("old_a", train))]

    def gap(*changed: str) -> float:
        one, two = learning("codistillation", *alike, *changed), learning("codistillation", *alike, *changed, *views)
        for mine, theirs in (("a", "b"), ("b", "a")):
            two.model(mine).load_state_dict(one.weights(theirs))
            two.model(f"old_{mine}").load_state_dict(one.weights(theirs))
        one.step(5)
        two.step(5)
        return max(apart(one.weights("a"), two.weights("b")), apart(one.weights("b"), two.weights("a")))

    assert gap() < 1e-12
    assert gap("terms.codistil.student=a", "terms.codistil.teacher=old_b") > 1e-6  # control: only one is taught


# Kill and resume


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("codistillation", [*(EVERY.format(role, 3) for role in "ab"), "terms.codistil.weight=1"]),
        ("one", []),
        ("kdcl", []),
        ("bd_kd", []),
    ],
)
def test_the_same_after_a_kill(name, overrides, tmp_path):
    assert resume_differences(short_recipe(f"digits/{name}", *overrides, steps=5), tmp_path, 4) == []


# Whole runs: seen with seed 1 were 97.8 (kdcl), 98.0 (one), 97.1 (bd_kd), 95.8 (codistillation).


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bar", "role"),
    [("kdcl", 95, "student"), ("one", 95, "student"), ("bd_kd", 95, "student"), ("codistillation", 92, "a")],
)
def test_the_whole_recipe_learns(name, bar, role, tmp_path):
    assert top1_scores(run_recipe(load_recipe(f"digits/{name}"), tmp_path), role)[-1] > bar
