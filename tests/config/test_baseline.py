"""`baseline: true` runs the same student without a teacher, and says what it dropped."""

from __future__ import annotations

from helpers.recipe_texts import KD_RECIPE

BASE = "dataset: digits\nepochs: 1\noptimizer: {type: SGD, lr: 0.1}\n"


def test_the_teacher_and_its_terms_go(load):
    recipe, twin = load(KD_RECIPE), load(KD_RECIPE, "baseline=true")
    stage = twin.stages[0]
    assert (list(stage.roles), list(stage.terms)) == (["student"], ["ce"])
    assert twin.baseline_removed == ("role teacher", "term kd")
    assert stage.roles["student"] == recipe.stages[0].roles["student"] and stage.data == recipe.stages[0].data
    assert "agreement" not in [metric.type for metric in stage.metrics]


def test_a_peer_that_teaches_goes_too(load):
    text = BASE + (
        "models: {a: digits_mlp, b: digits_mlp}\nexport: a\n"
        "terms:\n  ce: {type: cross_entropy, student: [a, b]}\n  kl: {type: kd, student: [a, b], teacher: others}\n"
    )
    stage = load(text, "baseline=true").stages[0]
    assert list(stage.roles) == ["a"] and list(stage.terms) == ["ce"] and len(stage.terms["ce"].edges) == 1


def test_a_stage_of_which_nothing_is_left_goes_with_the_weights_that_it_gave(load):
    text = BASE.replace("epochs: 1\n", "") + (
        "teacher: digits_cnn\nstudent: digits_cnn\nstages:\n"
        "  hint: {epochs: 1, terms: {hint: {type: hint, student: layer2, teacher: layer2}}}\n"
        "  ce: {epochs: 2, student: {weights: {stage: hint}}, terms: {ce: cross_entropy}}\n"
    )
    twin = load(text, "baseline=true")
    assert [stage.name for stage in twin.stages] == ["ce"]
    assert twin.stages[0].roles["student"].weights is None
    assert any("stage hint" in said for said in twin.baseline_removed)


def test_a_head_that_the_student_teaches_stays(load):
    text = BASE + (
        'teacher: digits_cnn\nstudent: digits_mlp\nmodels: {head: {model: digits_mlp, input: "student:layer1"}}\n'
        "terms:\n  ce: cross_entropy\n  kd: kd\n  own: {type: kd, student: head, teacher: student}\n"
    )
    stage = load(text, "baseline=true").stages[0]
    assert set(stage.roles) == {"student", "head"} and set(stage.terms) == {"ce", "own"}


def test_updates_lose_what_was_dropped(load):
    text = KD_RECIPE + "updates:\n  - {models: [student], terms: [kd]}\n  - {models: [student], terms: [ce, kd]}\n"
    (update,) = load(text, "baseline=true").stages[0].updates
    assert update.terms == ("ce",)


def test_a_recipe_of_which_nothing_is_left_is_refused(fault):
    assert "twin leaves nothing to train" in fault(
        KD_RECIPE.replace("  ce: {type: cross_entropy, weight: 0.1}\n", ""), "baseline=true"
    )


MADE = """
dataset: digits
teacher: {model: digits_cnn}
student: {model: digits_mlp}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
terms: {ce: cross_entropy, kd: {type: kd, teacher: teacher}}
stages:
  label: {artifacts: {soft: {type: soft_labels, teacher: teacher}}}
  learn:
    data: {train: {artifact: label.soft}}
    terms: {ce: cross_entropy, soft: {type: kd, teacher: train.soft}}
"""


def test_what_labels_data_stays_and_what_teaches_by_it_goes(load):
    recipe = load(MADE, "baseline=true")
    label, learn = recipe.stages
    assert set(label.roles) == {"teacher", "student"} and list(label.terms) == ["ce"] and "soft" in label.make
    assert set(learn.roles) == {"teacher", "student"} and list(learn.terms) == ["ce"]
    assert recipe.baseline_removed == ("stage label: term kd", "stage learn: term soft")


def test_a_stage_that_only_makes_something_trains_nothing_in_the_twin(load):
    text = MADE.replace("  label: {make", "  label: {terms: {kd: {type: kd, teacher: teacher}}, make")
    label, learn = load(text, "baseline=true").stages
    assert label.epochs == 0 and not label.terms and learn.epochs == 1


def test_a_selection_that_reads_a_teacher_goes_and_its_update_stays(load):
    text = MADE.split("stages:")[0] + (
        "updates:\n  - {models: [student], terms: [ce, kd], "
        "select: {type: learnability, keep: 8, student: student, reference: teacher}}\n"
    )
    assert load(text).stages[0].updates[0].keep == 8
    (update,) = load(text, "baseline=true").stages[0].updates
    assert update.terms == ("ce",) and update.select is None and update.keep is None
