"""Tests blockwise distillation (blocks train independently of each other) and students of copied teacher blocks."""

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


def only(*blocks: str) -> tuple[str, ...]:
    """Returns overrides that remove the terms of all other blocks."""
    return tuple(f"stages.blocks.terms.{name}=null" for name in BLOCKS if name not in blocks)


def loss_curve(block: str, *overrides: str, steps: int = 4) -> list[float]:
    """Returns the loss of one block over the first steps."""
    run = build_stage(short_recipe("digits/blockwise", *overrides))
    losses = []
    for _ in range(steps):
        run.step()
        losses.append(run.runner.read_log()[0].losses[block])
    return losses


def is_independent(*overrides: str) -> bool:
    """Returns True if the second block has the same losses, to the last bit, with and without the other blocks."""
    return loss_curve("block2", *overrides) == loss_curve("block2", *overrides, *only("block2"))


def test_block_trains_independently_of_the_other_blocks():
    assert is_independent()
    assert not is_independent(*CHAINED), "control: a block on the student's own features depends on the previous block"


@pytest.mark.parametrize("block", BLOCKS)
def test_loss_of_each_block_falls(block):
    losses = loss_curve(block, *only(block), steps=12)
    assert losses[-1] < losses[0]


def updated_layers(run: StageHarness) -> set[str]:
    """Takes two steps and returns the layers whose weights changed."""
    before = run.weights()
    after = run.step(2).weights()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_gradients_stay_within_a_block():
    assert updated_layers(build_stage(short_recipe("digits/blockwise", *only("block2")))) == {"layer2"}
    assert updated_layers(build_stage(short_recipe("digits/blockwise", *only("block2"), *CHAINED))) == {
        "layer1",
        "layer2",
    }, "control"


def test_second_stage_starts_from_the_blocks_and_trains_all_of_them(tmp_path):
    outcome = run_recipe(short_recipe("digits/blockwise"), tmp_path / "run")
    tree = torch.load(outcome.folder.stage("blocks"), weights_only=True)["models"]["student"]
    no_updates = "stages.whole.optimizer={type: SGD, lr: 0}"
    fixed = run_recipe(short_recipe("digits/blockwise", no_updates), tmp_path / "fixed")
    after = torch.load(fixed.folder.last, weights_only=True)["models"]["student"]
    assert all(torch.equal(after[name], tree[name]) for name in tree if name.endswith("weight"))
    layers = updated_layers(build_stage(short_recipe("digits/blockwise"), stage=1))
    assert layers == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


def stitched_recipe(folder, *, copied: bool = True) -> tuple[Recipe, dict[str, Tensor]]:
    """Returns the recipe with an untrained teacher and learning rate 0, and the teacher's weights."""
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


def has_every_second_block(folder, *, copied: bool = True) -> bool:
    """Checks that block i of the student equals block 2i of the teacher."""
    recipe, teacher = stitched_recipe(folder, copied=copied)
    student = torch.load(run_recipe(recipe, folder / f"run{copied}").folder.last, weights_only=True)["models"][
        "student"
    ]
    pairs = {}
    for name in student:
        stage, _, rest = name.partition(".")
        if stage.startswith("layer"):
            block, _, rest = rest.partition(".")
            pairs[name] = f"{stage}.{2 * int(block)}.{rest}"
        else:
            pairs[name] = name
    parameters = [name for name in student if "running" not in name and "num_batches" not in name]
    return all(torch.equal(student[name], teacher[pairs[name]]) for name in parameters)


def test_stitched_student_has_every_second_block_of_its_teacher(tmp_path):
    assert has_every_second_block(tmp_path)
    assert not has_every_second_block(tmp_path, copied=False), "control: random initialisation"


def test_stitched_student_trains_all_copied_layers(tmp_path):
    run = build_stage(short_recipe("digits/stitched"))
    assert updated_layers(run) == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("digits/blockwise", (1, 3)), ("digits/stitched", (1,))])
def test_interrupted_run_resumes(name, steps, tmp_path):
    assert resume_differences(short_recipe(name), tmp_path, *steps) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accuracy"), [("digits/blockwise", 95.0), ("digits/stitched", 95.0)])  # 98.7, 98.8
def test_full_run_reaches_the_accuracy(name, accuracy):
    assert top1_scores(run_recipe(load_recipe(name, []), "whole"))[-1] > accuracy
