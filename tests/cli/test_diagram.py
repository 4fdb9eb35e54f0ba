"""Diagrams of stages: recipes that cover every wiring, compared with diagrams written by hand."""

from __future__ import annotations

from functools import cache

import pytest

from kdbench.cli.diagram import draw_stage, stage_sequence
from kdbench.config.load import load_recipe
from kdbench.experiment.artifacts import plan_stages

DIAGRAMS = {
    ("dml", "main"): """
inputs     train.image
           ├─ a (trained, exported)
           └─ b (trained)
terms      labels ── ce ─> a
           labels ── ce ─> b
                b ── kl ─> a
                a ── kl ─> b
updates    a, b on ce, kl
""",
    ("dafl", "main"): """
inputs     noise.z
           └─ generator (trained)
              ├─ teacher (frozen, from digits/teacher)
              └─ student (trained, exported)
terms              ── sure ─> teacher
                   ── varied ─> teacher
                   ── excited ─> teacher:pool
           teacher ── kd ─> student
updates    1. generator on sure, varied, excited
            & student on kd
""",
    ("fitnets", "hint"): """
inputs     train.image
           ├─ teacher (frozen, from digits/teacher)
           └─ student (trained, exported)
terms      teacher:layer2 ── hint ─> student:layer2
updates    student on hint
outputs    student ─> student of stage distil
""",
    ("mean_teacher", "main"): """
inputs     train.other
           └─ teacher (EMA of student, exported)
           train.image
           └─ student (trained)
terms       labels ── ce ─> student
           teacher ── consistency ─> student
updates    student on ce, consistency
""",
    ("takd", "main"): """
inputs     train.image
           ├─ teacher (frozen, from digits/takd_assistant)
           └─ student (trained, exported)
terms       labels ── ce ─> student
           teacher ── kd ─> student
updates    student on ce, kd
""",
    ("hard", "main"): """
inputs     train.image
           ├─ augmentor (trained)
           │  ├─ teacher (frozen, from digits/teacher)
           │  └─ student (trained, exported)
           ├─ plain_teacher (reuses teacher)
           └─ plain_student (reuses student)
terms            teacher <─ disagree, maximized ─> student
           plain_teacher ── stay ─> teacher
                 teacher ── hard ─> student
           plain_teacher ── plain ─> plain_student
updates    1. augmentor on disagree, stay
           2. student on hard, plain
""",
    ("scrub", "away@1"): """
inputs     forget.image
           ├─ teacher (frozen, from digits/teacher)
           └─ student (trained, from digits/teacher, exported)
terms      teacher ── forget, maximized ─> student
updates    student on forget
outputs    student ─> student of stage towards@1
""",
    ("icarl", "classify"): """
inputs     train.image
           └─ student (not trained, from stage means, exported)
              └─ layer2 » nearest (frozen, artifact means.nearest)
""",
}
SEQUENCES = {
    "fitnets": "hint -> distil",
    "mst_distill": "together -> masks -> distil",
    "lwf": "first -> 2 x (warm_up -> learn)",
    "fedmd": "public -> private -> 5 x (digest -> revisit)",
    "scrub": "3 x (away -> towards) -> settle",
}
LINES = {
    ("mst_distill", "distil"): [
        " ── kd ─> student  (router top_k)",
        "── balance ─> term:kd.gate",
        "(reuses both:fc)",
        "updates    student on ce, kd, balance",
    ],
    ("lwf", "learn@2"): [
        "was1 ── old ─> task1",
        "was2 ── old ─> task2",
        "└─ teacher (frozen, from stage warm_up@2, role student)",
    ],
    ("fedmd", "digest@1"): [
        "├─ said_mlp (snapshot of mlp)",
        "mean_logits(said_cnn:fc, said_mlp:fc, said_resnet:fc) ── consensus ─> resnet:fc",
        "outputs    cnn ─> cnn of stage revisit@1",
    ],
    ("pcoreset", "round@1"): [
        "artifacts  round@1.labels: subset, by choose over source train from student",
        "outputs    round@1.labels ─> labels of source train in stage round@2",
    ],
    ("acid", "main"): ["updates    student on ce, on 0.25 of the rows, selected by learnability"],
    ("tgeo_kd", "main"): [
        "labels ── hard ─> student  (sample weight learnt)",
        "1. gate on held, through an inner step of student on soft, hard",
    ],
    ("cv_dd", "learn"): ["c (train mode, not updated, from digits/teacher)"],
    ("hpcr", "learn@1"): ["contrast ─> student  (with replayed = again, replayed_label = memory.label)"],
}


@cache
def diagrams(name: str) -> dict[str, str]:
    """Draws every stage of a digits recipe."""
    recipe = load_recipe(f"digits/{name}", [])
    plans = plan_stages(recipe)
    return {plan.stage.name: "\n".join(draw_stage(plan, recipe.stages[i + 1 :])) for i, plan in enumerate(plans)}


@pytest.mark.parametrize(("name", "stage"), DIAGRAMS)
def test_diagram_equals_the_wiring(name, stage):
    assert diagrams(name)[stage] == DIAGRAMS[name, stage].strip("\n")


@pytest.mark.parametrize(("name", "stage"), LINES)
def test_diagram_contains_the_line(name, stage):
    for line in LINES[name, stage]:
        assert line in diagrams(name)[stage]


@pytest.mark.parametrize("name", SEQUENCES)
def test_stage_sequence_contains_a_loop_once(name):
    assert stage_sequence(load_recipe(f"digits/{name}", []).stages) == SEQUENCES[name]


def test_role_that_does_not_run_is_not_drawn():
    together = diagrams("mst_distill")["together"]
    assert "both_mask" not in together and "both" in together
