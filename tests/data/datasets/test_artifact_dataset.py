"""Artifacts of earlier stages, read as datasets or as subsets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.data_sources import (
    concatenate,
    evaluation_batches,
    open_source,
    part_config,
    source_config,
    training_batches,
)
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


def dataset_content(**changes) -> dict[str, Any]:
    """Returns the content of a dataset artifact."""
    generator = torch.Generator().manual_seed(0)
    content = {
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
    return content | changes


@pytest.fixture
def write_artifact(tmp_path):
    """write_artifact(name, content) writes a file and returns the mapping of all files, as sources take it."""
    files = {}

    def write(name="paint@2.pool", content=None):
        files[name] = tmp_path / f"{name}.pt"
        torch.save(dataset_content() if content is None else content, files[name])
        return files

    return write


def artifact_config(name="train", artifact="paint@2.pool", batch_size=8, **options) -> SourceConfig:
    """Configures a source whose dataset is an artifact."""
    return SourceConfig(
        name=name,
        dataset=PartConfig(type="artifact", location=Location(f"data.{name}.artifact", "recipe.yaml", 4)),
        artifact=artifact,
        batch_size=batch_size,
        location=Location(f"data.{name}", "recipe.yaml", 3),
        **options,
    )


def test_artifact_is_a_dataset_like_any_other(write_artifact):
    content = dataset_content()
    source = open_source(artifact_config(subset=0.5, label_fraction=6), artifact_files=write_artifact())
    batch = concatenate(evaluation_batches(source, 5))
    assert (source.classes, source.population, source.num_samples) == (CLASSES, SAMPLES, 12)
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(batch["image"], (content["images"][batch["index"]] / 255 - mean) / std)
    labelled = batch["labelled"]
    assert torch.equal(batch["label"][labelled], content["labels"][batch["index"]][labelled])
    assert torch.bincount(batch["label"][labelled]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_stored_fields_are_fields_of_the_batch(write_artifact, rank, world_size, dtype):
    options = {"rank": rank, "world_size": world_size, "dtype": dtype}
    source = open_source(artifact_config(), artifact_files=write_artifact(), **options)
    for batch in training_batches(source, 1):
        for name, value in dataset_content()["fields"].items():
            expected = value[batch["index"]]
            expected = expected.to(dtype) if expected.is_floating_point() else expected
            assert batch[name].dtype == expected.dtype and torch.equal(batch[name], expected)
        specs = {name: (tuple(value.shape[1:]), str(value.dtype)[6:]) for name, value in batch.items()}
        assert specs == source.field_specs()


def test_images_without_mean_are_used_as_normalised_images(write_artifact):
    images = torch.randn(SAMPLES, 1, 4, 4)
    files = write_artifact(content=dataset_content(images=images, mean=None, std=None))
    batch = concatenate(evaluation_batches(open_source(artifact_config(), artifact_files=files), 8))
    assert torch.equal(batch["image"], images)
    views = {"image": (PartConfig(type="color", location=Location("augment", "recipe.yaml", 9)),)}
    with pytest.raises(ConfigError, match=r"recipe.yaml:9 augment: color changes colours .* stored normalised"):
        open_source(artifact_config(views=views), artifact_files=files)


def test_labels_that_the_artifact_marks_as_unknown_are_hidden(write_artifact):
    labelled = torch.arange(SAMPLES) % 2 == 0
    files = write_artifact(content=dataset_content(fields={"labelled": labelled}))
    for config in (artifact_config(), artifact_config(relabel=part_config("random_labels"))):
        source = open_source(config, artifact_files=files)
        batch = concatenate(training_batches(source, 0))
        assert torch.equal(batch["labelled"], labelled[batch["index"]])
        assert torch.equal(batch["label"] == -100, ~batch["labelled"])
        assert set(source.field_specs()) == set(batch)
    source = open_source(artifact_config(label_fraction=6), artifact_files=files)
    batch = concatenate(training_batches(source, 0))
    assert int(batch["labelled"].sum()) == 6 and labelled[batch["index"][batch["labelled"]]].all()


def test_negative_labels_stay_unknown(write_artifact):
    labels = torch.where(torch.arange(SAMPLES) < 12, torch.arange(SAMPLES) % 3, -100)
    files = write_artifact(content=dataset_content(labels=labels))
    config = artifact_config(subset=0.5, relabel=part_config("symmetric_noise", rate=1.0))
    batch = concatenate(evaluation_batches(open_source(config, artifact_files=files), 8))
    assert int((batch["label"] == -100).sum()) == 6  # a balanced subset counts them as a class
    has_label = batch["label_true"] >= 0
    assert (batch["label"][has_label] != batch["label_true"][has_label]).all()


def test_subset_artifact_selects_indices_of_the_split(write_artifact):
    index = torch.tensor([3, 40, 41, 99])
    files = write_artifact("query@1.picked", {"index": index})
    options = {"params": {"samples": 100}}
    config = source_config(subset="query@1.picked", batch_size=2, **options)
    assert torch.equal(open_source(config, artifact_files=files).indices, index)
    assert describe_source(config, "data", artifact_files=files).samples == 4
    assert describe_source(config, "data").samples is None
    labelled = open_source(source_config(label_fraction="query@1.picked", **options), artifact_files=files)
    batch = concatenate(evaluation_batches(labelled, 32))
    assert torch.equal(batch["labelled"].nonzero()[:, 0], index)
    shard = part_config("shard", of=2)
    config = source_config(subset=(shard, "query@1.picked"), batch_size=1, **options)
    both = open_source(config, artifact_files=files).indices
    shard_indices = open_source(source_config(subset=shard, **options), artifact_files=files).indices
    assert set(both.tolist()) == set(index.tolist()) & set(shard_indices.tolist())


def test_validation_is_held_out_of_an_artifact_too(write_artifact):
    files = write_artifact()
    data = {"train": artifact_config(), "eval": artifact_config("eval")}
    sources = build_sources(data, validation=6, seed=1, device="cpu", data_root="data", artifact_files=files)
    used = {*sources["train"].indices.tolist(), *sources["eval"].indices.tolist()}
    assert not used & set(sources["validation"].indices.tolist())
    specs = describe_sources(data, 6, "data", artifact_files=files)
    assert specs["train"].samples == sources["train"].num_samples == SAMPLES - 6


def test_checksum_is_a_function_of_the_content(write_artifact):
    def checksum(name, content=None):
        files = write_artifact(name, content)
        return open_source(artifact_config(artifact=name), artifact_files=files).checksum

    other_content = dataset_content(fields=dataset_content()["fields"] | {"weight": torch.zeros(SAMPLES)})
    assert checksum("paint@2.pool") == checksum("b.c") != checksum("b.d", other_content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"index": torch.arange(3)}, "contains a subset, expected a dataset"),
        ({"value": torch.ones(3)}, "contains a tensor, expected a dataset"),
        (dataset_content(labels=torch.arange(3)), "has 24 images but a different number of values in labels"),
        (dataset_content(fields={"soft": torch.ones(2, 3)}), "different number of values in soft"),
        (
            dataset_content(fields={"index": torch.arange(SAMPLES)}),
            "stores the field index, which the source computes itself",
        ),
        ([1, 2], "contains an object of type list, expected an artifact"),
    ],
)
def test_files_that_are_no_dataset_are_rejected(write_artifact, content, message):
    with pytest.raises(DataError, match=rf"recipe.yaml:4 data.train.artifact: .*{message}"):
        open_source(artifact_config(), artifact_files=write_artifact(content=content))


def test_missing_and_damaged_artifacts_are_reported(write_artifact, tmp_path):
    with pytest.raises(DataError, match=r"recipe.yaml:3 data.train: the artifact paint@2.pool does not exist yet"):
        open_source(artifact_config(), artifact_files={})
    with pytest.raises(DataError, match=r"data.train: subset: the artifact query.picked does not exist yet"):
        open_source(source_config(subset="query.picked"))
    with pytest.raises(DataError, match=r"nothing\.pt is missing; start the run again with fresh=true"):
        open_source(artifact_config(), artifact_files={"paint@2.pool": tmp_path / "nothing.pt"})
    (tmp_path / "torn.pt").write_bytes(b"PK torn")
    with pytest.raises(DataError, match=r"torn\.pt cannot be read"):
        open_source(artifact_config(), artifact_files={"paint@2.pool": tmp_path / "torn.pt"})


def test_unsuitable_subset_artifacts_are_rejected(write_artifact):
    files = write_artifact("query.picked", {"index": torch.tensor([700])})
    with pytest.raises(DataError, match="selects samples with an index of at least 512, the size of this split"):
        open_source(source_config(subset="query.picked"), artifact_files=files)
    with pytest.raises(DataError, match="contains a dataset, expected a subset"):
        open_source(source_config(subset="paint.x"), artifact_files=write_artifact("paint.x"))


def test_view_with_the_name_of_a_stored_field_is_rejected(write_artifact):
    with pytest.raises(ConfigError, match="rename the view soft: the dataset has a field of this name"):
        open_source(artifact_config(views={"image": (), "soft": ()}), artifact_files=write_artifact())


def register_dataset_artifact(monkeypatch, **facts):
    """Registers an artifact type `paints` that builds datasets."""
    entry = Entry("paints", "m", "s", "", {}, {"produces": "dataset", **facts})
    monkeypatch.setitem(ARTIFACTS._plugin_entries, "paints", entry)


def test_missing_artifact_has_the_expected_fields(write_artifact, monkeypatch):
    register_dataset_artifact(monkeypatch, fields=("soft", "weight"))
    cropped = {"image": (PartConfig(type="crop", params={"size": 24}),)}
    stages = [
        StageConfig(
            name="paint",
            roles={},
            data={"train": source_config(views=cropped), "eval": source_config(name="eval", split="test")},
            terms={},
            artifacts={"pool": ArtifactConfig(name="pool", part=PartWithOperands(type="paints"), source="train")},
        ),
        StageConfig(
            name="use",
            roles={},
            data={"train": artifact_config(artifact="paint.pool", views={"image": (), "strong": ()})},
            terms={},
        ),
    ]
    recipe: Any = SimpleNamespace(stages=stages, data_root="data")
    expected = describe_stages(recipe)[1].specs["train"]
    assert expected.fields["image"] == expected.fields["strong"] == ((3, 24, 24), "float32")
    assert expected.fields["soft"] == ((10,), "float32") and expected.fields["weight"] == ((), "float32")
    assert (expected.classes, expected.samples, expected.problem) == (10, None, None)
    spec = describe_stages(recipe, write_artifact("paint.pool", dataset_content()))[1].specs["train"]
    assert spec.fields["soft"] == ((3,), "float32") and spec.fields["box"] == ((3,), "int64")
    assert (spec.samples, spec.population, spec.classes) == (SAMPLES, SAMPLES, 3)


def test_artifact_from_a_source_without_images_has_those_of_evaluation(monkeypatch):
    register_dataset_artifact(monkeypatch)
    noise = SourceSpec({"z": ((64,), "float32"), "index": ((), "int64")})
    evaluation = SourceSpec({"image": ((1, 8, 8), "float32")}, 10)
    spec = expected_spec("paints", noise, evaluation)
    assert spec.fields == {"image": ((1, 8, 8), "float32")} and spec.classes == 10


def test_artifact_without_expected_spec_is_described_like_another_source():
    data = {"train": artifact_config(), "eval": source_config(name="eval", split="test", params={"shape": [1, 8, 8]})}
    spec = describe_sources(data, None, "data")["train"]
    assert spec.fields["image"] == ((1, 8, 8), "float32") and spec.classes == 10
