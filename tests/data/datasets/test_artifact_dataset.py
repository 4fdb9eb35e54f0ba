"""What an earlier stage made, read as a dataset or as a choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdbench.config.schema import ArtifactConfig, PartConfig, PartWithOperands, SourceConfig, StageConfig
from kdbench.data.datasets.artifact import expected_spec
from kdbench.data.describe import describe_source, describe_sources
from kdbench.data.loading.build import build_sources
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import ConfigError, DataError, Location
from kdbench.experiment.artifacts import describe_stages
from kdbench.registry import ARTIFACTS, Entry

CLASSES = ["a", "b", "c"]
SAMPLES = 24


def content(**changes):
    generator = torch.Generator().manual_seed(0)
    made = {
        "images": torch.randint(0, 256, (SAMPLES, 3, 6, 6), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(SAMPLES) % 3,
        "fields": {
            "soft": torch.rand(SAMPLES, 3, generator=generator).half(),
            "weight": torch.arange(SAMPLES) / SAMPLES,
            "box": torch.arange(SAMPLES)[:, None].expand(-1, 3).contiguous(),
        },
        "classes": CLASSES,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
    }
    return made | changes


@pytest.fixture
def stored(tmp_path):
    """stored(name, content) -> the mapping of files that sources are built with."""
    files = {}

    def store(name="paint@2.pool", value=None):
        files[name] = tmp_path / f"{name}.pt"
        torch.save(content() if value is None else value, files[name])
        return files

    return store


def source(name="train", made="paint@2.pool", **rest):
    return SourceConfig(
        name=name,
        dataset=PartConfig(type="artifact", location=Location(f"data.{name}.artifact", "recipe.yaml", 4)),
        artifact=made,
        batch_size=rest.pop("batch_size", 8),
        location=Location(f"data.{name}", "recipe.yaml", 3),
        **rest,
    )


def opened(config, files, **options):
    options = {"validation": None, "seed": 1, "device": "cpu", "data_root": "data"} | options
    return build_sources({config.name: config}, artifact_files=files, **options)[config.name]


def collect(batches):
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_a_made_dataset_is_a_dataset_like_any_other(stored):
    made = content()
    found = opened(source(subset=0.5, label_fraction=6), stored())
    batch = collect(found.evaluation_batches(5))
    assert (found.classes, found.population, found.num_samples) == (CLASSES, SAMPLES, 12)
    mean, std = (torch.tensor(made[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(batch["image"], (made["images"][batch["index"]] / 255 - mean) / std)
    shown = batch["labelled"]
    assert torch.equal(batch["label"][shown], made["labels"][batch["index"]][shown])
    assert torch.bincount(batch["label"][shown]).tolist() == [2, 2, 2]


def test_its_further_fields_are_fields_of_the_batch_whatever_the_order(stored):
    made, files = content(), stored()
    for world in (1, 2):
        for rank in range(world):
            for dtype in (torch.float32, torch.float64):
                found = opened(source(), files, rank=rank, world_size=world, dtype=dtype)
                for batch in found.batches(1):
                    for name, value in made["fields"].items():
                        wanted = value[batch["index"]]
                        wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
                        assert batch[name].dtype == wanted.dtype and torch.equal(batch[name], wanted)
                    shapes = {name: (tuple(v.shape[1:]), str(v.dtype)[6:]) for name, v in batch.items()}
                    assert shapes == found.field_specs()


def test_images_without_a_mean_are_normalised_already(stored):
    images = torch.randn(SAMPLES, 1, 4, 4)
    files = stored(value=content(images=images, mean=None, std=None))
    batch = collect(opened(source(), files).evaluation_batches(8))
    assert torch.equal(batch["image"], images)
    views = {"image": (PartConfig(type="color", location=Location("augment", "recipe.yaml", 9)),)}
    with pytest.raises(ConfigError, match=r"recipe.yaml:9 augment: color changes colours .* stored normalised"):
        opened(source(views=views), files)


def test_labels_that_the_maker_marked_as_unknown_are_hidden(stored):
    known = torch.arange(SAMPLES) % 2 == 0
    files = stored(value=content(fields={"labelled": known}))
    for config in (source(), source(relabel=PartConfig(type="random_labels"))):
        found = opened(config, files)
        batch = collect(found.batches(0))
        assert torch.equal(batch["labelled"], known[batch["index"]])
        assert torch.equal(batch["label"] == -100, ~batch["labelled"])
        assert set(found.field_specs()) == set(batch)
    fewer = collect(opened(source(label_fraction=6), files).batches(0))
    assert int(fewer["labelled"].sum()) == 6 and known[fewer["index"][fewer["labelled"]]].all()


def test_labels_below_zero_stay_unknown(stored):
    labels = torch.where(torch.arange(SAMPLES) < 12, torch.arange(SAMPLES) % 3, -100)
    files = stored(value=content(labels=labels))
    batch = collect(
        opened(source(subset=0.5, relabel=PartConfig(type="symmetric_noise", params={"rate": 1.0})), files).evaluation_batches(8)
    )
    assert int((batch["label"] == -100).sum()) == 6  # they count as a class of their own
    assert (batch["label"][batch["label_true"] >= 0] != batch["label_true"][batch["label_true"] >= 0]).all()


def test_a_made_choice_names_positions_of_the_split(stored, make):
    index = torch.tensor([3, 40, 41, 99])
    files = stored("query@1.picked", {"index": index})
    config = make(params={"samples": 100}, subset="query@1.picked", batch_size=2)
    found = opened(config, files)
    assert torch.equal(found.positions, index)
    assert describe_source(config, "data", artifact_files=files).samples == 4
    assert describe_source(config, "data").samples is None
    config = make(params={"samples": 100}, label_fraction="query@1.picked")
    batch = collect(opened(config, files).evaluation_batches(32))
    assert torch.equal(batch["labelled"].nonzero()[:, 0], index)
    shard = PartConfig(type="shard", params={"of": 2})
    both = opened(make(params={"samples": 100}, subset=(shard, "query@1.picked"), batch_size=1), files).positions
    part = opened(make(params={"samples": 100}, subset=shard), files).positions
    assert set(both.tolist()) == set(index.tolist()) & set(part.tolist())


def test_validation_is_held_out_of_a_made_dataset_too(stored):
    files = stored()
    data = {"train": source(), "eval": source("eval")}
    sources = build_sources(data, validation=6, seed=1, device="cpu", data_root="data", artifact_files=files)
    rest = {*sources["train"].positions.tolist(), *sources["eval"].positions.tolist()}
    assert not rest & set(sources["validation"].positions.tolist())
    assert describe_sources(data, 6, "data", artifact_files=files)["train"].samples == sources["train"].num_samples == SAMPLES - 6


def test_the_same_content_has_the_same_checksum(stored):
    one = opened(source(), stored()).checksum
    assert opened(source(made="b.c"), stored("b.c")).checksum == one
    other = content(fields=content()["fields"] | {"weight": torch.zeros(SAMPLES)})
    assert opened(source(made="b.d"), stored("b.d", other)).checksum != one


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"index": torch.arange(3)}, "holds a choice of samples, not a dataset"),
        ({"value": torch.ones(3)}, "holds a tensor, not a dataset"),
        (content(labels=torch.arange(3)), "has 24 images but another number of labels"),
        (content(fields={"soft": torch.ones(2, 3)}), "another number of soft"),
        (content(fields={"index": torch.arange(SAMPLES)}), "index cannot be stored for each sample"),
        ([1, 2], "holds list"),
    ],
)
def test_files_that_are_no_dataset_are_refused(stored, value, message):
    with pytest.raises(DataError, match=rf"recipe.yaml:4 data.train.artifact: .*{message}"):
        opened(source(), stored(value=value))


def test_what_is_not_there_is_told(stored, make, tmp_path):
    with pytest.raises(DataError, match=r"recipe.yaml:3 data.train: paint@2.pool has not been made yet"):
        opened(source(), {})
    with pytest.raises(DataError, match=r"data.train: subset: query.picked has not been made yet"):
        opened(make(subset="query.picked"), None)
    with pytest.raises(DataError, match="is gone; begin the run anew"):
        opened(source(), {"paint@2.pool": tmp_path / "nothing.pt"})
    (tmp_path / "torn.pt").write_bytes(b"PK torn")
    with pytest.raises(DataError, match=r"torn\.pt cannot be read"):
        opened(source(), {"paint@2.pool": tmp_path / "torn.pt"})
    files = stored("query.picked", {"index": torch.tensor([700])})
    with pytest.raises(DataError, match="chooses among more than the 512 samples"):
        opened(make(subset="query.picked"), files)
    with pytest.raises(DataError, match="holds a dataset, not a choice"):
        opened(make(subset="paint.x"), stored("paint.x"))


def test_a_view_may_not_be_called_like_a_field(stored):
    with pytest.raises(ConfigError, match="a view is called soft, which is a field of the dataset"):
        opened(source(views={"image": (), "soft": ()}), stored())


def test_before_it_is_made_its_fields_are_those_of_what_it_is_made_from(stored, make, monkeypatch):
    monkeypatch.setitem(
        ARTIFACTS._plugin_entries,
        "paints",
        Entry("paints", "m", "s", "", {}, {"produces": "dataset", "fields": ("soft", "weight")}),
    )
    first = StageConfig(
        name="paint",
        roles={},
        data={
            "train": make(views={"image": (PartConfig(type="crop", params={"size": 24}),)}),
            "eval": make(name="eval", split="test"),
        },
        terms={},
        artifacts={"pool": ArtifactConfig(name="pool", part=PartWithOperands(type="paints"), source="train")},
    )
    second = StageConfig(
        name="use", roles={}, data={"train": source(made="paint.pool", views={"image": (), "strong": ()})}, terms={}
    )
    stages: Any = SimpleNamespace(stages=[first, second], data_root="data")
    spec = describe_stages(stages)[1].specs["train"]
    assert spec.fields["image"] == spec.fields["strong"] == ((3, 24, 24), "float32")
    assert spec.fields["soft"] == ((10,), "float32") and spec.fields["weight"] == ((), "float32")
    assert (spec.classes, spec.samples, spec.problem) == (10, None, None)
    files = stored("paint.pool", content())
    known = describe_stages(stages, files)[1].specs["train"]
    assert known.fields["soft"] == ((3,), "float32") and known.fields["box"] == ((3,), "int64")
    assert (known.samples, known.population, known.classes) == (SAMPLES, SAMPLES, 3)


def test_a_maker_without_images_takes_those_of_evaluation(monkeypatch):
    monkeypatch.setitem(ARTIFACTS._plugin_entries, "paints", Entry("paints", "m", "s", "", {}, {"produces": "dataset"}))
    noise = SourceSpec({"z": ((64,), "float32"), "index": ((), "int64")})
    evaluation = SourceSpec({"image": ((1, 8, 8), "float32")}, 10)
    spec = expected_spec("paints", noise, evaluation)
    assert spec.fields == {"image": ((1, 8, 8), "float32")} and spec.classes == 10


def test_another_source_stands_in_where_nothing_is_known(make):
    data = {"train": source(), "eval": make(name="eval", split="test", params={"shape": [1, 8, 8]})}
    spec = describe_sources(data, None, "data")["train"]
    assert spec.fields["image"] == ((1, 8, 8), "float32") and spec.classes == 10
