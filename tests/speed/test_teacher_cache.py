"""Teacher cache: exact, shared by runs, safe to interrupt, and compared with the network before use."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.recipes import (  # noqa: F401
    QuietConsole,
    comparable_results,
    differing_keys,
    plugin_registration,
    train_recipe_text,
)
from kdbench.data.augment.view import View
from kdbench.engine.network.features import Feature
from kdbench.files import read_json
from kdbench.speed.teacher_cache import cache_file as cache_file_module
from kdbench.speed.teacher_cache import cached_source as cached_source_module
from kdbench.speed.teacher_cache.cache_file import CacheFile, CacheUnavailable, RowLayout, format_bytes
from kdbench.speed.teacher_cache.cached_source import RoleForward

DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 61}\n"
TEXT = """
student: {model: {type: t_conv, norm: batch}}
teacher: {model: {type: t_layers, hidden: 16}, weights: {path: teacher.pt}}
terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
augment: [{type: crop, padding: 1}, flip]
label_fraction: 20
epochs: 3
batch_size: 8
frozen_batch_size: 32
precision: float64
tensorboard: false
"""
NUM_ROWS = 61 * 18
"""Samples times variants of a crop padded by 1 and a flip."""


@pytest.fixture(autouse=True)
def teacher_weights() -> None:
    """Writes the weights of the teacher, which all seeds share, and those of another network."""
    from helpers.plugin_parts import Layers

    for name, seed in (("teacher.pt", 1), ("other.pt", 2)):
        torch.manual_seed(seed)
        torch.save(Layers(hidden=16).state_dict(), name)


def run(out: str, mode: str = "cache", *overrides: str, console: QuietConsole | None = None) -> dict[str, Any]:
    """Trains; returns the teacher's entry in the manifest."""
    train_recipe_text(TEXT, f"out={out}", f"frozen_forward={mode}", *overrides, data=DATA, console=console)
    return read_json(f"{out}/manifest.json")["frozen_forward"]["main"]["teacher"]


def cache_folders() -> list[Path]:
    return sorted(Path("runs/teacher_cache").iterdir())


def equal(first: str, second: str) -> bool:
    """Compares two runs bit for bit; runs of one mode must be equal."""
    return differing_keys(comparable_results(first), comparable_results(second)) == []


def close(first: str, second: str) -> bool:
    """Compares the weights of two runs of different modes up to the rounding of float64.

    A matrix product of 5 rows may sum in another order than one of 32 rows.
    """
    checkpoints = [torch.load(f"{name}/checkpoints/last.pt", weights_only=True) for name in (first, second)]
    weights = [checkpoint["models"]["student"].values() for checkpoint in checkpoints]
    pairs = zip(*weights, strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_second_run_computes_no_rows_and_another_seed_shares_the_cache():
    first, second = run("first"), run("second")
    assert first["mode"] == second["mode"] == "cache" and first["cache"] == second["cache"]
    assert first["rows_read"] == second["rows_read"] == 3 * 61
    assert 61 < first["rows_computed"] <= 3 * 61 and second["rows_computed"] == 0
    seeded = run("seeded", "cache", "seed=2")
    assert seeded["cache"] == first["cache"] and 0 < seeded["rows_computed"] < first["rows_computed"]
    run("inline", "inline")
    run("inline-seeded", "inline", "seed=2")
    assert close("inline", "first") and equal("first", "second") and close("inline-seeded", "seeded")
    filled = Path(cache_folders()[0], "filled.bin").read_bytes()
    assert len(filled) == NUM_ROWS and sum(filled) == first["rows_computed"] + seeded["rows_computed"]


@pytest.mark.parametrize(
    "override",
    [
        "teacher.weights.path=other.pt",
        "teacher.model.label=x",
        "precision=float32",
        "frozen_batch_size=16",
        "augment=[{type: crop, padding: 2}, flip]",
        "augment=[flip, {type: crop, padding: 1}]",
        "dataset.samples=62",
        "dataset.normalize=false",
        "terms.kd.teacher=teacher:layer3",
    ],
)
def test_change_that_affects_rows_selects_another_cache(override):
    if "layer3" in override:
        override = "terms={hint: {type: hint, student: {path: fc, adapter: linear}, teacher: layer3}}"
    first, second = run("first"), run("second", "cache", override)
    assert first["cache"] != second["cache"] and len(cache_folders()) == 2 and second["rows_computed"] > 61


@pytest.mark.parametrize(
    "override", ["optimizer.lr=0.2", "student.model=t_linear", "terms.kd.weight=2", "batch_size=16"]
)
def test_change_that_affects_no_row_selects_the_same_cache(override):
    assert run("first")["cache"] == run("second", "cache", override)["cache"] and len(cache_folders()) == 1


def test_cache_by_sample_alone_would_be_wrong_under_random_crops(monkeypatch):
    """Negative control: the variant must be part of a row's index."""
    run("inline", "inline")
    monkeypatch.setattr(View, "variant_ids", lambda self, params: torch.zeros(len(params), dtype=torch.int64))
    entry = run("by-sample")
    assert entry["mode"] == "cache" and entry["rows_computed"] == 61
    assert not close("inline", "by-sample")


def test_rows_are_computed_with_one_shape_in_the_order_of_samples(monkeypatch):
    sample_batches: list[torch.Tensor] = []
    batch_sizes: list[int] = []
    original_call, original_batch = RoleForward.__call__, RoleForward.padded_batch

    def call(self: RoleForward, samples: torch.Tensor, params: torch.Tensor) -> Any:
        sample_batches.append(samples)
        return original_call(self, samples, params)

    def padded_batch(self: RoleForward, samples: torch.Tensor, params: torch.Tensor) -> Any:
        batches = original_batch(self, samples, params)
        batch_sizes.append(batches["train"].size)
        return batches

    monkeypatch.setattr(RoleForward, "__call__", call)
    monkeypatch.setattr(RoleForward, "padded_batch", padded_batch)
    entry = run("run")
    assert set(batch_sizes) == {32}
    probe, *batches = sample_batches
    assert len(probe) == 32 and sum(map(len, batches)) == entry["rows_computed"]
    assert [len(samples) for samples in batches[:2]] == [32, 29]
    assert all(samples.tolist() == sorted(set(samples.tolist())) for samples in batches)


class Killed(BaseException):
    """Ends a run inside a write."""


@pytest.mark.parametrize("sync", [0, 1, 3])
def test_interrupted_fill_leaves_a_usable_cache(monkeypatch, sync):
    """Killed before each sync: unmarked rows may have any content and are never read."""
    run("uninterrupted", "cache", "runs=elsewhere")
    original, count = cache_file_module._sync, iter(range(1000))

    def killing_sync(mapping: Any) -> None:
        if next(count) == sync:
            raise Killed
        original(mapping)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cache_file_module, "_sync", killing_sync)
        run("killed")
    marked = torch.frombuffer(bytearray(Path(cache_folders()[0], "filled.bin").read_bytes()), dtype=torch.bool)
    overwrite_with_nan(~marked)
    entry = run("next")
    assert entry["mode"] == "cache" and equal("uninterrupted", "next")
    entry = run("again")
    assert entry["rows_computed"] == 0 and equal("uninterrupted", "again")


def overwrite_with_nan(rows: torch.Tensor) -> None:
    """Overwrites the given rows of the only cache."""
    file = Path(cache_folders()[0], "rows.bin")
    content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float64).view(NUM_ROWS, -1)
    content[rows] = torch.nan
    with open(file, "r+b") as handle:
        handle.write(content.numpy().tobytes())


def test_rows_that_were_marked_before_they_were_written_are_detected():
    """Negative control: with the order reversed, a killed run would leave a wrong cache."""
    run("first")
    overwrite_with_nan(torch.ones(NUM_ROWS, dtype=torch.bool))
    console = QuietConsole()
    entry = run("next", console=console)
    assert entry["mode"] == "prefetch" and "other values" in entry["reason"]
    assert any("delete the folder" in text for text in console.notices)


def test_cache_of_another_network_with_the_same_name_is_detected(monkeypatch):
    """As if the code of a plug-in's network had changed without a new version: the values differ, not the name."""
    run("inline", "inline", "teacher.weights.path=other.pt")
    monkeypatch.setattr(cached_source_module, "state_hash", lambda model: "same")
    first = run("first")
    entry = run("second", "cache", "teacher.weights.path=other.pt")
    assert first["cache"] and entry["mode"] == "prefetch" and "other values" in entry["reason"]
    assert close("inline", "second")
    # Negative control: without the comparison the cache would be used.
    monkeypatch.setattr(cached_source_module, "_check_values", lambda *args: None)
    assert run("unchecked", "cache", "teacher.weights.path=other.pt")["mode"] == "cache"
    assert not close("inline", "unchecked")


def test_damaged_cache_is_not_used():
    run("inline", "inline")
    run("first")
    (folder,) = cache_folders()
    description = read_json(folder / "cache.json")
    assert description["precision"] == "float64" and description["view"]["augmentations"][0]["params"]["padding"] == 1
    Path(folder, "cache.json").write_text(json.dumps({**description, "precision": "bf16"}))
    assert "description of another cache" in run("second")["reason"]
    Path(folder, "cache.json").write_text("{")
    assert "cannot be used" in run("third")["reason"]
    Path(folder, "cache.json").write_text(json.dumps(description))
    os.truncate(folder / "rows.bin", 100)
    entry = run("fourth")
    assert entry["mode"] == "prefetch" and "damaged" in entry["reason"]
    assert all(close("inline", name) for name in ("first", "second", "third", "fourth"))
    Path(folder, "cache.json").unlink()  # as after an interrupted creation
    assert run("fifth")["mode"] == "cache" and equal("first", "fifth")


def test_cache_that_does_not_fit_is_reported_and_the_run_continues(monkeypatch):
    run("inline", "inline")
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
        console = QuietConsole()
        entry = run("disk", console=console)
    assert entry["mode"] == "prefetch" and "35.1 kB of disk space, and 1.1 GB are free" in entry["reason"]
    assert sum("35.1 kB of disk space" in text for text in console.notices) == 1
    with monkeypatch.context() as patch:
        patch.setattr(cached_source_module, "available_memory", lambda device: 5000)
        assert "memory" in run("memory")["reason"]

    def fail_on_full_disk(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache_file_module, "_allocate", fail_on_full_disk)
        assert "No space left" in run("allocate")["reason"]
    assert [path.name for path in cache_folders()[0].iterdir()] == ["lock"], "no other file stays on the full disk"
    assert all(close("inline", name) for name in ("disk", "memory", "allocate"))


def test_disk_that_accepts_no_more_rows_is_reported_once_and_the_run_continues(monkeypatch):
    run("inline", "inline")

    def failing_sync(mapping: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    console = QuietConsole()
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_module, "_sync", failing_sync)
        run("failing", console=console)
    assert sum("cannot be saved" in text for text in console.notices) == 1 and close("inline", "failing")


ROW_LAYOUT = RowLayout((Feature(),), ((3,),), (torch.float32,))


def test_two_runs_fill_one_cache_without_overwriting_each_other():
    first, second = (CacheFile(Path("caches"), {"a": 1}, ROW_LAYOUT, 10) for _ in range(2))
    assert first.path == second.path
    second.add_rows(torch.tensor([2, 5]), torch.full((2, 3), 7.0))  # computed before the first run writes row 5
    first.add_rows(torch.tensor([5, 6]), torch.ones(2, 3))
    first.flush()
    assert second.missing_rows(torch.arange(10)).tolist() == [n not in (5, 6) for n in range(10)]
    second.flush()
    assert first.read_rows(torch.tensor([2, 5, 6]))[:, 0].tolist() == [7.0, 1.0, 1.0]
    reopened = CacheFile(Path("caches"), {"a": 1}, ROW_LAYOUT, 10)
    assert reopened.missing_rows(torch.arange(10)).sum() == 7 and reopened.rows_computed == 0


def test_many_pending_rows_are_written_without_a_flush(monkeypatch):
    monkeypatch.setattr(cache_file_module, "PENDING_BYTES", 100)
    cache = CacheFile(Path("caches"), {}, ROW_LAYOUT, 20)
    cache.add_rows(torch.arange(8), torch.ones(8, 3))
    assert cache.missing_rows(torch.arange(8)).all()
    cache.add_rows(torch.arange(8, 16), torch.ones(8, 3))
    assert not cache.missing_rows(torch.arange(16)).any() and cache.rows_computed == 16


def test_folder_that_cannot_be_written_is_reported():
    Path("caches").write_text("a file")
    with pytest.raises(CacheUnavailable, match="cannot be used"):
        CacheFile(Path("caches"), {}, ROW_LAYOUT, 10)


def test_rows_of_mixed_dtypes_and_shapes_round_trip():
    logits, feature = Feature(), Feature("layer1")
    row_layout = RowLayout((logits, feature), ((4,), (2, 3, 3)), (torch.float32, torch.bfloat16))
    values = {logits: torch.randn(5, 4), feature: torch.randn(5, 2, 3, 3).bfloat16()}
    rows = row_layout.pack(values)
    assert rows.shape == (5, 22) and rows.dtype == torch.float32
    unpacked = row_layout.unpack(rows)
    assert all(torch.equal(unpacked[key], value) for key, value in values.items())
    assert all(unpacked[key].dtype == value.dtype for key, value in values.items())
    half_layout = RowLayout((feature,), ((2, 3, 3),), (torch.bfloat16,))
    assert half_layout.dtype == torch.bfloat16
    assert torch.equal(half_layout.unpack(half_layout.pack(values))[feature], values[feature])


def test_format_bytes_selects_the_unit():
    counts = (500, 36_000, 2_500_000, 3_240_000_000)
    assert [format_bytes(count) for count in counts] == ["0.5 kB", "36.0 kB", "2.5 MB", "3.2 GB"]


def test_half_precision_rows_use_two_bytes_and_keep_exact_values():
    """The second run reads the rows that the first one computed."""
    first, second = run("first", "cache", "precision=bf16"), run("second", "cache", "precision=bf16")
    assert first["mode"] == "cache" and second["rows_computed"] == 0 and equal("first", "second")
    assert Path(cache_folders()[0], "rows.bin").stat().st_size == NUM_ROWS * 4 * 2
