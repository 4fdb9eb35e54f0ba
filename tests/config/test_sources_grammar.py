"""Sources as a recipe writes them: subsets, made datasets and choices, changed labels, views that continue others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.parse.data import read_sources
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.schema import PartConfig, SourceConfig

MADE = {"query.picked": "query@2.picked", "query@1.picked": "query@1.picked", "paint.pool": "paint.pool"}


@pytest.fixture
def read():
    """read(data, made=..., **top) -> (sources, faults)."""

    def read_data(data, made=MADE, **top) -> tuple[dict[str, SourceConfig], str]:
        context = ParseContext({})
        fields = KeyReader(context, {"dataset": "digits", "data": data, **top}, "", "the recipe")
        sources = read_sources(context, fields, 512, made)
        fields.finish()
        return sources, "\n".join(context.errors.lines)

    return read_data


def subset_of(read, value, **options):
    sources, faults = read({"train": {"subset": value}}, **options)
    assert not faults
    return sources["train"].subset


def test_a_subset_is_a_number_a_part_or_a_list_in_order(read):
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


def test_a_made_choice_is_the_latest_of_its_name(read):
    assert subset_of(read, {"made": "query.picked"}) == "query@2.picked"
    assert subset_of(read, {"made": "query@1.picked", "first": 20}) == "query@1.picked"
    listed = subset_of(read, [{"type": "shard", "of": 2}, {"made": "query.picked"}])
    assert listed == (PartConfig(type="shard", params={"of": 2}), "query@2.picked")
    sources, faults = read({}, label_fraction={"made": "query.picked", "first": 20})
    assert not faults and sources["train"].label_fraction == "query@2.picked" and sources["eval"].label_fraction is None


def test_a_null_takes_what_was_made_from_a_source(read):
    sources, faults = read({"train": {"made": None, "first": None, "dataset": "digits"}})
    assert not faults and sources["train"].artifact is None and sources["train"].dataset.type == "digits"


def test_where_no_earlier_stage_made_it_the_first_is_taken(read):
    first = {"made": "query.picked", "first": 20}
    assert subset_of(read, first, made={}) == 20
    assert subset_of(read, {"made": "query.picked", "first": {"type": "random", "amount": 20}}, made={}) == PartConfig(
        type="random", params={"amount": 20}
    )
    assert subset_of(read, {"made": "a.b", "first": [{"type": "shard", "of": 2}, 0.5]}, made={}) == (
        PartConfig(type="shard", params={"of": 2}),
        0.5,
    )
    assert read({}, made={}, label_fraction=first)[0]["train"].label_fraction == 20


def test_a_made_dataset_is_a_source_like_any_other(read):
    sources, faults = read({"pool": {"artifact": "paint.pool", "batch_size": 8, "augment": ["flip"], "subset": 0.5}})
    assert not faults
    pool = sources["pool"]
    assert (pool.dataset.type, pool.artifact, pool.batch_size, pool.subset) == ("artifact", "paint.pool", 8, 0.5)
    assert [named.type for named in pool.views["image"]] == ["flip"]


def test_a_made_dataset_may_begin_as_another(read):
    value = {"made": "later.pool", "first": {"dataset": "synthetic", "subset": 20}, "batch_size": 8}
    pool = read({"pool": value})[0]["pool"]
    assert (pool.dataset.type, pool.artifact, pool.batch_size, pool.subset) == ("synthetic", None, 8, 20)
    assert read({"pool": {**value, "first": "synthetic"}})[0]["pool"].dataset.type == "synthetic"
    assert read({"pool": {**value, "artifact": "paint.pool"}})[0]["pool"].artifact == "paint.pool"


def test_labels_change_on_a_source_or_on_train(read):
    noise = {"type": "symmetric_noise", "rate": 0.4}
    sources, faults = read({"extra": {}, "eval_old": {}}, relabel=noise)
    assert not faults
    assert sources["train"].relabel == PartConfig(type="symmetric_noise", params={"rate": 0.4})
    assert [sources[name].relabel for name in ("eval", "extra", "eval_old")] == [None] * 3
    assert read({"eval": {"relabel": "random_labels"}})[0]["eval"].relabel == PartConfig(type="random_labels")


def test_further_evaluation_sources_are_test_splits_in_evaluation_batches(read):
    sources, _ = read({"eval_old": {"subset": {"type": "classes", "keep": [1]}}})
    assert (sources["eval_old"].split, sources["eval_old"].batch_size) == ("test", 512)


def test_a_view_continues_another(read):
    augment = {"image": ["flip"], "corrupted": {"from": "image", "then": [{"type": "noise", "std": 0.3}]}}
    sources, faults = read({}, augment=augment)
    assert not faults
    same = PartConfig(type="same", params={"view": "image"})
    assert sources["train"].views["corrupted"] == (same, PartConfig(type="noise", params={"std": 0.3}))
    written, _ = read({}, augment={"corrupted": [{"type": "same", "view": "image"}, {"type": "noise", "std": 0.3}]})
    assert written["train"].views["corrupted"] == sources["train"].views["corrupted"]


@pytest.mark.parametrize(
    ("data", "top", "said"),
    [
        ({"a": {"subset": {"type": "shards", "of": 2}}}, {}, "no subset 'shards'. Did you mean 'shard'"),
        ({"a": {"subset": {"type": "shard", "off": 2}}}, {}, "no parameter 'off'. Did you mean 'of'"),
        ({"a": {"subset": {"type": "shard"}}}, {}, "subset 'shard' needs of"),
        ({"a": {"subset": 1.5}}, {}, "a share above 0 up to 1"),
        ({"a": {"subset": True}}, {}, "must be a number, {type: SUBSET"),
        ({"a": {"subset": []}}, {}, "must not be an empty list"),
        ({"a": {"subset": {"made": "query.piked"}}}, {}, "no earlier stage makes 'query.piked'"),
        ({"a": {"subset": {"made": "query.piked"}}}, {}, "Did you mean 'query.picked'"),
        ({"a": {"subset": {"made": "query"}}}, {}, "must be STAGE.NAME"),
        ({"a": {"subset": {"made": "query.picked", "frist": 2}}}, {}, "unknown key 'frist'"),
        ({}, {"label_fraction": {"made": "x.y"}}, "no earlier stage makes 'x.y'; write `first:`"),
        ({}, {"label_fraction": {"type": "random"}}, "must be a number or {artifact: STAGE.NAME"),
        ({"a": {"made": "paint.poll"}}, {}, "no earlier stage makes 'paint.poll'"),
        ({"a": {"artifact": "paint.pool", "dataset": "digits"}}, {}, "one of `made:` and `dataset:`"),
        ({"a": {"artifact": "paint.pool", "split": "test"}}, {}, "has no splits"),
        ({"a": {"artifact": "paint.pool", "kind": 1}}, {}, "unknown key 'kind'"),
        ({"a": {"dataset": "made"}}, {}, "is written `{artifact: STAGE.NAME}`"),
        ({"a": {"relabel": {"type": "symetric_noise", "rate": 1}}}, {}, "Did you mean 'symmetric_noise'"),
        ({}, {"relabel": {"type": "symmetric_noise"}}, "relabelling 'symmetric_noise' needs rate"),
        ({}, {"augment": {"b": {"from": "imge", "then": []}}}, "no view 'imge'. Did you mean 'image'"),
        ({}, {"augment": {"b": {"then": ["flip"]}}}, "needs `from`"),
        ({}, {"augment": {"b": {"from": "image", "the": []}}}, "unknown key 'the'"),
        ({}, {"augment": {"b": {"from": "c"}, "c": {"from": "b"}}}, "in a circle: b -> c -> b"),
        ({}, {"augment": {"b": ["flip", {"type": "same", "view": "image"}]}}, "comes first in a view"),
    ],
)
def test_mistakes_are_told(read, data, top, said):
    assert said in read(data, **top)[1]


def test_the_recipe_spells_its_parts_short(load):
    text = KD_RECIPE + (
        "relabel: {type: symmetric_noise, rate: 0.4}\n"
        "augment: {image: [flip], low: {from: image, then: [{type: low_resolution, factor: 2}]}}\n"
        "data: {client: {subset: [{type: shard, of: 3, number: 2}, 0.5]}}\n"
    )
    recipe = load(text)
    data = recipe.stages[0].data
    assert data["train"].relabel is not None and str(data["train"].relabel.location).startswith("r.yaml:")
    assert [named.type for named in data["train"].views["low"]] == ["same", "low_resolution"]
    assert isinstance(data["client"].subset, tuple) and data["client"].subset[1] == 0.5
    assert "r.yaml" in str(data["client"].subset[0].location)


def _example(start: str) -> str:
    """The YAML of the Data section whose text begins with `start`."""
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    section = text.split("## Data\n", 1)[1].split("\n## Terms", 1)[0]
    return next(block for block in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL) if block.startswith(start))


def test_the_examples_of_the_page_load(load):
    data = load(KD_RECIPE + _example("data:                                                        # public")).stages[0].data
    assert [len(data[name].subset) for name in ("client0", "client1", "client2")] == [2, 2, 2]
    views = load(KD_RECIPE + _example("augment:")).stages[0].data["train"].views
    assert list(views) == ["image", "strong", "corrupted"] and views["corrupted"][0].type == "same"
