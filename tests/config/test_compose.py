"""Composition: groups below the recipe, overrides above it, through Hydra."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.compose.layers import read_layers
from kdbench.config.load import dump_recipe, load_recipe, load_resolved
from kdbench.config.paths import find_recipe, group_files
from kdbench.config.schema import PartConfig
from kdbench.errors import ConfigError

PAIRED = """\
dataset: cifar100
protocol: cifar_240_epochs
pair: own
terms:
  ce: {type: cross_entropy}
  kd: {type: kd}
"""


@pytest.fixture
def user_pairs(tmp_path: Path) -> None:
    """Writes two options of the group `pair` beside the user's recipe."""
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "own.yaml").write_text("teacher: resnet56\nstudent: resnet20\nvars: {layer: layer3}\n")
    (tmp_path / "pair" / "other.yaml").write_text("teacher: resnet110\nstudent: resnet32\nvars: {layer: layer2}\n")


def model_types(recipe) -> list[str]:
    return [role.model.type for role in recipe.stages[0].roles.values()]


def test_override_sets_a_key_that_the_recipe_leaves_at_its_default(load):
    recipe = load(KD_RECIPE, "terms.kd.temperature=2", "terms.ce.label_smoothing=0.1", "seed=7", "clip=1.5")
    stage = recipe.stages[0]
    assert (stage.terms["kd"].params["temperature"], stage.terms["ce"].params["label_smoothing"]) == (2, 0.1)
    assert (recipe.seed, stage.clip) == (7, 1.5)


@pytest.mark.parametrize("override", ["~terms.kd", "terms.kd=null"])
def test_override_removes_a_term(load, override: str):
    assert list(load(KD_RECIPE, override).stages[0].terms) == ["ce"]


@pytest.mark.parametrize("override", ["~terms.kdd", "terms.kdd=null"])
def test_removal_of_a_missing_key_reports_the_nearest_name(error_of, override: str):
    message = error_of(KD_RECIPE, override)
    assert (
        message.startswith(f"override '{override}': the key 'terms.kdd', which the override removes, does not exist")
        and "Did you mean 'kd'?" in message
    )


def test_recipe_overrides_its_groups_and_the_command_line_overrides_the_recipe(load, user_pairs):
    recipe = load(PAIRED + "batch_size: 32\n")
    stage = recipe.stages[0]
    assert model_types(recipe) == ["resnet56", "resnet20"]
    assert (stage.epochs, stage.data["train"].batch_size) == (240, 32)
    assert load(PAIRED, "batch_size=16").stages[0].data["train"].batch_size == 16
    assert recipe.group_choices == {"protocol": "cifar_240_epochs", "pair": "own"}


def test_command_line_selects_an_option_of_a_group(load, user_pairs):
    recipe = load(PAIRED, "pair=other")
    assert model_types(recipe) == ["resnet110", "resnet32"] and recipe.group_choices["pair"] == "other"
    assert model_types(load(PAIRED.replace("pair: own\n", ""), "pair=other")) == ["resnet110", "resnet32"]


def test_recipe_refers_to_values_of_a_group(load, user_pairs):
    text = PAIRED + '  at: {type: at, student: "${vars.layer}", teacher: "${vars.layer}"}\n'
    assert load(text, "pair=other").stages[0].terms["at"].edges[0].student.path == "layer2"


def test_unknown_option_reports_the_nearest_name(error_of, user_pairs):
    assert "Did you mean 'other'?" in error_of(PAIRED, "pair=othr")
    message = error_of(PAIRED.replace("cifar_240_epochs", "cifar_240_epoch"))
    assert message.startswith("r.yaml:2 protocol: no protocol") and "Did you mean 'cifar_240_epochs'?" in message


def test_group_file_cannot_select_options_of_groups(error_of, tmp_path: Path, user_pairs):
    (tmp_path / "pair" / "own.yaml").write_text("protocol: cifar_240_epochs\n")
    assert error_of(PAIRED).startswith("pair/own.yaml:1 protocol: ")


def test_error_location_is_in_the_file_with_the_mistake(error_of, tmp_path: Path, user_pairs):
    (tmp_path / "pair" / "own.yaml").write_text("student: resnet20\nteacher: {model: resnet56, frezen: true}\n")
    assert error_of(PAIRED).startswith("pair/own.yaml:2 teacher.frezen: unknown key")


def test_other_type_in_the_recipe_drops_the_parameters_of_the_group(load, user_pairs):
    stage = load(PAIRED + "optimizer: {type: AdamW, lr: 1e-3}\n").stages[0]
    assert (stage.optimizer.type, stage.optimizer.params) == ("AdamW", {"lr": 1e-3})
    stage = load(PAIRED, "optimizer={type: AdamW, lr: 0.002}").stages[0]
    assert (stage.optimizer.type, stage.optimizer.params) == ("AdamW", {"lr": 0.002})
    stage = load(PAIRED, "optimizer.lr=0.01").stages[0]
    assert (stage.optimizer.type, stage.optimizer.params["momentum"]) == ("SGD", 0.9)


def test_steps_on_the_command_line_replace_the_epochs(load):
    stage = load(KD_RECIPE, "steps=5").stages[0]
    assert (stage.epochs, stage.steps) == (None, 5)


def test_override_adds_parameters_to_a_bare_name(load):
    recipe = load(KD_RECIPE + "augment: [flip]\n", "dataset.normalize=false", "augment.0.p=0.25")
    source = recipe.stages[0].data["train"]
    assert source.dataset.params == {"normalize": False} and source.views["image"][0].params == {"p": 0.25}


@pytest.mark.parametrize("override", ["seed=${oc.env:HOME}", "title=${hydra.job.name}", "student._target_=os.system"])
def test_override_cannot_use_resolvers_or_python(error_of, override: str):
    message = error_of(KD_RECIPE, override)
    assert override in message and "rejected" in message


@pytest.mark.parametrize("override", ["seed", "a b", "hydra=3", "=3"])
def test_malformed_override_is_reported(error_of, override: str):
    assert error_of(KD_RECIPE, override).startswith(f"override '{override}': ")


@pytest.mark.parametrize("override", ["optimiser.lr=1", "terms.kdd.weight=1", "techer.model.num_classes=3"])
def test_mistake_in_a_mapping_that_only_an_override_creates_names_the_override(error_of, override: str):
    assert f"override '{override}'" in error_of(KD_RECIPE, override)


def test_source_keeps_the_locations_of_its_options(load):
    source = load(KD_RECIPE + "validation: 0.1\nlabel_fraction: 50\n", "batch_size=32").stages[0].data["train"]
    lines = {option: location.line for option, location in source.locations.items() if location.line}
    assert lines == {"validation": KD_RECIPE.count("\n") + 1, "label_fraction": KD_RECIPE.count("\n") + 2}
    assert str(source.locations["batch_size"]) == "override 'batch_size=32'"


@pytest.mark.parametrize("stem", ["my récipe (copy)", "kd,2", "猫"])
def test_recipe_may_have_any_file_name(load, stem: str):
    assert load(name=f"{stem}.yaml").name == stem


def test_sweep_needs_a_multirun(error_of):
    assert (
        error_of(KD_RECIPE, "seed=1,2")
        == "override 'seed=1,2': an override with several values needs a multirun; add `-m` to `kdbench train`."
    )


def test_composition_leaves_no_files(load, tmp_path: Path):
    before = os.getcwd()
    load()
    assert os.getcwd() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_resolved_recipe_is_self_contained(load, tmp_path: Path, user_pairs):
    recipe = load(PAIRED, "pair=other", "terms.kd.temperature=2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text(dump_recipe(recipe))
    again = load_resolved(tmp_path / "run")
    assert again.stages == recipe.stages
    assert (again.name, again.group_choices, again.path) == (recipe.name, recipe.group_choices, recipe.path)
    assert again.resolved == recipe.resolved
    assert dump_recipe(again).split("origin:")[0] == dump_recipe(recipe).split("origin:")[0]


def test_folder_without_a_resolved_recipe_is_reported(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        load_resolved(tmp_path)


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/x", "a/../b", ".hidden", "a\\b", ""])
def test_recipe_name_cannot_leave_the_folder_of_runs(error_of, name: str):
    assert error_of(KD_RECIPE + f"origin: {{name: '{name}'}}\n").startswith("r.yaml:9 origin.name: ")


def test_shipped_pair_has_the_name_of_its_models():
    pairs = group_files("pair", Path("nowhere"))
    assert len(pairs) >= 7
    for name, path in pairs.items():
        text = path.read_text()
        student, teacher = text.split("student: {model: ")[1].split("}")[0], text.split("  model: ")[1].split("\n")[0]
        assert name == f"{teacher}_{student}" and f"weights: {{recipe: cifar100/teacher, model: {teacher}}}" in text


def test_recipe_is_found_by_name_or_path_and_unknown_name_reports_the_nearest():
    assert find_recipe("digits/kd")[0] == "digits/kd"
    Path("mine.yaml").write_text(KD_RECIPE)
    assert find_recipe("mine.yaml") == ("mine", Path("mine.yaml").resolve())
    assert find_recipe("./mine") == ("mine", Path("mine.yaml").resolve())
    with pytest.raises(ConfigError, match=r"Did you mean 'digits/kd'"):
        find_recipe("digits/kdd")
    with pytest.raises(ConfigError, match="no recipe"):
        find_recipe("../configs/protocol/cifar_240_epochs")


def test_resolved_recipe_is_json(load):
    recipe = load()
    assert json.loads(json.dumps(recipe.resolved)) == recipe.resolved
    assert load_recipe("r.yaml").stages == recipe.stages


def test_plain_values_are_applied_after_the_overrides_and_keep_their_types(load):
    load()
    values = {"student.model": {"type": "digits_cnn"}, "title": "1e3"}
    recipe = load_recipe("r.yaml", ["student=digits_mlp", "title=other"], values)
    assert recipe.stages[0].roles["student"].model == PartConfig(type="digits_cnn") and recipe.title == "1e3"
    with pytest.raises(ConfigError, match=r"student.model.type: no model 'digits_cn'. Did you mean 'digits_cnn'?"):
        load_recipe("r.yaml", values={"student.model": {"type": "digits_cn"}})


def test_last_override_of_runs_wins(load):
    load()
    path = find_recipe("r.yaml")[1]
    assert read_layers("r", path, ["runs=a", "runs=b"]).runs == "b" and read_layers("r", path).runs == "runs"
