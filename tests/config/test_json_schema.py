"""The JSON schema of a recipe accepts every shipped recipe and rejects what the loader rejects."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kdbench.cli.main import main
from kdbench.config.json_schema import DIALECT, SchemaBuilder, recipe_schema
from kdbench.config.key_tables import key_tables
from kdbench.config.load import load_recipe, recipe_names
from kdbench.config.paths import GROUPS, group_files, shared_folder
from kdbench.config.yaml_reader import parse_yaml, read_yaml
from kdbench.errors import ConfigError

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

VALID = """\
title: soft targets
dataset: digits
data: {extra: {dataset: digits, subset: 0.5, batch_size: 16}}
augment: {image: [{type: crop, padding: 1}, flip], noisy: {from: image, then: [{type: noise, std: 0.3}]}}
teacher: {model: digits_cnn, weights: {recipe: digits/teacher}}
student: digits_mlp
models: {mean: {ema: student, decay: 0.99}}
epochs: 3
optimizer: {type: SGD, lr: 0.1, groups: [{type: norm, weight_decay: 0}]}
scheduler: {type: step, milestones: [1, 2], warmup: 1}
metrics: [top1, ece]
checkpoint_every: {minutes: 10}
terms:
  ce: {type: cross_entropy, weight: 0.1}
  kd: {type: kd, temperature: {type: linear, start: 1, end: 4}, sample_weight: {type: focal, power: 1}}
  hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: "teacher:layer1"}
updates: [{models: [student], terms: [ce, kd, hint], repeat: 2}]
artifacts: {soft: {type: soft_labels, teacher: teacher}}
published: {top1: 73.3, epoch: last}
notes: {basis: text, differs: [smaller model]}
"""

MISTAKES = {
    "unknown top-level key": ("epochs: 3", "epochs: 3\nbatchsize: 3"),
    "misspelt top-level key": ("optimizer: ", "optimiser: "),
    "text in place of a whole number": ("epochs: 3", "epochs: three"),
    "fraction in place of a whole number": ("epochs: 3", "epochs: 2.5"),
    "true in place of a number": ("epochs: 3", "epochs: true"),
    "negative length": ("epochs: 3", "epochs: -1"),
    "zero batch size": ("batch_size: 16", "batch_size: 0"),
    "number in place of text": ("title: soft targets", "title: 3"),
    "list in place of a dataset": ("dataset: digits\ndata", "dataset: [digits]\ndata"),
    "unknown dataset": ("dataset: digits\ndata", "dataset: digit\ndata"),
    "unknown key of a source": ("batch_size: 16", "batchsize: 16"),
    "subset above 1": ("subset: 0.5", "subset: 1.5"),
    "unknown augmentation": ("type: crop", "type: crp"),
    "unknown parameter of an augmentation": ("padding: 1", "pading: 1"),
    "parameter of another type": ("padding: 1", "padding: 1.5"),
    "unknown key of a view": ("then: [", "than: ["),
    "unknown key of a role": ("{model: digits_cnn,", "{modell: digits_cnn,"),
    "unknown model": ("student: digits_mlp", "student: digits_mpl"),
    "unknown key of weights": ("{recipe: digits/teacher}", "{recipe: digits/teacher, epochs: 3}"),
    "number in place of a recipe": ("{recipe: digits/teacher}", "{recipe: 3}"),
    "decay of 1": ("decay: 0.99", "decay: 1.0"),
    "unknown optimizer": ("type: SGD", "type: SDG"),
    "unknown parameter of an optimizer": ("lr: 0.1", "learning_rate: 0.1"),
    "text in place of a learning rate": ("lr: 0.1", "lr: fast"),
    "group without selection": ("{type: norm, weight_decay: 0}", "{weight_decay: 0}"),
    "unknown schedule": ("type: step", "type: stp"),
    "unknown parameter of a schedule": ("milestones: [1, 2]", "milestone: [1, 2]"),
    "negative warm-up": ("warmup: 1", "warmup: -1"),
    "unknown metric": ("[top1, ece]", "[topp1, ece]"),
    "unknown unit of a checkpoint interval": ("{minutes: 10}", "{hours: 10}"),
    "unknown term": ("type: kd,", "type: kdd,"),
    "unknown parameter of a term": ("temperature: {", "temprature: {"),
    "text in place of a weight": ("weight: 0.1", "weight: much"),
    "unknown parameter of a schedule in a term": ("start: 1", "strat: 1"),
    "unknown sample weight": ("type: focal", "type: focl"),
    "space in an address": ('"teacher:layer1"', '"teacher layer1"'),
    "unknown key of an operand": ("{path: layer1,", "{paht: layer1,"),
    "unknown adapter": ("adapter: linear", "adapter: liner"),
    "update without terms": ("terms: [ce, kd, hint], ", ""),
    "zero repetitions": ("repeat: 2", "repeat: 0"),
    "unknown key of an update": ("repeat: 2", "repeats: 2"),
    "unknown artifact": ("type: soft_labels", "type: soft_label"),
    "percentage above 100": ("top1: 73.3", "top1: 733"),
    "unknown option of a literal": ("epoch: last", "epoch: lst"),
    "notes without basis": ("basis: text, ", ""),
    "text in place of notes": ("notes: {basis: text, differs: [smaller model]}", "notes: smaller model"),
    "unknown precision": ("epochs: 3", "epochs: 3\nprecision: bf61"),
    "unknown device": ("epochs: 3", "epochs: 3\ndevice: gpu"),
    "key of the recipe in a stage": ("epochs: 3", "stages: {one: {epochs: 3, seed: 2}}"),
    "unknown key of a loop": ("epochs: 3", "stages: {loop: {round: 2, rounds: 2, stages: {one: {epochs: 3}}}}"),
}


def schema_errors(data: Any) -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message}" for error in VALIDATOR.iter_errors(data)]


def loader_error(text: str) -> str | None:
    Path("r.yaml").write_text(text)
    try:
        load_recipe("r.yaml")
    except ConfigError as error:
        return str(error)
    return None


def test_schema_is_valid_and_does_not_import_torch():
    Draft202012Validator.check_schema(SCHEMA)
    code = "import sys, kdbench.config.json_schema as j; j.recipe_schema(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_is_valid(name: str):
    assert not schema_errors(read_yaml(shared_folder("recipes") / f"{name}.yaml").data)


@pytest.mark.parametrize("group", GROUPS)
def test_shipped_group_file_is_valid(group: str):
    for path in group_files(group, Path("nowhere")).values():
        assert not schema_errors(read_yaml(path).data), path


def test_recipe_without_mistakes_is_valid_and_loads():
    assert not schema_errors(parse_yaml(VALID, "r.yaml").data) and loader_error(VALID) is None


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_rejected_by_the_schema_and_by_the_loader(name: str):
    text, replacement = MISTAKES[name]
    assert VALID.count(text) == 1
    recipe = VALID.replace(text, replacement)
    assert schema_errors(parse_yaml(recipe, "r.yaml").data) and loader_error(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "student: {model: {type: resnet20}}",
        "terms: [cross_entropy, {type: kd, weight: 2}]",
        "terms: {kd: null}",
        "protocol: cifar_240_epochs\npair: resnet56_resnet20\noptimizer: {lr: 0.1}",
        "vars: {width: 2, layer: layer3}\nepochs: ${vars.width}\nterms: {at: {type: at, student: '${vars.layer}'}}",
        "epochs: ???",
        "stages: {one: {optimizer: {lr: 0.2}}, loop: {rounds: [{epochs: 1}, null], stages: {two: {terms: [kd]}}}}",
        "data: {noise: {type: gaussian, shape: [64]}, pool: {artifact: paint.pool, initial: digits}}",
        "label_fraction: {artifact: query.labels, initial: 20}",
        "student: {model: torchvision/resnet18}\nteacher: {model: {artifact: search.best}}",
        "terms: {kd: {type: kd, teacher: {combine: weighted, of: [t1, t2], weights: [0.3, 0.7]}}}",
        "terms: {kd: {type: kd, teacher: {combine: {type: weighted, of: probabilities}, of: [t1, t2]}}}",
        "published: 70.5",
        "scheduler: {type: chain, parts: [{type: warmup, over: 5, length: 5}, cosine]}",
        "optimizer: {type: '${vars.optimizer}', lr: 0.1}",
    ],
)
def test_shorthands_references_and_partial_mappings_are_valid(text: str):
    assert not schema_errors(parse_yaml(text, "r.yaml").data)


@pytest.mark.parametrize("table", key_tables())
def test_example_of_every_key_is_valid(table: str):
    builder = SchemaBuilder()
    for key in key_tables()[table].values():
        value = yaml.safe_load(key.example)
        assert list(value) == [key.name]
        schema = {**builder.key(key), "$defs": builder.definitions}
        assert Draft202012Validator(schema).is_valid(value[key.name]), key.example


def test_every_form_of_a_declared_type_is_defined():
    types = [key.type for keys in key_tables().values() for key in keys.values()]
    names = {node.id for text in types for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    forms = {name for name in names if name[0].isupper()} - {"Literal", "Any"}
    assert forms and forms <= set(SCHEMA["$defs"])


def test_command_prints_the_schema(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(SCHEMA)) and schema["$schema"] == DIALECT
