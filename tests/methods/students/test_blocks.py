"""Block by block: each block's loss falls alone, and no gradient crosses a border; a student of teacher's blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.recipes import StageHarness, build_stage
from helpers.shipped_recipes import resume_differences, run_recipe, short_recipe, top1_scores
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.registry import MODELS

BLOCKS = ("stem", "block1", "block2", "block3", "head")
CHAINED = ("stages.blocks.models.block2.input=block1:logits",)


def only(*kept: str) -> tuple[str, ...]:
    return tuple(f"stages.blocks.terms.{name}=null" for name in BLOCKS if name not in kept)


def curve(block: str, *overrides: str, steps: int = 4) -> list[float]:
    """The loss of one block over the first steps."""
    run = build_stage(short_recipe("digits/blockwise", *overrides))
    found = []
    for _ in range(steps):
        run.step()
        found.append(run.runner.read()[0].losses[block])
    return found


def alone(*overrides: str) -> bool:
    """Whether the second block learns the same, to the last bit, with the others and without them."""
    return curve("block2", *overrides) == curve("block2", *overrides, *only("block2"))


def test_a_block_learns_as_if_it_were_alone():
    assert alone()
    assert not alone(*CHAINED), "control: a block that sees the student's own features depends on the block before"


@pytest.mark.parametrize("block", BLOCKS)
def test_each_blocks_loss_falls_alone(block):
    falling = curve(block, *only(block), steps=12)
    assert falling[-1] < falling[0]


def moved(run: StageHarness) -> set[str]:
    before = run.weights()
    after = run.step(2).weights()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_no_gradient_crosses_the_border_of_a_block():
    assert moved(build_stage(short_recipe("digits/blockwise", *only("block2")))) == {"layer2"}
    assert moved(build_stage(short_recipe("digits/blockwise", *only("block2"), *CHAINED))) == {"layer1", "layer2"}, "control"


def test_the_second_stage_starts_from_the_blocks_and_trains_them_together(tmp_path):
    outcome = run_recipe(short_recipe("digits/blockwise"), tmp_path / "run")
    tree = torch.load(outcome.folder.stage("blocks"), weights_only=True)["models"]["student"]
    still = "stages.whole.optimizer={type: SGD, lr: 0}"
    held = run_recipe(short_recipe("digits/blockwise", still), tmp_path / "still")
    after = torch.load(held.folder.last, weights_only=True)["models"]["student"]
    assert all(torch.equal(after[name], tree[name]) for name in tree if name.endswith("weight"))
    whole = moved(build_stage(short_recipe("digits/blockwise"), stage=1))
    assert whole == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


def stitched(folder, *, copied: bool = True) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe on an untrained teacher's weights, at learning rate 0; and those weights."""
    torch.manual_seed(7)
    teacher = MODELS.build("digits_resnet", {"blocks": 3}).state_dict()
    torch.save(teacher, folder / "teacher.pt")
    recipe = load_recipe("digits/stitched", ["optimizer.lr=0"])
    stage = recipe.stages[0]
    roles = {}
    for name, role in stage.roles.items():
        assert role.weights is not None
        weights = replace(role.weights, recipe=None, model=None, path=str(folder / "teacher.pt"))
        roles[name] = replace(role, weights=weights if copied or name == "teacher" else None)
    return short_recipe(replace(recipe, stages=(replace(stage, roles=roles),)), steps=1), teacher


def copies(folder, *, copied: bool = True) -> bool:
    """Whether block i of the student is block 2i of the teacher."""
    recipe, teacher = stitched(folder, copied=copied)
    student = torch.load(run_recipe(recipe, folder / f"run{copied}").folder.last, weights_only=True)["models"]["student"]
    pairs = {}
    for name in student:
        stage, _, rest = name.partition(".")
        if stage.startswith("layer"):
            block, _, rest = rest.partition(".")
            pairs[name] = f"{stage}.{2 * int(block)}.{rest}"
        else:
            pairs[name] = name
    learnt = [name for name in student if "running" not in name and "num_batches" not in name]
    return all(torch.equal(student[name], teacher[pairs[name]]) for name in learnt)


def test_a_stitched_student_has_every_second_block_of_its_teacher(tmp_path):
    assert copies(tmp_path)
    assert not copies(tmp_path, copied=False), "control: drawn from the seed"


def test_a_stitched_student_trains_all_that_it_copied(tmp_path):
    run = build_stage(short_recipe("digits/stitched"))
    assert moved(run) == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


@pytest.mark.parametrize(("name", "after"), [("digits/blockwise", (1, 3)), ("digits/stitched", (1,))])
def test_a_killed_run_ends_as_an_undisturbed_one(name, after, tmp_path):
    assert resume_differences(short_recipe(name), tmp_path, *after) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar"), [("digits/blockwise", 95.0), ("digits/stitched", 95.0)])  # 98.7, 98.8
def test_the_student_learns(name, bar):
    assert top1_scores(run_recipe(load_recipe(name, []), "whole"))[-1] > bar
