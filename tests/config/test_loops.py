"""Loops of stages: unrolling, locations of keys, and error messages."""

from __future__ import annotations

import pytest

from kdbench.config.identity import identity
from kdbench.config.load import dump_recipe, load_resolved
from kdbench.config.schema import Notes
from kdbench.errors import ConfigError

TOP = """\
dataset: digits
student: {model: digits_mlp}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
terms: {ce: cross_entropy, wd: {type: cross_entropy, weight: 0.1}}
"""
LOOP = (
    TOP
    + """\
stages:
  warm: {epochs: 3}
  active:
    rounds: 2
    stages:
      train: {epochs: 2, student: {weights: {stage: previous}}}
      query:
        epochs: 0
        student: {weights: {stage: train}}
        artifacts: {labels: {type: choose, by: {type: entropy, student: student}, budget: 40, count: 10}}
"""
)


def weights_chain(recipe) -> list[tuple[str, str | None]]:
    """Returns each stage with the stage from which its student's weights come."""
    weights_of_stage = ((stage.name, stage.roles["student"].weights) for stage in recipe.stages)
    return [(name, None if weights is None else weights.stage) for name, weights in weights_of_stage]


def test_loop_repeats_its_stages(load):
    recipe = load(LOOP)
    assert weights_chain(recipe) == [
        ("warm", None),
        ("train@1", "warm"),
        ("query@1", "train@1"),
        ("train@2", "query@1"),
        ("query@2", "train@2"),
    ]
    assert [stage.epochs for stage in recipe.stages] == [3, 2, 0, 2, 0]


def test_loop_equals_its_stages_written_one_by_one(load):
    """Only the names differ."""
    staged = (
        TOP
        + "stages:\n"
        + "".join(
            f"  {name}: {{epochs: 2, student: {{weights: {{stage: {before}}}}}}}\n"
            for name, before in (("b", "a"), ("c", "b"))
        ).replace("  b:", "  a: {epochs: 3}\n  b:")
    )
    looped = TOP + (
        "stages:\n  a: {epochs: 3}\n  l: {rounds: 2, stages: {b: {epochs: 2, student: {weights: {stage: previous}}}}}\n"
    )
    expected, unrolled = load(staged), load(looped)
    assert [s.roles["student"].model for s in expected.stages] == [s.roles["student"].model for s in unrolled.stages]
    assert [s.terms for s in expected.stages] == [s.terms for s in unrolled.stages]
    assert [s.data for s in expected.stages] == [s.data for s in unrolled.stages]
    assert weights_chain(unrolled) == [("a", None), ("b@1", "a"), ("b@2", "b@1")]


def test_listed_rounds_change_the_top_level(load):
    text = LOOP.replace("rounds: 2", "rounds: [{terms: {wd: null}}, {batch_size: 32, optimizer: AdamW}, null]")
    stages = {stage.name: stage for stage in load(text).stages}
    assert len(stages) == 7
    assert list(stages["train@1"].terms) == ["ce"] and list(stages["train@2"].terms) == ["ce", "wd"]
    assert [stages[f"train@{n}"].data["train"].batch_size for n in (1, 2, 3)] == [64, 32, 64]
    assert [stages[f"query@{n}"].optimizer.type for n in (1, 2, 3)] == ["SGD", "AdamW", "SGD"]
    assert list(stages["warm"].terms) == ["ce", "wd"], "a round must not change the stages outside of its loop"


def test_stage_overrides_its_round(load):
    text = LOOP.replace("rounds: 2", "rounds: [{epochs: 9, batch_size: 16}]").replace(
        "train: {epochs: 2", "train: {epochs: 5"
    )
    stages = {stage.name: stage for stage in load(text).stages}
    assert stages["train@1"].epochs == 5 and stages["train@1"].data["train"].batch_size == 16


def test_override_addresses_a_stage_of_a_loop(load):
    recipe = load(LOOP, "stages.active.stages.train.epochs=7", "stages.active.rounds=3")
    assert [stage.epochs for stage in recipe.stages] == [3, 7, 0, 7, 0, 7, 0]
    assert load(LOOP, "~stages.active.stages.query").stages[-1].name == "train@2"


def test_resolved_recipe_with_a_loop_is_the_same_recipe(load, tmp_path):
    recipe = load(LOOP, "stages.active.stages.train.epochs=7")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    again = load_resolved(tmp_path)
    assert again.stages == recipe.stages and identity(again) == identity(recipe)


def test_number_of_rounds_changes_the_identity(load):
    assert identity(load(LOOP)) != identity(load(LOOP, "stages.active.rounds=3"))


def test_artifact_is_that_of_the_latest_earlier_stage(load):
    text = LOOP.replace(
        "train: {epochs: 2,", "train: {epochs: 2, label_fraction: {artifact: query.labels, initial: 20},"
    )
    stages = {stage.name: stage for stage in load(text).stages}
    assert stages["train@1"].data["train"].label_fraction == 20
    assert stages["train@2"].data["train"].label_fraction == "query@1.labels"
    assert stages["query@1"].artifacts["labels"].previous is None
    assert stages["query@2"].artifacts["labels"].previous == "query@1.labels"


def test_initial_weights_apply_while_there_is_no_earlier_stage(load):
    first = "{stage: previous, initial: {recipe: digits/teacher, model: digits_mlp}}"
    text = LOOP.replace("  warm: {epochs: 3}\n", "").replace("{weights: {stage: previous}}", f"{{weights: {first}}}")
    (train_1, _, train_2, _) = load(text).stages
    weights = train_1.roles["student"].weights
    assert weights is not None and weights.recipe == "digits/teacher" and weights.location.line == 10
    assert train_2.roles["student"].weights is not None and train_2.roles["student"].weights.stage == "query@1"


def test_trainable_role_without_an_earlier_stage_is_initialised_from_the_seed(load):
    assert weights_chain(load(LOOP.replace("  warm: {epochs: 3}\n", "")))[0] == ("train@1", None)


def test_previous_is_the_nearest_stage_with_the_role(load):
    text = TOP.replace("student:", "models: {peer: {model: digits_mlp}}\nexport: student\nstudent:") + (
        "stages:\n  a: {}\n  b: {models: {peer: null}}\n  c: {models: {peer: {weights: {stage: previous}}}}\n"
    )
    weights = load(text).stages[2].roles["peer"].weights
    assert weights is not None and weights.stage == "a"


def test_weights_may_be_the_mean_of_several_roles(load):
    text = TOP.replace(
        "student:", "models: {a: {model: digits_mlp}, b: {model: digits_mlp}}\nexport: student\nstudent:"
    )
    text += (
        "stages:\n  one: {}\n  two: {student: {weights: {stage: one, role: [a, b], strict: false, rename: {x: y}}}}\n"
    )
    weights = load(text).stages[1].roles["student"].weights
    assert weights is not None
    assert (weights.role, weights.strict, weights.rename) == (("a", "b"), False, {"x": "y"})


def test_terms_of_a_stage_in_a_loop_may_be_a_list(load):
    text = LOOP.replace("train: {epochs: 2,", "train: {epochs: 2, terms: [cross_entropy],")
    assert list(load(text).stages[1].terms) == ["cross_entropy"]


@pytest.mark.parametrize(
    ("text", "replacement", "fragments"),
    [
        ("rounds: 2", "rounds: 0", ["r.yaml:9 stages.active.rounds: ", "1 or more", "got 0"]),
        ("rounds: 2", "rounds: []", ["r.yaml:9 stages.active.rounds: ", "at least one round"]),
        ("rounds: 2", "rounds: [1]", ["r.yaml:9 stages.active.rounds.0: ", "must be a mapping"]),
        ("rounds: 2", "rounds: [{seed: 2}]", ["stages.active.rounds.0.seed: ", "belongs to the top level"]),
        ("rounds: 2", "rounds: [{epohcs: 2}]", ["unknown key 'epohcs'", "Did you mean 'epochs'?"]),
        (
            "rounds: 2",
            "rounds: 2\n    epochs: 3",
            ["r.yaml:10 stages.active.epochs: ", "unknown key 'epochs' in a loop"],
        ),
        ("    stages:", "    stage:", ["stages.active", "a loop needs `stages`"]),
        ("train: {epochs: 2", "train: {epochs: two", ["r.yaml:11 stages.active.stages.train.epochs: ", "whole number"]),
        ("train: {epochs: 2", "train: {epoch: 2", ["r.yaml:11 stages.active.stages.train.epoch: ", "'epochs'?"]),
        ("train: {epochs: 2", "train: {rounds: 2", ["a loop cannot contain a loop"]),
        ("  warm: ", "  train: ", ["two stages are called 'train'", "r.yaml:7"]),
        ("  warm: ", "  previous: ", ["'previous' cannot be the name of a stage"]),
        ("  warm: ", "  a.b: ", ["'a.b' cannot be the name of a stage"]),
        ("stage: train}", "stage: trian}", ["r.yaml:14", "stage 'trian' does not exist", "Did you mean 'train'?"]),
        ("stage: train}", "stage: query}", ["r.yaml:14", "stage 'query' does not run before this stage"]),
        ("stage: train}", "stage: train, role: stdent}", ["no role 'stdent'", "'student'?"]),
        ("stage: train}", "stage: train, role: [student, student]}", ["role is listed twice"]),
        (
            "stage: train}",
            "path: x.pt, initial: {stage: train}}",
            ["weights.initial: `initial` applies to weights with `stage`"],
        ),
        ("budget: 40", "budgte: 40", ["r.yaml:15", "no parameter 'budgte'", "'budget'"]),
        ("type: choose", "type: chose", ["r.yaml:15", "no artifact 'chose'", "'choose'?"]),
        ("type: entropy", "type: entropie", ["no selector 'entropie'", "'entropy'?"]),
        ("student: student}, budget", "student: studnt:logits}, budget", ["no role 'studnt'", "'student'?"]),
        ("by: {type: entropy, student: student}, ", "", ["'choose' needs the key `by`", "kdbench list selectors"]),
        ("type: choose", "type: choose, source: pool", ["no source 'pool'", "Valid names: eval, train"]),
        ("artifacts: {labels: ", "artifacts: {la bels: ", ["'la bels' cannot be the name of an artifact"]),
    ],
)
def test_mistake_in_a_loop_is_reported(error_of, text, replacement, fragments):
    assert text in LOOP
    message = error_of(LOOP.replace(text, replacement))
    assert all(fragment in message for fragment in fragments), message


def test_mistake_in_a_loop_is_reported_once(error_of):
    message = error_of(LOOP.replace("train: {epochs: 2", "train: {epochs: two"))
    assert message.count("whole number") == 1


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ("data: {train: {artifact: query.labls}}", "query.labels"),
        ("label_fraction: {artifact: query.labls, initial: 20}", "no stage produces the artifact 'query.labls'"),
        ("terms: {kd: {type: kd, teacher: artifact:query.labls}}", "query.labels"),
        ("student: {model: {artifact: query.labls}}", "query.labels"),
        (
            "terms: {kd: {type: kd, teacher: artifact:query.labels}}",
            "'query@1.labels' is a subset, but a tensor is expected",
        ),
        ("data: {train: {artifact: query.labels}}", "'query@1.labels' is a subset, but a dataset is expected"),
        (
            "student: {model: {artifact: query.labels}}",
            "'query@1.labels' is a subset, but role 'student' needs a model",
        ),
    ],
)
def test_unknown_artifact_and_artifact_of_another_kind_are_reported(error_of, keys, fragment):
    message = error_of(LOOP + f"  last: {{{keys}}}\n").replace("query@2", "query@1")
    assert fragment in message, message


def test_frozen_role_needs_initial_weights(error_of):
    text = LOOP.replace("student: {model", "teacher: {model: digits_mlp, weights: {stage: previous}}\nstudent: {model")
    message = error_of(text)
    assert "r.yaml:2 teacher.weights: no earlier stage has the frozen role 'teacher'" in message
    assert "add `initial:` with other weights" in message


def test_override_without_effect_is_reported(error_of):
    text = LOOP.replace("  warm: {epochs: 3}\n", "")
    assert "write stages.active.stages.train.epochs=" in error_of(text, "epochs=4")


def test_methods_and_notes_do_not_change_the_identity(load, error_of):
    notes = "notes: {basis: code, source: train.py, differs: [no warm-up]}\n"
    plain, annotated = load(TOP), load(TOP + "methods: [m001, m002]\n" + notes)
    assert annotated.methods == ("m001", "m002")
    assert annotated.notes == Notes(basis="code", source=("train.py",), differs=("no warm-up",))
    assert identity(plain) == identity(annotated)
    assert "belongs to the top level" in error_of(LOOP.replace("warm: {epochs", "warm: {notes: {}, epochs"))


def test_override_removes_a_key_from_a_round_by_its_index(load):
    """Overrides apply in the order of the command line: a later one can remove what an earlier one set."""
    text = (
        TOP
        + """\
stages:
  stream:
    rounds:
      - {terms: {ce: cross_entropy, kl: {type: cross_entropy, weight: 0.5}}}
      - {terms: {ce: cross_entropy, kl: {type: cross_entropy, weight: 0.5}}}
    stages: {learn: {epochs: 2}}
"""
    )
    first = "stages.stream.rounds.0.terms"
    for removal in (f"{first}.kl=null", f"~{first}.kl"):
        recipe = load(text, f"{first}.ce.weight=2", removal)
        assert ["kl" in stage.terms for stage in recipe.stages] == [False, True], removal
    with pytest.raises(ConfigError, match=r"the key '.*rounds.0.terms.kk', .* does not exist. Did you mean 'kl'"):
        load(text, f"~{first}.kk")
    with pytest.raises(ConfigError, match=r"the key '.*rounds.7.terms.kl', .* does not exist"):
        load(text, "~stages.stream.rounds.7.terms.kl")
