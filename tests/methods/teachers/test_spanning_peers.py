"""DML, FitNets, mean teacher and TAKD: the property of each, gone where its mechanism is switched off."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.recipes import StageHarness, build_stage, comparable_results, differing_keys, equal_weights
from helpers.shipped_recipes import (
    StopRun,
    logged_losses,
    resume_differences,
    run_recipe,
    saved_weights,
    short_recipe,
    stop_after_steps,
    top1_scores,
)
from kdbench.config.load import load_recipe
from kdbench.config.paths import find_recipe
from kdbench.config.schema import PartConfig
from kdbench.engine.train.runner import Runner

EXACT = "precision=float64"


def peers(name: str, *overrides: str, stage: int = 0) -> StageHarness:
    return build_stage(load_recipe(f"digits/{name}", [EXACT, *overrides]), stage=stage)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max(float((one[key] - other[key]).abs().max()) for key in one if one[key].is_floating_point())


# Deep mutual learning

ORDERED = "updates=[{models: [a], terms: [ce, kl]}, {models: [b], terms: [ce, kl]}]"


def swap_gap(*overrides: str) -> float:
    """How much it matters which of the peers is called `a`."""
    one, other = peers("dml", *overrides), peers("dml", *overrides)
    for mine, theirs in (("a", "b"), ("b", "a")):
        other.model(mine).load_state_dict(one.weights(theirs))
    one.step(5)
    other.step(5)
    return max(apart(one.weights("a"), other.weights("b")), apart(one.weights("b"), other.weights("a")))


def dml_by_hand(ordered: bool, steps: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The paper's losses and SGD, written out; `ordered` is its algorithm 1."""
    run = peers("dml")
    models = [run.model("a"), run.model("b")]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4) for m in models]

    def differentiate(number: int, image: Tensor, label: Tensor) -> None:
        own, other = models[number](image), models[1 - number](image).detach()
        q = other.softmax(1)
        loss = F.cross_entropy(own, label) + (q * (q.log() - own.log_softmax(1))).sum(1).mean()
        optimizers[number].zero_grad()
        loss.backward()

    for window in itertools.islice(run.windows(), steps):
        batch = window[0]["train"]
        for number in (0, 1):
            differentiate(number, batch["image"], batch["label"])
            if ordered:
                optimizers[number].step()
        if not ordered:
            for optimizer in optimizers:
                optimizer.step()
    return run.weights("a"), run.weights("b")


def dml_gap(ordered: bool, *overrides: str) -> float:
    run = peers("dml", *overrides).step(4)
    a, b = dml_by_hand(ordered)
    return max(apart(run.weights("a"), a), apart(run.weights("b"), b))


def test_the_names_of_peers_that_move_at_once_do_not_matter():
    assert swap_gap() < 1e-12
    assert swap_gap(ORDERED) > 1e-4  # control: one after the other, the second is better informed


def test_peers_move_at_once_as_the_formula_says():
    assert dml_gap(False) < 1e-12
    assert dml_gap(False, "terms.kl=null") > 1e-3  # control: nobody teaches
    assert dml_gap(False, ORDERED) > 1e-5


def test_in_algorithm_1_the_second_sees_the_firsts_new_weights():
    assert dml_gap(True, ORDERED) < 1e-12
    assert dml_gap(True) > 1e-5  # control: both at once, the second sees the old ones


def test_dml_is_the_same_after_a_kill(tmp_path):
    assert resume_differences(short_recipe("digits/dml", steps=4), tmp_path, 2) == []
    assert resume_differences(short_recipe("digits/dml", ORDERED, steps=4), tmp_path / "ordered", 3) == []


# FitNets


def handed_on(tmp_path: Path, *overrides: str) -> float:
    """How far the weights by which the second stage begins are from those that the first one left."""
    done = run_recipe(short_recipe("digits/fitnets", "stages.distil.epochs=0", *overrides, steps=3), tmp_path)
    return apart(saved_weights(done, "student", "hint"), saved_weights(done, "student"))


def test_the_second_stage_begins_where_the_hint_left_the_student(tmp_path):
    assert handed_on(tmp_path / "handed") == 0
    assert handed_on(tmp_path / "anew", "stages.distil.student.weights=null") > 0.01  # control: drawn anew


def touched(*overrides: str) -> set[str]:
    """The parts of the student that the first stage moves."""
    run = peers("fitnets", *overrides)
    before = run.weights()
    run.step(3)
    return {key.split(".")[0] for key, value in run.weights().items() if not torch.equal(value, before[key])}


def test_the_hint_moves_the_guided_half_alone():
    assert touched() == {"conv1", "bn1", "layer1", "layer2"}
    ahead = "stages.hint.terms.hint.student=layer3"
    assert "layer3" in touched(ahead, "stages.hint.terms.hint.teacher=layer3")  # control: a hint further up moves more


def test_the_hint_is_learnt(tmp_path):
    def fall(name: str, *overrides: str) -> float:
        done = run_recipe(short_recipe("digits/fitnets", "stages.distil.epochs=0", *overrides, steps=40), tmp_path / name)
        found = logged_losses(done, "hint")
        return found[-1] / found[0]

    assert fall("learns") < 0.6  # 0.3 was seen
    assert fall("rests", "stages.hint.optimizer.lr=0") > 0.8  # control


def test_fitnets_goes_on_in_the_stage_in_which_it_was_killed(tmp_path):
    assert resume_differences(short_recipe("digits/fitnets", steps=3), tmp_path, 2, 4) == []


# Mean teacher


def average_gap(*overrides: str) -> float:
    """How far the teacher is from the average, decay 0.98, of the student's weights on its way."""
    run = peers("mean_teacher", *overrides)
    average = run.weights()
    for _ in range(5):
        student = run.step().weights()
        average = {k: 0.98 * average[k] + 0.02 * v if v.is_floating_point() else v for k, v in student.items()}
    assert not equal_weights(run.weights("teacher"), peers("mean_teacher").weights())
    return apart(run.weights("teacher"), average)


def test_the_teacher_is_the_average_of_the_students_past():
    assert average_gap() < 1e-12
    assert average_gap("teacher.decay=0.001") > 1e-3  # control: all but the student of this moment


def step_gap(*overrides: str) -> float:
    """How far a step is from the paper's, written out: labels where there are, consistency of two views everywhere."""
    full = "terms.consistency.weight=20"
    run, hand = peers("mean_teacher", full, *overrides), peers("mean_teacher", full)
    run.step(2)
    hand.step(1)  # from the second step on the teacher is not the student
    batch = next(hand.windows())[0]["train"]
    known = batch["label"] >= 0
    assert 0 < int(known.sum()) < len(known) and not torch.equal(batch["image"], batch["other"])
    hand.network.train()
    ours = hand.model()(batch["image"])
    with torch.no_grad():
        theirs = hand.model("teacher")(batch["other"]).softmax(1)
    consistency = ((ours.softmax(1) - theirs) ** 2).mean(1).mean()
    labels = F.cross_entropy(ours[known], batch["label"][known])
    optimizer = hand.runner.updates[0].optimizer
    optimizer.zero_grad()
    (labels + 20 * consistency).backward()
    optimizer.step()
    return apart(run.weights(), hand.weights())


def test_labels_where_they_are_known_and_consistency_of_two_views_everywhere():
    assert step_gap() < 1e-12
    assert step_gap("teacher.input=train.image") > 1e-6  # controls: one view for both,
    assert step_gap("terms.consistency.where=labelled") > 1e-6  # nothing to learn where no label is known,
    assert step_gap("terms.consistency=null") > 1e-6  # and no teacher


def test_consistency_comes_in_slowly():
    run = peers("mean_teacher")
    schedule = load_recipe("digits/mean_teacher").stages[0].terms["consistency"].weight
    assert isinstance(schedule, PartConfig)
    top = float(schedule.params["value"])
    run.runner.begin_step()
    assert float(run.network.term("consistency").weight) == pytest.approx(top * 0.0067379, rel=1e-4)
    run.runner.steps_done = run.runner.steps_per_epoch * int(schedule.params["over"])
    run.runner.begin_step()
    assert float(run.network.term("consistency").weight) == top


def test_mean_teacher_is_the_same_after_a_kill(tmp_path):
    assert resume_differences(short_recipe("digits/mean_teacher", steps=4), tmp_path, 2) == []


# TAKD

CHAIN = ("teacher", "takd_assistant", "takd")


@pytest.fixture
def chain() -> str:
    """The shipped recipes of the chain, copied beside each other, with one epoch each; the last one's path."""
    for name in CHAIN:
        text = find_recipe(f"digits/{name}", Path())[1].read_text()
        text = re.sub(r"(?m)^epochs: \d+", "epochs: 1", text).replace(", require: {top1: 95}", "")
        Path(f"{name}.yaml").write_text(re.sub(r"recipe: digits/(\w+)", r"recipe: \1.yaml", text))
    return "takd.yaml"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How many steps each recipe took."""
    step, found = Runner.step, Counter[str]()

    def counting(self: Runner, window: object) -> None:
        found[Path(self.recipe.name).name] += 1
        step(self, window)  # type: ignore[arg-type]

    Runner.step = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Runner.step = step  # type: ignore[method-assign]


def trained(recipe: str, out: str, *overrides: str) -> set[str]:
    with counted() as found:
        run_recipe(load_recipe(recipe, list(overrides)), out)
    return set(found)


def test_each_of_the_chain_is_trained_once_and_found_again(chain):
    assert trained(chain, "one") == set(CHAIN)
    assert trained(chain, "two", "terms.kd.temperature=2") == {"takd"}
    assert trained(chain, "three", "runs=elsewhere") == set(CHAIN)  # control: where nothing was trained, all is


def test_the_assistant_stands_between(chain):
    direct = ["teacher={model: digits_cnn, weights: {recipe: teacher.yaml}}"]
    assert trained(chain, "chain") == set(CHAIN)
    assert "takd_assistant" not in trained(chain, "direct", "runs=elsewhere", *direct)  # control
    one, two = (comparable_results(out) for out in ("chain", "direct"))
    assert any("models.student" in key for key in differing_keys(one, two))


def test_the_student_learns_what_the_assistant_says_and_not_what_the_teacher_says(chain):
    def target_is(recipe: str, *overrides: str) -> bool:
        """Whether the first step's soft targets are the assistant's."""
        done = run_recipe(load_recipe(recipe, ["epochs=null", "steps=1", "log_every=1", *overrides]), f"run{len(overrides)}")
        student = build_stage(load_recipe(recipe, list(overrides)))
        assistant = build_stage(load_recipe("takd_assistant.yaml"))
        folders = [path.parent for path in Path("runs").rglob("resolved.yaml") if "takd_assistant" in str(path)]
        assistant.model().load_state_dict(saved_weights(folders[0], "student"))
        batch = next(student.windows())[0]["train"]["image"]
        student.network.train()
        assistant.network.eval()
        q = (assistant.model()(batch).detach().double() / 4).softmax(1)
        p = (student.model()(batch).detach().double() / 4).softmax(1)
        loss = float(16 * (q * (q / p).log()).sum(1).mean())
        return logged_losses(done, "kd")[0] == pytest.approx(loss, rel=1e-4)

    assert target_is(chain)
    assert not target_is(chain, "teacher={model: digits_cnn, weights: {recipe: teacher.yaml}}")  # control


def test_a_chain_that_is_killed_in_an_assistants_training_goes_on_there(chain):
    run_recipe(load_recipe(chain, ["runs=whole"]), "whole_chain")
    with pytest.raises(StopRun), stop_after_steps(20):  # 15 steps of the teacher, 5 of the assistant
        run_recipe(load_recipe(chain, ["checkpoint_every={steps: 1}"]), "chain")
    assert trained(chain, "chain") == {"takd_assistant", "takd"}
    weights_of = [saved_weights(out, "student") for out in ("whole_chain", "chain")]
    assert equal_weights(*weights_of)


# Whole runs: seen with seed 1 were 97.3 (dml), 97.0 (fitnets), 88.0 (mean_teacher; 89.2 with seed 2), 95.8 (takd).


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bar", "role"),
    [("dml", 95, "a"), ("fitnets", 93, "student"), ("mean_teacher", 84, "teacher"), ("takd", 91, "student")],
)
def test_the_whole_recipe_learns(name, bar, role, tmp_path):
    assert top1_scores(run_recipe(load_recipe(f"digits/{name}"), tmp_path / "run"), role)[-1] > bar


@pytest.mark.slow
def test_mean_teacher_is_better_than_its_student_without_it(tmp_path):
    """Seen: 88.0 against 78 (seeds 1 and 2)."""
    alone = run_recipe(load_recipe("digits/mean_teacher", ["terms.consistency=null"]), tmp_path / "alone")
    assert (
        top1_scores(run_recipe(load_recipe("digits/mean_teacher"), tmp_path / "with"), "teacher")[-1]
        > 3 + top1_scores(alone, "teacher")[-1]
    )
