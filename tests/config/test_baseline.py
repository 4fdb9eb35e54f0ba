"""`baseline: true` trains the same student without a teacher and lists what it removed."""

from __future__ import annotations

from helpers.recipe_texts import KD_RECIPE

BASE = "dataset: digits\nepochs: 1\noptimizer: {type: SGD, lr: 0.1}\n"


def test_teacher_and_its_terms_are_removed(load):
    recipe, baseline = load(KD_RECIPE), load(KD_RECIPE, "baseline=true")
    stage = baseline.stages[0]
    assert (list(stage.roles), list(stage.terms)) == (["student"], ["ce"])
    assert baseline.baseline_removed == ("role teacher", "term kd")
    assert stage.roles["student"] == recipe.stages[0].roles["student"] and stage.data == recipe.stages[0].data
    assert "agreement" not in [metric.type for metric in stage.metrics]


def test_peer_that_teaches_is_removed(load):
    text = BASE + (
        "models: {a: digits_mlp, b: digits_mlp}\nexport: a\n"
        "terms:\n  ce: {type: cross_entropy, student: [a, b]}\n  kl: {type: kd, student: [a, b], teacher: others}\n"
    )
    stage = load(text, "baseline=true").stages[0]
    assert list(stage.roles) == ["a"] and list(stage.terms) == ["ce"] and len(stage.terms["ce"].edges) == 1


def test_stage_without_remaining_terms_is_removed_with_the_weights_from_it(load):
    text = BASE.replace("epochs: 1\n", "") + (
        "teacher: digits_cnn\nstudent: digits_cnn\nstages:\n"
        "  hint: {epochs: 1, terms: {hint: {type: hint, student: layer2, teacher: layer2}}}\n"
        "  ce: {epochs: 2, student: {weights: {stage: hint}}, terms: {ce: cross_entropy}}\n"
    )
    baseline = load(text, "baseline=true")
    assert [stage.name for stage in baseline.stages] == ["ce"]
    assert baseline.stages[0].roles["student"].weights is None
    assert "stage ce: weights of role student from stage hint" in baseline.baseline_removed


def test_head_taught_by_the_student_stays(load):
    text = BASE + (
        'teacher: digits_cnn\nstudent: digits_mlp\nmodels: {head: {model: digits_mlp, input: "student:layer1"}}\n'
        "terms:\n  ce: cross_entropy\n  kd: kd\n  own: {type: kd, student: head, teacher: student}\n"
    )
    stage = load(text, "baseline=true").stages[0]
    assert set(stage.roles) == {"student", "head"} and set(stage.terms) == {"ce", "own"}


def test_updates_lose_removed_terms(load):
    text = KD_RECIPE + "updates:\n  - {models: [student], terms: [kd]}\n  - {models: [student], terms: [ce, kd]}\n"
    (update,) = load(text, "baseline=true").stages[0].updates
    assert update.terms == ("ce",)


def test_recipe_without_remaining_terms_is_rejected(error_of):
    text = KD_RECIPE.replace("  ce: {type: cross_entropy, weight: 0.1}\n", "")
    assert error_of(text, "baseline=true").startswith(
        "override 'baseline=true': the baseline has nothing to train: every term of r reads a teacher."
    )


WITH_ARTIFACT = """
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


def test_labelling_by_a_teacher_stays_and_learning_from_its_soft_labels_is_removed(load):
    recipe = load(WITH_ARTIFACT, "baseline=true")
    label, learn = recipe.stages
    assert set(label.roles) == {"teacher", "student"} and list(label.terms) == ["ce"] and "soft" in label.artifacts
    assert set(learn.roles) == {"teacher", "student"} and list(learn.terms) == ["ce"]
    assert recipe.baseline_removed == ("stage label: term kd", "stage learn: term soft")


def test_stage_that_only_computes_an_artifact_trains_nothing(load):
    text = WITH_ARTIFACT.replace(
        "  label: {artifacts", "  label: {terms: {kd: {type: kd, teacher: teacher}}, artifacts"
    )
    label, learn = load(text, "baseline=true").stages
    assert label.epochs == 0 and not label.terms and learn.epochs == 1


def test_selection_that_reads_a_teacher_is_removed_and_its_update_stays(load):
    text = WITH_ARTIFACT.split("stages:")[0] + (
        "updates:\n  - {models: [student], terms: [ce, kd], "
        "select: {type: learnability, keep: 8, student: student, reference: teacher}}\n"
    )
    assert load(text).stages[0].updates[0].keep == 8
    (update,) = load(text, "baseline=true").stages[0].updates
    assert update.terms == ("ce",) and update.select is None and update.keep is None
