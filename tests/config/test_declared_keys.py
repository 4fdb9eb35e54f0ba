"""Every field of the schema declares its keys; every declared key is read from YAML and reaches its field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from helpers.recipe_texts import KD_RECIPE
from kdbench.config import schema
from kdbench.config.compose.hydra import ComposedRecipe
from kdbench.config.compose.merge import merge
from kdbench.config.compose.shorthand import expand, name_listed_terms
from kdbench.config.key_tables import key_tables
from kdbench.config.load import recipe_names
from kdbench.config.parse.recipe import parse_recipe
from kdbench.config.parse.stages import TOP_LEVEL_KEYS
from kdbench.config.paths import shared_folder
from kdbench.config.schema import Recipe, StageConfig, declared_keys
from kdbench.config.schema.keys import Key, declare, declare_keys, derived
from kdbench.config.yaml_reader import parse_yaml, read_yaml
from kdbench.errors import ConfigError

CONFIG_CLASSES = [
    item
    for item in vars(schema).values()
    if isinstance(item, type) and dataclasses.is_dataclass(item) and item is not Key
]

BASE = parse_yaml(
    KD_RECIPE + "augment: {image: [flip], strong: [{type: cutout, size: 2}]}\nmodels: {extra: digits_mlp}\n", "r.yaml"
).data

WEIGHTS = {"path": "x.pt"}
FIRST_STAGE = {"artifacts": {"pick": {"type": "choose", "by": {"type": "entropy", "student": "student"}, "budget": 4}}}


def recipe_of(data: Any) -> Recipe:
    """Returns the parsed recipe without composition by Hydra, which is slower."""
    data = OmegaConf.to_container(OmegaConf.create(dict(data)), resolve=True)
    source = name_listed_terms(dataclasses.replace(parse_yaml("x: 1", "r.yaml"), data=data, locations={}))
    composed = ComposedRecipe("r", "r.yaml", "r.yaml", expand(source.data), {})
    return parse_recipe(composed, Path())


def stage_of(recipe: Recipe) -> StageConfig:
    return recipe.stages[-1]


@dataclass(frozen=True)
class Cases:
    """The keys of one table: for each key a mapping with it, and the same mapping without it.

    Attributes:
        wrap: mapping -> keys of the top level that contain it.
        read: recipe -> the dataclass that the mapping sets.
        mappings: key -> a mapping with it.
        without: key -> the mapping to compare with, where it is not the same mapping without the key.
    """

    wrap: Callable[[Any], dict[str, Any]]
    read: Callable[[Recipe], Any]
    mappings: dict[str, dict[str, Any]]
    without: dict[str, dict[str, Any]] = field(default_factory=dict)


def top_level(names: list[str], values: dict[str, Any], read: Callable[[Recipe], Any]) -> Cases:
    return Cases(lambda mapping: mapping, read, {name: {name: values[name]} for name in names})


VALUES: dict[str, Any] = {
    **{"title": "T", "paper": "P", "methods": ["m001"], "notes": {"basis": "text"}, "vars": {"a": 1}, "seed": 2},
    **{"baseline": True, "published": 70, "device": "cpu", "compile": True, "frozen_forward": "cache", "workers": 2},
    **{"frozen_batch_size": 64, "channels_last": True, "shard": ["teacher"], "data_root": "d", "runs": "r", "out": "o"},
    **{"fresh": True, "tensorboard": False, "keep_epochs": [2], "stages": {"one": {"epochs": 1}}},
    **{"models": {"extra": "digits_cnn"}, "teacher": "digits_mlp", "student": "digits_cnn", "dataset": "synthetic"},
    **{"batch_size": 32, "augment": {"image": [], "strong": []}, "label_fraction": 50, "relabel": "random_labels"},
    **{"data": {"more": "digits"}, "terms": {"more": "cross_entropy"}, "export": "extra", "evaluate": ["extra"]},
    **{"updates": [{"models": "student", "terms": "kd"}], "optimizer": {"type": "AdamW"}, "scheduler": "cosine"},
    **{"artifacts": {"soft": {"type": "soft_labels", "teacher": "teacher"}}, "epochs": 4, "steps": 5, "clip": 1.0},
    **{"accumulate": 2, "ema": 0.9, "validation": 0.1, "metrics": ["ece"], "eval_every": 2, "eval_batch_size": 8},
    **{"checkpoint_every": {"steps": 5}, "log_every": 5, "precision": "bf16", "sync_batchnorm": True},
}


def role(mapping: dict[str, Any]) -> dict[str, Any]:
    return {"models": {"extra": mapping}}


def weights(mapping: dict[str, Any]) -> dict[str, Any]:
    stages = {"one": {"models": {"other": "digits_mlp"}}, "two": role({"model": "digits_mlp", "weights": mapping})}
    return {"stages": stages}


def operand(mapping: Any) -> dict[str, Any]:
    return {"terms": {"extra": {"type": "kd", "teacher": mapping}}}


def two_stages(second: dict[str, Any]) -> dict[str, Any]:
    return {"stages": {"one": {**FIRST_STAGE, "artifacts": {**FIRST_STAGE["artifacts"], **DATASET}}, "two": second}}


DATASET = {"soft": {"type": "soft_labels", "teacher": "teacher"}}
TERM = {"type": "kd"}
BOTH_TEACHERS = {"teacher": ["teacher", "extra"]}
UPDATE = {"models": ["student"], "terms": ["ce"]}
SELECT = {"type": "random", "keep": 4}
COMBINATION = {"combine": "mean_logits", "of": ["teacher", "extra"]}
STEP = {"models": ["student"], "terms": ["ce"]}

CASES = {
    "role": Cases(
        lambda mapping: role(
            mapping if {"ema", "snapshot", "reuse"} & set(mapping) else {"model": "digits_mlp", **mapping}
        ),
        lambda recipe: stage_of(recipe).roles["extra"],
        {
            **{"model": {"model": "digits_cnn"}, "weights": {"weights": WEIGHTS}, "input": {"input": "strong"}},
            **{"frozen": {"frozen": True, "weights": WEIGHTS}, "trainable": {"trainable": False, "weights": WEIGHTS}},
            **{"ema": {"ema": "student"}, "snapshot": {"snapshot": "student"}, "reuse": {"reuse": "student"}},
            **{"decay": {"ema": "student", "decay": 0.5}, "every": {"snapshot": "student", "every": 3}},
            **{"init_index": {"init_index": 1}, "transform": {"transform": "ternary"}, "freeze": {"freeze": "layer1"}},
            **{"require": {"require": {"top1": 90}}},
        },
        {"decay": {"ema": "student"}, "every": {"snapshot": "student"}},
    ),
    "weights": Cases(
        weights,
        lambda recipe: stage_of(recipe).roles["extra"].weights,
        {
            **{"recipe": {"recipe": "digits/teacher"}, "path": {"path": "y.pt"}, "stage": {"stage": "one"}},
            **{"model": {"recipe": "digits/teacher", "model": "digits_mlp"}},
            **{
                "epoch": {"recipe": "digits/teacher", "epoch": 3},
                "role": {"recipe": "digits/teacher", "role": "student"},
            },
            **{"key": {**WEIGHTS, "key": "model"}, "strip": {**WEIGHTS, "strip": "a."}},
            **{"rename": {**WEIGHTS, "rename": {"a": "b"}}, "strict": {**WEIGHTS, "strict": False}},
        },
        {
            **{name: {"recipe": "digits/teacher"} for name in ("model", "epoch", "role")},
            **{name: WEIGHTS for name in ("recipe", "stage", "path", "key", "strip", "rename", "strict")},
        },
    ),
    "source": Cases(
        lambda mapping: two_stages({"data": {"extra": mapping}}),
        lambda recipe: stage_of(recipe).data["extra"],
        {
            **{
                "dataset": {"dataset": "synthetic"},
                "type": {"type": "synthetic", "samples": 8},
                "split": {"split": "test"},
            },
            **{"batch_size": {"batch_size": 8}, "augment": {"augment": ["flip"]}, "subset": {"subset": 0.5}},
            **{"label_fraction": {"label_fraction": 0.5}, "relabel": {"relabel": "random_labels"}},
            **{"artifact": {"artifact": "one.soft"}, "overlap": {"overlap": True}},
        },
        {"type": {}},
    ),
    "term": Cases(
        lambda mapping: {"terms": {"extra": {**TERM, **mapping}}},
        lambda recipe: stage_of(recipe).terms["extra"],
        {
            **{
                "type": {"type": "dkd"},
                "weight": {"weight": 2},
                "student": {"student": "extra"},
                "mask": {"mask": "m"},
            },
            **{"teacher": {"teacher": "extra"}, "teacher_grad": {"teacher_grad": True}},
            **{"sample_weight": {"sample_weight": "focal"}, "route": {"route": "uniform", **BOTH_TEACHERS}},
        },
        {"route": BOTH_TEACHERS},
    ),
    "operand": Cases(
        operand,
        lambda recipe: stage_of(recipe).terms["extra"].edges[0].teacher,
        {
            **{"role": {"role": "extra"}, "path": {"path": "layer1"}, "adapter": {"adapter": "linear"}},
            **{"combine": COMBINATION, "of": COMBINATION},
        },
        {"combine": {}, "of": {**COMBINATION, "of": ["teacher", "student"]}},
    ),
    "update": Cases(
        lambda mapping: {"updates": [{**UPDATE, **mapping}]},
        lambda recipe: stage_of(recipe).updates[0],
        {
            **{"models": {"models": ["extra"]}, "terms": {"terms": ["kd"]}, "repeat": {"repeat": 2}},
            **{"optimizer": {"optimizer": "AdamW"}, "select": {"select": SELECT}, "inner_step": {"inner_step": STEP}},
        },
    ),
    "inner step": Cases(
        lambda mapping: {"updates": [{**UPDATE, "inner_step": {**STEP, **mapping}}]},
        lambda recipe: stage_of(recipe).updates[0].inner_step,
        {"models": {"models": ["extra"]}, "terms": {"terms": ["kd"]}, "lr": {"lr": 0.5}},
    ),
    "artifact": Cases(
        lambda mapping: {
            "artifacts": {"extra": {"type": "reservoir", "memory": 4, **mapping}},
            "data": {"more": "digits"},
        },
        lambda recipe: stage_of(recipe).artifacts["extra"],
        {"type": {"type": "exemplars", "features": "student:layer1"}, "source": {"source": "more"}},
        {"type": {}},
    ),
    "published": Cases(
        lambda mapping: {"published": {"models": {"digits_mlp": 60}, **mapping}},
        lambda recipe: recipe.published,
        {
            **{"top1": {"top1": 70}, "models": {"models": {"digits_mlp": 61}}, "source": {"source": "paper"}},
            **{"epoch": {"epoch": "last"}, "tolerance": {"tolerance": 0.5}},
        },
    ),
    "notes": Cases(
        lambda mapping: {"notes": {"basis": "code", **mapping}},
        lambda recipe: recipe.notes,
        {
            **{"basis": {"basis": "text"}, "source": {"source": "equation 3"}, "differs": {"differs": ["a", "b"]}},
            **{"scaled_down": {"scaled_down": "64 samples"}},
        },
    ),
    "recipe": top_level(
        [name for name in declared_keys(Recipe) if name not in ("protocol", "pair", "origin")],
        VALUES,
        lambda recipe: recipe,
    ),
    "stage": top_level(list(declared_keys(StageConfig)), VALUES, stage_of),
}


TESTED_ELSEWHERE = {
    ("recipe", "protocol"),  # test_compose.py: Hydra composes groups
    ("recipe", "pair"),
    ("recipe", "origin"),  # test_compose.py: the resolved recipe
    ("weights", "initial"),  # test_loops.py
    ("source", "initial"),  # test_sources_grammar.py
    ("published", "pairs"),  # test_grammar.py
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in CASES for name in CASES[table].mappings])
def test_declared_key_is_read_and_reaches_its_field(table: str, name: str):
    cases = CASES[table]
    mapping = cases.mappings[name]
    without_key = cases.without.get(name, {key: value for key, value in mapping.items() if key != name})
    config = cases.read(recipe_of(merge(BASE, cases.wrap(mapping))))
    config_without_key = cases.read(recipe_of(merge(BASE, cases.wrap(without_key))))
    field_name = declared_keys(type(config))[name].field
    assert getattr(config, field_name) != getattr(config_without_key, field_name)


def test_cases_cover_every_declared_key():
    tables = {**key_tables(), "recipe": declared_keys(Recipe), "stage": declared_keys(StageConfig)}
    for table, cases in CASES.items():
        missing = {name for name in tables[table] if name not in cases.mappings}
        assert {(table, name) for name in missing} <= TESTED_ELSEWHERE


@pytest.mark.parametrize(
    ("top", "read", "expected"),
    [
        ({"scheduler": {"type": "cosine", "warmup": 2}}, lambda s: s.scheduler.params["warmup"], 2),
        ({"updates": [{**UPDATE, "select": {"type": "random", "keep": 4}}]}, lambda s: s.updates[0].keep, 4),
        ({"checkpoint_every": {"steps": 5, "minutes": 2}}, lambda s: s.checkpoint_every, {"steps": 5, "minutes": 2}),
        (
            {"optimizer": {"type": "SGD", "groups": [{"path": "a", "lr": 1}]}},
            lambda s: s.optimizer.groups[0]["path"],
            "a",
        ),
        ({"optimizer": {"type": "SGD", "groups": [{"type": "norm"}]}}, lambda s: s.optimizer.groups[0]["type"], "norm"),
        (
            {"augment": {"v": {"from": "image", "then": ["flip"]}}},
            lambda s: [a.type for a in s.data["train"].views["v"]],
            ["same", "flip"],
        ),
        ({"stages": {"loop": {"rounds": 2, "stages": {"one": {}}}}}, lambda s: s.name, "one@2"),
        (role({"snapshot": "student", "every": {"steps": 5}}), lambda s: s.roles["extra"].every_steps, 5),
    ],
)
def test_key_of_a_mapping_without_a_dataclass_is_read(
    top: dict[str, Any], read: Callable[[StageConfig], Any], expected: Any
):
    assert read(stage_of(recipe_of({**BASE, **top}))) == expected


@pytest.mark.parametrize("config_class", CONFIG_CLASSES, ids=lambda config_class: config_class.__name__)
def test_every_field_declares_its_keys(config_class: type):
    assert {key.field for key in declared_keys(config_class).values()} <= {
        f.name for f in dataclasses.fields(config_class)
    }


@dataclass(frozen=True)
class WithoutDeclaration:
    clip: float = field(default=1.0, metadata=declare("largest gradient norm"))
    forgotten: int = 1


@dataclass(frozen=True)
class DeclaredTwice:
    clip: float = field(default=1.0, metadata=declare("largest gradient norm"))
    norm: float = field(default=1.0, metadata=declare_keys(Key("clip", "the same key", type="float")))


def test_field_without_declaration_and_key_declared_twice_are_errors():
    with pytest.raises(TypeError, match=r"WithoutDeclaration.forgotten: declare its key"):
        declared_keys(WithoutDeclaration)
    with pytest.raises(TypeError, match=r"the key 'clip' is declared twice"):
        declared_keys(DeclaredTwice)


def test_declaration_takes_name_type_and_default_from_its_field():
    @dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = field(default=("a",), metadata=declare("names"))
        size: int | None = field(default=None, metadata=declare("size", name="length"))
        origin: str = field(default="", metadata=derived("the file"))

    names, length = declared_keys(Config).values()
    assert (names.name, names.type, names.default, names.field) == ("names", "list[str]", ("a",), "names")
    assert (length.name, length.type, length.default, length.field) == ("length", "int", None, "size")


def reverse_keys(
    data: Any, ordered: tuple[str, ...] = ("models", "data", "terms", "stages", "artifacts", "augment", "candidates")
) -> Any:
    """Returns nested data with the keys of every mapping reversed, except where the order has a meaning."""
    if isinstance(data, list):
        return [reverse_keys(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: {name: reverse_keys(item) for name, item in value.items()}
        if key in ordered and isinstance(value, dict)
        else reverse_keys(value)
        for key, value in reversed(data.items())
    }


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("digits/")])
def test_order_of_keys_does_not_change_a_recipe(name: str):
    data = read_yaml(shared_folder("recipes") / f"{name}.yaml").data
    assert list(reverse_keys(data)) == list(reversed(data)) != list(data)
    assert recipe_of(reverse_keys(data)).stages == recipe_of(data).stages


def test_order_of_keys_does_not_change_the_errors():
    data = {**BASE, "epohcs": 3, "sead": 1, "student": {"model": "digits_mlp", "frozn": True}, "clip": -1}
    messages = []
    for variant in (data, reverse_keys(data)):
        with pytest.raises(ConfigError) as raised:
            recipe_of(variant)
        messages.append(sorted(str(raised.value).splitlines()))
    assert messages[0] == messages[1] and len(messages[0]) == 5


def test_hint_at_an_unknown_key_lists_declared_keys():
    with pytest.raises(
        ConfigError, match=r"unknown key 'x' in a view that continues another view. Valid names: from, then\."
    ):
        recipe_of({**BASE, "augment": {"v": {"from": "image", "x": 1}}})
    assert {"seed", "epochs", "terms"} <= set(TOP_LEVEL_KEYS)
