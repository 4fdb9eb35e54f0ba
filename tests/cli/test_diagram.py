"""What `check` draws of the recipes that span the wirings: who sees what, who teaches whom, who moves when."""

from __future__ import annotations

from functools import cache

import pytest

from kdbench.cli.diagram import draw_stage, stage_sequence
from kdbench.config.load import load_recipe
from kdbench.experiment.artifacts import plan_stages

DRAWN = {
    ("dml", "main"): """
sees      train.image
          ├─ a (learns, the result)
          └─ b (learns)
teaches   labels ── ce ─> a
          labels ── ce ─> b
               b ── kl ─> a
               a ── kl ─> b
moves     a, b by ce, kl
""",
    ("dafl", "main"): """
sees      noise.z
          └─ generator (learns)
             ├─ teacher (frozen, from digits/teacher)
             └─ student (learns, the result)
teaches           ── sure ─> teacher
                  ── varied ─> teacher
                  ── excited ─> teacher:pool
          teacher ── kd ─> student
moves     1. generator by sure, varied, excited
           & student by kd
""",
    ("fitnets", "hint"): """
sees      train.image
          ├─ teacher (frozen, from digits/teacher)
          └─ student (learns, the result)
teaches   teacher:layer2 ── hint ─> student:layer2
moves     student by hint
hands on  student ─> student of stage distil
""",
    ("mean_teacher", "main"): """
sees      train.other
          └─ teacher (average of student, the result)
          train.image
          └─ student (learns)
teaches    labels ── ce ─> student
          teacher ── consistency ─> student
moves     student by ce, consistency
""",
    ("takd", "main"): """
sees      train.image
          ├─ teacher (frozen, from digits/takd_assistant)
          └─ student (learns, the result)
teaches    labels ── ce ─> student
          teacher ── kd ─> student
moves     student by ce, kd
""",
    ("hard", "main"): """
sees      train.image
          ├─ augmentor (learns)
          │  ├─ teacher (frozen, from digits/teacher)
          │  └─ student (learns, the result)
          ├─ plain_teacher (teacher itself)
          └─ plain_student (student itself)
teaches         teacher <─ disagree, away ─> student
          plain_teacher ── stay ─> teacher
                teacher ── hard ─> student
          plain_teacher ── plain ─> plain_student
moves     1. augmentor by disagree, stay
          2. student by hard, plain
""",
    ("scrub", "away@1"): """
sees      forget.image
          ├─ teacher (frozen, from digits/teacher)
          └─ student (learns, from digits/teacher, the result)
teaches   teacher ── forget, away ─> student
moves     student by forget
hands on  student ─> student of stage towards@1
""",
}
COURSES = {
    "fitnets": "hint -> distil",
    "mst_distill": "together -> masks -> distil",
    "lwf": "first -> 2 x (warm_up -> learn)",
    "fedmd": "public -> private -> 5 x (digest -> revisit)",
    "scrub": "3 x (away -> towards) -> settle",
}
LINES = {
    ("mst_distill", "distil"): [
        " ── kd ─> student  (routed by top_k)",
        "── balance ─> term:kd.gate",
        "both:fc itself)",
        "moves     student by ce, kd, balance",
    ],
    ("lwf", "learn@2"): [
        "was1 ── old ─> task1",
        "was2 ── old ─> task2",
        "└─ teacher (frozen, from stage warm_up@2, its student)",
    ],
    ("fedmd", "digest@1"): [
        "├─ said_mlp (copy of mlp)",
        "mean_logits(said_cnn:fc, said_mlp:fc, said_resnet:fc) ── consensus ─> resnet:fc",
        "hands on  cnn ─> cnn of stage revisit@1",
    ],
    ("pcoreset", "round@1"): [
        "makes     round@1.labels, a subset, by choose over train from student",
        "hands on  round@1.labels ─> the labels of source train in stage round@2",
    ],
    ("acid", "main"): ["moves     student by ce, on 0.25 of the rows, chosen by learnability"],
}


@cache
def drawings(name: str) -> dict[str, str]:
    recipe = load_recipe(f"digits/{name}", [])
    plans = plan_stages(recipe)
    return {p.stage.name: "\n".join(draw_stage(p, recipe.stages[i + 1 :])) for i, p in enumerate(plans)}


@pytest.mark.parametrize(("name", "stage"), DRAWN)
def test_a_stage_is_drawn_as_it_is_wired(name, stage):
    assert drawings(name)[stage] == DRAWN[name, stage].strip("\n")


@pytest.mark.parametrize(("name", "stage"), LINES)
def test_a_drawing_tells(name, stage):
    for line in LINES[name, stage]:
        assert line in drawings(name)[stage]


@pytest.mark.parametrize("name", COURSES)
def test_the_course_tells_rounds_once(name):
    assert stage_sequence(load_recipe(f"digits/{name}", []).stages) == COURSES[name]


def test_a_role_that_does_not_run_is_not_drawn():
    together = drawings("mst_distill")["together"]
    assert "both_mask" not in together and "both" in together
