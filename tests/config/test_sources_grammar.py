"""Sources of a recipe: subsets, artifacts, relabelling, views that continue other views."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.parse.data import read_sources
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.stages import TOP_LEVEL_KEYS
from kdbench.config.schema import PartConfig, SourceConfig

ARTIFACT_NAMES = {"query.picked": "query@2.picked", "query@1.picked": "query@1.picked", "paint.pool": "paint.pool"}


@pytest.fixture
def read():
    """Returns read(data, artifact_names=..., **top) -> (sources, errors)."""

    def read_data(data, artifact_names=ARTIFACT_NAMES, **top) -> tuple[dict[str, SourceConfig], str]:
        context = ParseContext({})
        reader = KeyReader(context, {"dataset": "digits", "data": data, **top}, "", "the recipe", TOP_LEVEL_KEYS)
        sources = read_sources(context, reader, 512, artifact_names)
        return sources, "\n".join(context.errors.lines)

    return read_data


def subset_of(read, value, **options):
    sources, errors = read({"train": {"subset": value}}, **options)
    assert not errors
    return sources["train"].subset


def test_subset_is_a_number_a_part_or_an_ordered_list(read):
    assert subset_of(read, 0.5) == 0.5
    assert subset_of(read, {"type": "shard", "of": 3, "number": 1}) == PartConfig(
        type="shard", params={"of": 3, "number": 1}
    )
    several = subset_of(read, [{"type": "classes", "keep": [0, "3"]}, {"type": "random", "amount": 0.5}, 20])
    assert several == (
        PartConfig(type="classes", params={"keep": [0, "3"]}),
        PartConfig(type="random", params={"amount": 0.5}),
        20,
    )


def test_artifact_reference_resolves_to_its_full_name(read):
    assert subset_of(read, {"artifact": "query.picked"}) == "query@2.picked"
    assert subset_of(read, {"artifact": "query@1.picked", "initial": 20}) == "query@1.picked"
    steps = subset_of(read, [{"type": "shard", "of": 2}, {"artifact": "query.picked"}])
    assert steps == (PartConfig(type="shard", params={"of": 2}), "query@2.picked")
    sources, errors = read({}, label_fraction={"artifact": "query.picked", "initial": 20})
    assert not errors and sources["train"].label_fraction == "query@2.picked" and sources["eval"].label_fraction is None


def test_null_removes_the_artifact_of_a_source(read):
    sources, errors = read({"train": {"artifact": None, "initial": None, "dataset": "digits"}})
    assert not errors and sources["train"].artifact is None and sources["train"].dataset.type == "digits"


def test_initial_applies_while_no_stage_has_produced_the_artifact(read):
    reference = {"artifact": "query.picked", "initial": 20}
    assert subset_of(read, reference, artifact_names={}) == 20
    reference_to_part = {"artifact": "query.picked", "initial": {"type": "random", "amount": 20}}
    expected = PartConfig(type="random", params={"amount": 20})
    assert subset_of(read, reference_to_part, artifact_names={}) == expected
    assert subset_of(read, {"artifact": "a.b", "initial": [{"type": "shard", "of": 2}, 0.5]}, artifact_names={}) == (
        PartConfig(type="shard", params={"of": 2}),
        0.5,
    )
    assert read({}, artifact_names={}, label_fraction=reference)[0]["train"].label_fraction == 20


def test_dataset_artifact_is_a_source(read):
    sources, errors = read({"pool": {"artifact": "paint.pool", "batch_size": 8, "augment": ["flip"], "subset": 0.5}})
    assert not errors
    pool = sources["pool"]
    assert (pool.dataset.type, pool.artifact, pool.batch_size, pool.subset) == ("artifact", "paint.pool", 8, 0.5)
    assert [part.type for part in pool.views["image"]] == ["flip"]


def test_source_has_another_dataset_initially(read):
    value = {"artifact": "later.pool", "initial": {"dataset": "synthetic", "subset": 20}, "batch_size": 8}
    pool = read({"pool": value})[0]["pool"]
    assert (pool.dataset.type, pool.artifact, pool.batch_size, pool.subset) == ("synthetic", None, 8, 20)
    assert read({"pool": {**value, "initial": "synthetic"}})[0]["pool"].dataset.type == "synthetic"
    assert read({"pool": {**value, "artifact": "paint.pool"}})[0]["pool"].artifact == "paint.pool"


def test_relabel_applies_to_a_source_or_to_train(read):
    noise = {"type": "symmetric_noise", "rate": 0.4}
    sources, errors = read({"extra": {}, "eval_old": {}}, relabel=noise)
    assert not errors
    assert sources["train"].relabel == PartConfig(type="symmetric_noise", params={"rate": 0.4})
    assert [sources[name].relabel for name in ("eval", "extra", "eval_old")] == [None] * 3
    assert read({"eval": {"relabel": "random_labels"}})[0]["eval"].relabel == PartConfig(type="random_labels")


def test_additional_evaluation_sources_use_the_test_split_and_the_evaluation_batch_size(read):
    sources, _ = read({"eval_old": {"subset": {"type": "classes", "keep": [1]}}})
    assert (sources["eval_old"].split, sources["eval_old"].batch_size) == ("test", 512)


def test_view_continues_another_view(read):
    augment = {"image": ["flip"], "corrupted": {"from": "image", "then": [{"type": "noise", "std": 0.3}]}}
    sources, errors = read({}, augment=augment)
    assert not errors
    same = PartConfig(type="same", params={"view": "image"})
    assert sources["train"].views["corrupted"] == (same, PartConfig(type="noise", params={"std": 0.3}))
    explicit, _ = read({}, augment={"corrupted": [{"type": "same", "view": "image"}, {"type": "noise", "std": 0.3}]})
    assert explicit["train"].views["corrupted"] == sources["train"].views["corrupted"]


@pytest.mark.parametrize(
    ("data", "top", "fragment"),
    [
        ({"a": {"subset": {"type": "shards", "of": 2}}}, {}, "no subset 'shards'. Did you mean 'shard'"),
        ({"a": {"subset": {"type": "shard", "off": 2}}}, {}, "no parameter 'off'. Did you mean 'of'"),
        ({"a": {"subset": {"type": "shard"}}}, {}, "subset 'shard' needs `of`"),
        ({"a": {"subset": 1.5}}, {}, "a fraction in (0, 1]"),
        ({"a": {"subset": True}}, {}, "must be a number, {type: SUBSET"),
        ({"a": {"subset": []}}, {}, "the list is empty"),
        ({"a": {"subset": {"artifact": "query.piked"}}}, {}, "no earlier stage produces the artifact 'query.piked'"),
        ({"a": {"subset": {"artifact": "query.piked"}}}, {}, "Did you mean 'query.picked'"),
        ({"a": {"subset": {"artifact": "query"}}}, {}, "must be STAGE.NAME"),
        ({"a": {"subset": {"artifact": "query.picked", "frist": 2}}}, {}, "unknown key 'frist'"),
        (
            {},
            {"label_fraction": {"artifact": "x.y"}},
            "no earlier stage produces the artifact 'x.y'; if a later stage of a loop does, add `initial:`",
        ),
        ({}, {"label_fraction": {"type": "random"}}, "must be a number or {artifact: STAGE.NAME"),
        ({"a": {"artifact": "paint.poll"}}, {}, "no earlier stage produces the artifact 'paint.poll'"),
        ({"a": {"artifact": "paint.pool", "dataset": "digits"}}, {}, "`artifact` and `dataset` exclude each other"),
        ({"a": {"artifact": "paint.pool", "split": "test"}}, {}, "an artifact has no splits"),
        ({"a": {"artifact": "paint.pool", "kind": 1}}, {}, "unknown key 'kind'"),
        ({"a": {"dataset": "artifact"}}, {}, "write `artifact: STAGE.NAME`"),
        ({"a": {"relabel": {"type": "symetric_noise", "rate": 1}}}, {}, "Did you mean 'symmetric_noise'"),
        ({}, {"relabel": {"type": "symmetric_noise"}}, "relabelling 'symmetric_noise' needs `rate`"),
        ({}, {"augment": {"b": {"from": "imge", "then": []}}}, "no view 'imge'. Did you mean 'image'"),
        ({}, {"augment": {"b": {"then": ["flip"]}}}, "the key `from` is missing"),
        ({}, {"augment": {"b": {"from": "image", "the": []}}}, "unknown key 'the'"),
        ({}, {"augment": {"b": {"from": "c"}, "c": {"from": "b"}}}, "in a cycle: b -> c -> b"),
        (
            {},
            {"augment": {"b": ["flip", {"type": "same", "view": "image"}]}},
            "must be the first augmentation of a view",
        ),
    ],
)
def test_mistake_in_a_source_is_reported(read, data, top, fragment):
    assert fragment in read(data, **top)[1]


def test_parts_of_sources_are_loaded_with_their_locations(load):
    text = KD_RECIPE + (
        "relabel: {type: symmetric_noise, rate: 0.4}\n"
        "augment: {image: [flip], low: {from: image, then: [{type: low_resolution, factor: 2}]}}\n"
        "data: {client: {subset: [{type: shard, of: 3, number: 2}, 0.5]}}\n"
    )
    recipe = load(text)
    data = recipe.stages[0].data
    assert data["train"].relabel is not None and str(data["train"].relabel.location).startswith("r.yaml:")
    assert [part.type for part in data["train"].views["low"]] == ["same", "low_resolution"]
    assert isinstance(data["client"].subset, tuple) and data["client"].subset[1] == 0.5
    assert "r.yaml" in str(data["client"].subset[0].location)


def _example(start: str) -> str:
    """Returns the YAML example of the section Data that begins with `start`."""
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    section = text.split("## Data\n", 1)[1].split("\n## Terms", 1)[0]
    return next(block for block in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL) if block.startswith(start))


def test_examples_of_the_documentation_load(load):
    data = (
        load(KD_RECIPE + _example("data:                                                        # public"))
        .stages[0]
        .data
    )
    assert [len(data[name].subset) for name in ("client0", "client1", "client2")] == [2, 2, 2]
    views = load(KD_RECIPE + _example("augment:")).stages[0].data["train"].views
    assert list(views) == ["image", "strong", "corrupted"] and views["corrupted"][0].type == "same"
