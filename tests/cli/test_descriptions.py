"""Sentences and tables of `kdbench check`, for recipes that cover every wiring."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from kdbench.cli.check import Section, check_recipe, stage_sections
from kdbench.cli.descriptions import count_text, describe_stage, describe_term, join_names
from kdbench.config.load import load_recipe
from kdbench.engine.device import describe_device
from kdbench.engine.plan.plan import StagePlan
from kdbench.experiment.artifacts import plan_stages

COVERING = [
    *("dml", "dafl", "zskt", "fitnets", "mean_teacher", "takd"),
    *("mst_distill", "lwf", "fedmd", "hard", "scrub"),
]


@cache
def plans(recipe: str) -> dict[str, StagePlan]:
    """Returns the plan of every stage of a digits recipe."""
    return {plan.stage.name: plan for plan in plan_stages(load_recipe(f"digits/{recipe}"))}


def table(recipe: str, stage: str, title: str) -> dict[str, dict[str, str]]:
    """Returns the rows of a table of a stage, by their first cell, as heading -> cell."""
    sections = {section.title.split(" (")[0]: section for section in stage_sections(plans(recipe)[stage])}
    section: Section = sections[title]
    return {row[0]: dict(zip(section.headings, row, strict=True)) for row in section.rows if row[0]}


DETAILS = {
    ("cv_dd", "learn"): [
        "c: train mode (BatchNorm uses batch statistics), but no update changes its weights.",
        "optimizer: AdamW(lr 0.003, weight_decay 0.01).",
    ],
    ("dafl", "main"): ["update 1 (generator): Adam(lr 0.001).", "update 2 (student): Adam(lr 0.005)."],
    ("ctkd", "main"): [
        "optimizer: SGD(lr 0.03, momentum 0.9, weight_decay 0.0005); it also trains 1 parameter of terms and adapters.",
    ],
    ("zskt", "main"): ["update 2 (student): Adam(lr 0.005); 5 updates per step."],
    ("kd", "main"): ["validation: 10 % of source train, held out of training; the best epoch is selected on it."],
    ("tgeo_kd", "main"): [
        "hard: cross_entropy compares student logits with labels; sample weights: learnt(complement) of gate logits.",
        "update 1 (gate): Adam(lr 0.003); the loss is computed after an inner step of student on soft and hard "
        "(learning rate: that of the update of student), and the gradient flows through this inner step.",
    ],
    ("mst_distill", "together"): [
        "not run: both_mask1, both_mid1, both_by1, both_mask2, both_by2, other_mask1, other_mid1, other_by1, "
        "other_mask2 and other_by2 (nothing in this stage reads their output).",
    ],
    ("mst_distill", "distil"): [
        "kd: kd compares student logits with each of [both_by1 logits, both_by2 logits, other_by1 logits, other_by2 "
        "logits]; edge weights: top_k(k 2) of student logits.",
    ],
    ("scrub", "away@1"): ["training: 1 epoch; learning rate constant; float32; evaluated at the end."],
    ("icarl", "means"): ["training: none (0 epochs or steps)."],
    ("hpcr", "learn@1"): ["without gradient: 2 parameter tensors (body.fc.weight, body.fc.bias)."],
    ("one", "main"): [
        "ensemble: cross_entropy compares the output of gate (inputs: student logits, second logits, third logits, "
        "gate = gate logits) with labels.",
    ],
    ("acid", "main"): [
        "optimizer: SGD(lr 0.05, momentum 0.9, weight_decay 0.0005); 0.25 of the rows of each batch, selected by "
        "learnability of student = student logits, reference = reference logits.",
    ],
}

TERMS = {
    ("dml", "main", "kl"): "kd compares a logits with b logits; b logits with a logits",
    ("dafl", "main", "sure"): "one_hot is computed on teacher logits",
    (
        "zskt",
        "main",
        "disagree",
    ): "kd compares student logits with teacher logits; maximized; gradient to the teacher too",
    ("mean_teacher", "main", "ce"): "cross_entropy compares student logits with labels",
    ("fitnets", "distil", "kd"): "kd compares student logits with teacher logits",
    ("fedmd", "digest@1", "consensus"): "feature_distance compares each of [cnn:fc, mlp:fc, resnet:fc] with "
    "the output of mean_logits (inputs: said_cnn:fc, said_mlp:fc, said_resnet:fc)",
    (
        "hpcr",
        "learn@1",
        "contrast",
    ): "proxy_contrastive compares student logits with labels; with replayed = again logits, "
    "replayed_label = memory.label",
}

CELLS = {
    ("takd", "main", "roles", "teacher"): {"model": "digits_mlp", "mode": "frozen", "trainable": "0"},
    ("fitnets", "distil", "roles", "student"): {"weights": "stage hint", "mode": "trainable"},
    ("fitnets", "distil", "terms", "kd"): {"weight": "linear(start 0.44, end 0.11)", "teacher": "teacher:logits"},
    ("mean_teacher", "main", "roles", "teacher"): {"mode": "ema of student (decay 0.98)", "input": "train.other"},
    ("lwf", "learn@2", "roles", "was2"): {"model": "task_logits", "input": "teacher:logits", "parameters": "0"},
    ("fedmd", "digest@1", "roles", "said_cnn"): {
        "model": "as cnn",
        "mode": "snapshot of cnn (at the start of the stage) (forward stops after fc)",
    },
    ("fedmd", "revisit@1", "data", "home2"): {
        "samples": "not counted yet",
        "classes": "10",
        "batch size": "32",
        "options": "subset balanced(amount 100, rest), then shard(of 3, number 1, scheme dirichlet, alpha 0.3)",
    },
    ("hard", "main", "roles", "plain_teacher"): {"model": "as teacher", "mode": "reuse of teacher"},
    ("hpcr", "learn@1", "data", "memory"): {"options": "subset first.memory", "batch size": "10"},
    ("ctkd", "main", "terms", "kd"): {"parameters": "reverse cosine(start 0, end 1, over 10)"},
    ("blockwise", "whole", "roles", "teacher"): {"weights": "digits/teacher (digits_resnet(blocks 3))"},
    ("hpcr", "learn@1", "terms", "contrast"): {"weight": "cosine(start 0.5625, end 1.8, over 250, by step)"},
    ("kd", "main", "data", "train"): {"dataset": "digits train", "samples": "811", "options": "labels of 50 samples"},
    ("kd", "main", "terms", "ce"): {"teacher": "labels", "space": "row"},
    ("icarl", "classify", "roles", "nearest"): {"weights": "means.nearest", "parameters": "0"},
    ("acid", "main", "data", "train"): {"options": "labels changed by symmetric_noise(rate 0.4)"},
}


@pytest.mark.parametrize(("recipe", "stage"), DETAILS, ids=str)
def test_details_contain_what_the_diagram_lacks(recipe, stage):
    sentences = describe_stage(plans(recipe)[stage])
    for sentence in DETAILS[recipe, stage]:
        assert sentence in sentences, "\n".join(sentences)


@pytest.mark.parametrize(("recipe", "stage", "term"), TERMS, ids=str)
def test_term_description_names_operands_and_options(recipe, stage, term):
    assert describe_term(plans(recipe)[stage].stage.terms[term]) == TERMS[recipe, stage, term]


@pytest.mark.parametrize(("recipe", "stage", "title", "row"), CELLS, ids=str)
def test_table_contains_the_cells(recipe, stage, title, row):
    cells = table(recipe, stage, title)[row]
    expected = CELLS[recipe, stage, title, row]
    assert {heading: cells[heading] for heading in expected} == expected


def test_snapshot_period_is_in_the_table_of_roles():
    modes = [cells["mode"] for cells in table("codistillation", "main", "roles").values()]
    assert any(re.fullmatch(r"snapshot of a \(every .*\)", mode) for mode in modes), modes


@pytest.mark.parametrize("recipe", COVERING)
def test_details_have_no_role_that_does_not_run_and_no_empty_parts(recipe):
    for plan in plans(recipe).values():
        sentences = describe_stage(plan)
        idle = [line.removeprefix("not run: ") for line in sentences if line.startswith("not run: ")]
        names = [name for line in idle for name in line.split(" (")[0].replace(" and ", ", ").split(", ")]
        for line in sentences:
            assert not any(line.startswith(f"{name}: ") for name in names)
            assert not re.search(
                r"\b1 (epochs|steps|updates|parameters|parameter tensors)\b|, \.|; \.|  |\(\)",
                line.replace(", ...", ""),
            ), line


def test_every_table_row_has_a_cell_for_each_heading():
    for recipe in COVERING:
        for plan in plans(recipe).values():
            for section in stage_sections(plan):
                assert all(len(row) == len(section.headings) for row in section.rows)


def test_equal_rounds_of_a_loop_are_printed_once(capsys):
    assert check_recipe(load_recipe("digits/fedmd")) == 0
    output = capsys.readouterr().out
    assert "stage digest@2\n" in output and "stage digest@3: equal to digest@2, in a later round of the loop" in output
    assert output.count("\nroles") < len(plans("fedmd"))


def test_numbers_and_lists_agree_in_number():
    assert (count_text(1, "epoch"), count_text(1200, "step")) == ("1 epoch", "1,200 steps")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert describe_device(torch.device("cpu")).endswith(", 1 thread)")
    finally:
        torch.set_num_threads(threads)
    assert (join_names(["a"]), join_names(["a", "b"]), join_names(["a", "b", "c"])) == ("a", "a and b", "a, b and c")
