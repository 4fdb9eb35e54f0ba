"""Networks that teach themselves: their memory survives a stop, and nothing of what helped them is handed out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.recipes import StageHarness, build_stage
from helpers.shipped_recipes import (
    logged_losses,
    resume_differences,
    run_manifest,
    run_recipe,
    saved_weights,
    short_recipe,
    top1_scores,
)
from kdbench.config.load import load_recipe
from kdbench.experiment.run import Outcome
from kdbench.registry import MODELS

RECIPES = ["ps_kd", "born_again", "byot", "dlb", "tf_kd", "tf_kd_self", "two_inputs", "rco"]
SMALL = "data.train.subset=40"


def quick(name: str, *overrides: str, steps: int = 2):
    return short_recipe(f"digits/{name}", "eval_every=1000", *overrides, steps=steps)


def extra_parts(outcome: Outcome, model: str, stage_export: str = "student") -> set[str]:
    """What the exported role holds that a network of this kind by itself does not, and the other way round."""
    plain = {name: tuple(value.shape) for name, value in MODELS.build(model, {}).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in saved_weights(outcome, stage_export).items()}
    return {name for name in {**plain, **found} if plain.get(name) != found.get(name)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_exported_student_is_the_plain_network(name, tmp_path):
    outcome = run_recipe(quick(name, steps=1), tmp_path / "run")
    assert extra_parts(outcome, "digits_mlp" if name == "rco" else "digits_cnn") == set()


def test_an_auxiliary_part_would_be_seen(tmp_path):
    """Negative control: the deepest exit handed out instead of the network."""
    outcome = run_recipe(quick("byot", "export=exit1", steps=1), tmp_path / "run")
    assert extra_parts(outcome, "digits_cnn", "exit1")


@pytest.mark.parametrize(("name", "after"), [("ps_kd", 7), ("dlb", 3), ("born_again", 3), ("byot", 2)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(name, after, tmp_path):
    """PS-KD in its second epoch, where the store counts; born-again in the midst of its second generation."""
    recipe = quick(name, "batch_size=32", steps=8 if name == "ps_kd" else 4 if name == "dlb" else 2)
    assert resume_differences(recipe, tmp_path, after) == []


# What each step's loss should be, by plain float64 sums over what the network said


def watched(run: StageHarness, term: str, steps: int, expected: Callable[[int, Tensor, dict[str, Tensor]], float]) -> float:
    """The largest difference of a term's loss from `expected(step, logits, batch)`, over some steps."""
    said: list[Tensor] = []
    handle = run.model().register_forward_hook(lambda module, seen, out: said.append(out.detach().double()))
    worst, windows = 0.0, run.windows()
    for step in range(steps):
        window = next(windows)
        run.runner.begin_step()
        run.runner.step(window)
        reading, _ = run.runner.read()
        worst = max(worst, abs(reading.losses[term] - expected(step, said[-1], window[0]["train"])))
    handle.remove()
    return worst


def ps_kd_departs(*overrides: str, epochs: int = 4) -> float:
    recipe = load_recipe("digits/ps_kd", [f"epochs={epochs}", SMALL, "batch_size=20", *overrides])
    store: dict[int, Tensor] = {}

    def expected(step: int, logits: Tensor, batch: dict[str, Tensor]) -> float:
        alpha, total = 0.8 * (step // 2) / epochs, 0.0
        for z, label, index in zip(logits, batch["label"].tolist(), batch["index"].tolist(), strict=True):
            p = torch.exp(z - torch.logsumexp(z, 0))
            hard = torch.zeros(10, dtype=torch.float64)
            hard[label] = 1
            target = hard if index not in store else (1 - alpha) * hard + alpha * store[index]
            total -= float((target * p.log()).sum())
            store[index] = p
        return total / len(logits)

    return watched(build_stage(recipe), "targets", 2 * epochs, expected)


def test_ps_kd_mixes_the_label_with_what_it_said_an_epoch_ago():
    assert ps_kd_departs() < 1e-5
    assert ps_kd_departs("terms.targets.alpha=0") > 1e-2, "negative control: labels alone"


def dlb_departs(*overrides: str) -> float:
    recipe = load_recipe("digits/dlb", ["data.train.subset=60", "batch_size=20", "epochs=2", *overrides])
    before: dict[int, Tensor] = {}

    def expected(step: int, logits: Tensor, batch: dict[str, Tensor]) -> float:
        repeated = 0 if step == 0 else 10
        assert step == 0 or len(logits) == 20
        total = 0.0
        for row in range(repeated):
            old = before.get(int(batch["index"][row]))
            if old is None:
                return math.inf
            p, q = torch.softmax(old / 3, 0), torch.softmax(logits[row] / 3, 0)
            total += 9 * float((p * (p / q).log()).sum())
        before.clear()
        before.update({int(i): z for i, z in zip(batch["index"], logits, strict=True)})
        return total / len(logits)

    return watched(build_stage(recipe), "last", 5, expected)


def test_dlb_compares_the_repeated_half_with_what_it_was_in_the_last_batch():
    assert dlb_departs() < 1e-5
    assert dlb_departs("data.train.overlap=false", "batch_size=20") == math.inf, "negative control: nothing is repeated"


def tf_kd_departs(*overrides: str) -> float:
    recipe = load_recipe("digits/tf_kd", [SMALL, "batch_size=20", "epochs=1", *overrides])

    def expected(step: int, logits: Tensor, batch: dict[str, Tensor]) -> float:
        total = 0.0
        for z, label in zip(logits, batch["label"].tolist(), strict=True):
            v = torch.full((10,), 0.01 / 9, dtype=torch.float64)
            v[label] = 0.99
            u = torch.softmax(v / 20, 0)
            total += float((u * (u.log() - torch.log_softmax(z, 0))).sum())
        return total / len(logits)

    return watched(build_stage(recipe), "virtual", 2, expected)


def test_tf_kd_has_a_teacher_made_by_hand():
    assert tf_kd_departs() < 1e-5
    assert tf_kd_departs("terms.virtual.temperature=1") > 1e-2, "negative control: not softened"


# Who moves, and who is the teacher


def moved_by_kd(*overrides: str) -> set[str]:
    """Which parts of BYOT's network and exits one step moves by the soft targets alone."""
    off = ["~terms.ce", "~terms.ce_exits", "~terms.hint", "optimizer.weight_decay=0", SMALL, "batch_size=20"]
    run = build_stage(load_recipe("digits/byot", [*off, *overrides]))
    before = {f"{r}.{n}": p.clone() for r in ("student", "exit1", "exit2") for n, p in run.model(r).named_parameters()}
    run.step(1)
    after = {f"{r}.{n}": p for r in ("student", "exit1", "exit2") for n, p in run.model(r).named_parameters()}
    return {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}


def test_the_deepest_exit_teaches_and_is_not_taught():
    moved = moved_by_kd()
    assert {"student.layer1", "student.layer2", "exit1.fc", "exit2.fc"} <= moved
    assert not moved & {"student.layer3", "student.fc"}
    assert "student.fc" in moved_by_kd("terms.kd.teacher_grad=true"), "negative control: gradients flow both ways"


def test_each_generation_begins_anew_and_learns_from_the_one_before(tmp_path):
    def broken(*overrides: str) -> list[str]:
        name = f"run{len(list(tmp_path.iterdir()))}"
        outcome = run_recipe(quick("born_again", "optimizer.lr=1e-9", *overrides, steps=1), tmp_path / name)
        stages = ["first", "generation@1", "generation@2"]
        found = [saved_weights(outcome, "student", stage)["layer1.0.weight"] for stage in stages[:2]]
        found.append(saved_weights(outcome, "student")["layer1.0.weight"])
        same = [f"{a} and {b} begin alike" for a, b in ((0, 1), (0, 2), (1, 2)) if torch.allclose(found[a], found[b])]
        origin = run_manifest(outcome)["roles"]["teacher"]["weights"]["source"]
        return same + ([] if "generation@1" in origin else [f"the last is taught by {origin}"])

    assert broken() == []
    alike = "stages.born_again.rounds=[{}, {}]"
    assert broken(alike) != [], "negative control: one draw for all"


def two_views(*overrides: str) -> tuple[float, float, bool]:
    """The loss of both directions, that of an independent sum, and whether both roles are one network."""
    run = build_stage(load_recipe("digits/two_inputs", [SMALL, "batch_size=20", *overrides]))
    said: list[Tensor] = []
    run.model().register_forward_hook(lambda module, seen, out: said.append(out.detach().double()))
    run.step(1)
    reading, _ = run.runner.read()
    a, b = (torch.log_softmax(z / 3, 1) for z in said[:2])
    both = F.kl_div(a, b, log_target=True, reduction="batchmean") + F.kl_div(
        b, a, log_target=True, reduction="batchmean"
    )
    return reading.losses["kd"], 9 * float(both), run.model("mirror") is run.model()


def test_two_inputs_of_one_network_teach_each_other():
    loss, expected, one = two_views()
    assert one and loss == pytest.approx(expected, rel=1e-4) and loss > 1e-3
    assert two_views("models.mirror.input=image")[0] < 1e-9, "negative control: the same view teaches nothing"


TEACHER = """
dataset: digits
data: {train: {subset: 40}}
student: digits_cnn
terms: {ce: cross_entropy}
optimizer: {type: SGD, lr: 0.05}
batch_size: 16
epochs: 3
"""


def anchors(folder, *epochs: int) -> tuple[int, list[str]]:
    """How many different teachers RCO's student followed, by what they say of one batch; where it did not go on."""
    (folder / "teacher.yaml").write_text(TEACHER, encoding="utf-8")
    rounds = ", ".join(f"{{teacher: {{weights: {{epoch: {epoch}}}}}}}" for epoch in epochs)
    recipe = short_recipe(
        "digits/rco",
        f"teacher.weights.recipe={folder / 'teacher.yaml'}",
        f"stages.route.rounds=[{rounds}]",
        f"runs={folder / 'runs'}",
        "eval_every=1000",
        "optimizer.lr=1e-9",
        steps=1,
        teachers=True,
    )
    outcome = run_recipe(recipe, folder / f"run{'-'.join(map(str, epochs))}")
    found = []
    for earlier, later in (("follow@1", "follow@2"), ("follow@2", None)):
        one, other = saved_weights(outcome, "student", earlier), saved_weights(outcome, "student", later)
        found += [f"{earlier} is not gone on from" for name in one if not torch.allclose(one[name], other[name])]
    return len({round(loss, 5) for loss in logged_losses(outcome, "kd")}), found


def test_rco_follows_the_teacher_on_its_way(tmp_path):
    assert anchors(tmp_path, 1, 2, 3) == (3, [])
    assert anchors(tmp_path, 3, 3, 3)[0] == 1, "negative control: the trained teacher all the way, on the same batch"


BARS = {
    "ps_kd": 90,
    "born_again": 90,
    "byot": 91,
    "dlb": 92,
    "tf_kd": 90,
    "tf_kd_self": 88,
    "two_inputs": 91,
    "rco": 94,
}
"""Top-1 in percent of the whole run, well below what was seen with seeds 1 and 2."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_recipe_learns_in_less_than_a_minute(name, tmp_path):
    outcome = run_recipe(load_recipe(f"digits/{name}", ["tensorboard=false"]), tmp_path / "run")
    assert top1_scores(outcome)[-1] >= BARS[name]
    assert outcome.summary["wall_seconds"] < 60
