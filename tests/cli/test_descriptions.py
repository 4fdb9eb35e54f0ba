"""What `check` says of the recipes that span the wirings: each sentence is true, and reads well aloud."""

from __future__ import annotations

from functools import cache

import pytest

from kdbench.cli.descriptions import count_text, describe_stage, join_names
from kdbench.config.load import load_recipe
from kdbench.experiment.artifacts import plan_stages

SPANNING = [
    *("dml", "dafl", "zskt", "fitnets", "mean_teacher", "takd"),
    *("mst_distill", "lwf", "fedmd", "hard", "scrub"),
]


@cache
def sentences(recipe: str) -> dict[str, list[str]]:
    return {plan.stage.name: describe_stage(plan) for plan in plan_stages(load_recipe(recipe))}


SAID = {
    ("digits/dml", "main"): ["kl: a:logits learns from b:logits; b:logits learns from a:logits."],
    ("digits/cv_dd", "learn"): [
        "c (digits_resnet, from digits/teacher) sees train.image, runs in train mode (its BatchNorms by the batch's "
        "own statistics), but no update moves it.",
        "each step moves student by kd with AdamW(lr 0.003, weight_decay 0.01).",
    ],
    ("digits/dafl", "main"): [
        "sure: is taken of teacher:logits alone.",
        "update 1 of each step moves generator by sure, varied, excited with Adam(lr 0.001).",
    ],
    ("digits/zskt", "main"): [
        "disagree: student:logits is driven away from teacher:logits, the teacher gets gradient too, times -1.",
        "update 2 of each step moves student by agree, attention with Adam(lr 0.005), 5 times.",
    ],
    ("digits/fitnets", "distil"): [
        "student (digits_resnet, from stage hint) sees train.image, learns; it is what the recipe is for (exported).",
        "kd: student:logits learns from teacher:logits, times linear(start 0.44, end 0.11).",
    ],
    ("digits/mean_teacher", "main"): [
        "teacher (as student) sees train.other, is the moving average of student (decay 0.98); it is what the recipe "
        "is for (exported).",
        "ce: student:logits learns from the labels.",
    ],
    ("digits/takd", "main"): [
        "teacher (digits_mlp, from digits/takd_assistant) sees train.image, is frozen (eval mode, no gradient to its "
        "parameters).",
    ],
    ("digits/mst_distill", "together"): [
        "both_mask1, both_mid1, both_by1, both_mask2, both_by2, other_mask1, other_mid1, other_by1, other_mask2 and "
        "other_by2 do not run: nothing here reads them.",
    ],
    ("digits/mst_distill", "distil"): [
        "kd: student:logits learns from both_by1:logits, both_by2:logits, other_by1:logits and other_by2:logits, "
        "routed by top_k(k 2), which reads student:logits, times step(milestones [1, 7, 13, 19], gamma 0.5, start 1).",
    ],
    ("digits/lwf", "learn@2"): [
        "teacher (digits_cnn, from stage warm_up@2, its student) sees train.image, is frozen (eval mode, no gradient "
        "to its parameters).",
        "was2 (task_logits) sees teacher:logits, has no parameters.",
    ],
    ("digits/fedmd", "digest@1"): [
        "said_cnn (as cnn) sees train.image, is a copy of cnn as it is when the stage begins, and runs only as far as "
        "fc.",
    ],
    ("digits/fedmd", "revisit@1"): [
        "source home2: digits train (balanced(amount 100, rest true), then shard(of 3, number 1, scheme dirichlet, "
        "alpha 0.3)), samples not counted yet, 10 classes, image 1 x 8 x 8, batches of 32.",
    ],
    ("digits/hard", "main"): [
        "plain_teacher (as teacher) sees train.image, is the very network of teacher.",
        "disagree: student:logits is driven away from teacher:logits, the teacher gets gradient too, times -1.",
    ],
    ("digits/scrub", "away@1"): [
        "forget: student:logits is driven away from teacher:logits, times -1.",
        "1 epoch; learning rate: constant; precision float32; evaluated at the end.",
    ],
    ("digits/hpcr", "learn@1"): [
        "contrast: student:logits learns from the labels, with replayed again:logits and replayed_label memory.label, "
        "times cosine(start 0.5625, end 1.8, over 250, by step).",
        "source memory: digits train (chosen by first.memory), samples not counted yet, 10 classes, image 1 x 8 x 8, "
        "batches of 10.",
    ],
    ("digits/one", "main"): [
        "ensemble: the gate of student:logits, second:logits and third:logits (with gate gate:logits) learns from the "
        "labels.",
    ],
    ("digits/acid", "main"): [
        "each step moves student by ce with SGD(lr 0.05, momentum 0.9, weight_decay 0.0005), on 0.25 of the rows of "
        "each batch, chosen by learnability, which reads student student:logits and reference reference:logits.",
    ],
    ("digits/codistillation", "main"): ["is a copy of a, renewed every "],
}


@pytest.mark.parametrize(("recipe", "stage"), SAID, ids="-".join)
def test_a_stage_is_told_in_sentences(recipe, stage):
    told = sentences(recipe)[stage]
    for sentence in SAID[recipe, stage]:
        assert sentence in told or (sentence[-1] == " " and any(sentence in line for line in told)), "\n".join(told)


@pytest.mark.parametrize("recipe", SPANNING)
def test_no_role_that_does_not_run_is_said_to_see_something(recipe):
    for told in sentences(f"digits/{recipe}").values():
        idle = [name for line in told if " not run: " in line for name in line.replace(" and ", ", ").split(", ")]
        for name in idle:
            assert not any(line.startswith(f"{name} (") for line in told)
        assert not any(
            line.startswith("1 epochs") or ", ." in line.replace(", ...", "") or "  " in line for line in told
        )


def test_numbers_and_lists_agree():
    assert (count_text(1, "epoch"), count_text(1200, "step")) == ("1 epoch", "1,200 steps")
    assert (join_names(["a"]), join_names(["a", "b"]), join_names(["a", "b", "c"])) == ("a", "a and b", "a, b and c")
