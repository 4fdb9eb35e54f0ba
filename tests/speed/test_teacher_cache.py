"""A table of what a frozen network gives: exact, shared by runs, safe to interrupt, and never taken on trust."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.recipes import QuietConsole, comparable_results, differing_keys, plugin_registration, train_recipe_text  # noqa: F401
from kdbench.data.augment.view import View
from kdbench.engine.network.features import Feature
from kdbench.files import read_json
from kdbench.speed.teacher_cache import cache_file as table_module
from kdbench.speed.teacher_cache import cached_source as tabled_module
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
VARIANTS = 61 * 18


@pytest.fixture(autouse=True)
def teacher() -> None:
    """Weights that every seed shares, and those of another network."""
    from helpers.plugin_parts import Layers

    for name, seed in (("teacher.pt", 1), ("other.pt", 2)):
        torch.manual_seed(seed)
        torch.save(Layers(hidden=16).state_dict(), name)


def run(out: str, mode: str = "table", *overrides: str, console: QuietConsole | None = None) -> dict[str, Any]:
    """Trains, and returns what the manifest says of the teacher."""
    train_recipe_text(TEXT, f"out={out}", f"frozen_forward={mode}", *overrides, data=DATA, console=console)
    return read_json(f"{out}/manifest.json")["frozen_forward"]["main"]["teacher"]


def tables() -> list[Path]:
    return sorted(Path("runs/tables").iterdir())


def equal(one: str, other: str) -> bool:
    """Whether two runs ended with the same bits, as they must within one mode."""
    return differing_keys(comparable_results(one), comparable_results(other)) == []


def close(one: str, other: str) -> bool:
    """Whether two runs of different modes ended with the same weights but for the rounding of float64.

    A matrix product of five rows may sum in another order than one of 32.
    """
    trees = [torch.load(f"{name}/checkpoints/last.pt", weights_only=True)["models"]["student"] for name in (one, other)]
    pairs = zip(trees[0].values(), trees[1].values(), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_a_second_run_computes_nothing_and_another_seed_shares_the_table():
    first, second = run("first"), run("second")
    assert first["mode"] == second["mode"] == "table" and first["table"] == second["table"]
    assert first["read"] == second["read"] == 3 * 61
    assert 61 < first["computed"] <= 3 * 61 and second["computed"] == 0
    seeded = run("seeded", "table", "seed=2")
    assert seeded["table"] == first["table"] and 0 < seeded["computed"] < first["computed"]
    run("plain", "inline")
    run("plain-seeded", "inline", "seed=2")
    assert close("plain", "first") and equal("first", "second") and close("plain-seeded", "seeded")
    filled = Path(tables()[0], "filled.bin").read_bytes()
    assert len(filled) == VARIANTS and sum(filled) == first["computed"] + seeded["computed"]


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
def test_whatever_a_row_depends_on_names_another_table(override):
    if "layer3" in override:
        override = "terms={hint: {type: hint, student: {path: fc, adapter: linear}, teacher: layer3}}"
    one, other = run("one"), run("other", "table", override)
    assert one["table"] != other["table"] and len(tables()) == 2 and other["computed"] > 61


@pytest.mark.parametrize(
    "override", ["optimizer.lr=0.2", "student.model=t_linear", "terms.kd.weight=2", "batch_size=16"]
)
def test_what_no_row_depends_on_leaves_the_table(override):
    assert run("one")["table"] == run("other", "table", override)["table"] and len(tables()) == 1


def test_a_table_by_sample_alone_gives_another_result_under_random_crops(monkeypatch):
    """Negative control: the variant has to be part of a row's place."""
    run("plain", "inline")
    monkeypatch.setattr(View, "variant_ids", lambda self, draws: torch.zeros(len(draws), dtype=torch.int64))
    told = run("by-sample")
    assert told["mode"] == "table" and told["computed"] == 61
    assert not close("plain", "by-sample")


def test_rows_are_computed_at_one_shape_and_in_the_order_of_the_samples(monkeypatch):
    asked: list[torch.Tensor] = []
    rows: list[int] = []
    original, block = RoleForward.__call__, RoleForward.padded_batch
    monkeypatch.setattr(RoleForward, "__call__", lambda self, s, d: (asked.append(s), original(self, s, d))[1])
    monkeypatch.setattr(
        RoleForward, "block", lambda self, s, d: (b := block(self, s, d), rows.append(len(b["train"]["image"])))[0]
    )
    told = run("one")
    assert set(rows) == {32}
    probe, *blocks = asked
    assert len(probe) == 32 and sum(map(len, blocks)) == told["computed"]
    assert [len(one) for one in blocks[:2]] == [32, 29]
    assert all(one.tolist() == sorted(set(one.tolist())) for one in blocks)


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("sync", [0, 1, 3])
def test_a_fill_that_is_interrupted_leaves_a_table_that_the_next_run_can_use(monkeypatch, sync):
    """Killed before each sync: rows that are not marked hold anything, and are never read."""
    run("whole", "table", "runs=elsewhere")
    original, count = table_module._sync, iter(range(1000))

    def dying(mapped: Any) -> None:
        if next(count) == sync:
            raise Killed
        original(mapped)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(table_module, "_sync", dying)
        run("killed")
    marked = torch.frombuffer(bytearray(Path(tables()[0], "filled.bin").read_bytes()), dtype=torch.bool)
    poison(~marked)
    told = run("next")
    assert told["mode"] == "table" and equal("whole", "next")
    told = run("again")
    assert told["computed"] == 0 and equal("whole", "again")


def poison(rows: torch.Tensor) -> None:
    """Overwrites these rows of the only table with NaN."""
    file = Path(tables()[0], "rows.bin")
    content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float64).view(VARIANTS, -1)
    content[rows] = torch.nan
    with open(file, "r+b") as handle:
        handle.write(content.numpy().tobytes())


def test_marks_before_rows_would_be_noticed(monkeypatch):
    """Negative control: were a row marked before it is written, a killed run would leave a wrong table."""
    run("one")
    poison(torch.ones(VARIANTS, dtype=torch.bool))
    console = QuietConsole()
    told = run("next", console=console)
    assert told["mode"] == "ahead" and "other values" in told["why"]
    assert any("delete the folder" in text for text in console.notices)


def test_a_table_of_another_network_under_the_same_name_is_found_out(monkeypatch):
    """As it would be where a plug-in's network changes and its version does not: the values tell, not the name."""
    run("plain", "inline", "teacher.weights.path=other.pt")
    monkeypatch.setattr(tabled_module, "state_hash", lambda model: "same")
    first = run("first")
    told = run("other", "table", "teacher.weights.path=other.pt")
    assert first["table"] and told["mode"] == "ahead" and "other values" in told["why"]
    assert close("plain", "other")
    monkeypatch.setattr(tabled_module, "_compare", lambda *args: None)  # without the comparison it would be taken
    assert run("trusting", "table", "teacher.weights.path=other.pt")["mode"] == "table"
    assert not close("plain", "trusting")


def test_a_table_that_is_damaged_or_tells_another_story_is_not_used():
    run("plain", "inline")
    run("one")
    (folder,) = tables()
    told = read_json(folder / "table.json")
    assert told["precision"] == "float64" and told["view"]["augments"][0]["params"]["padding"] == 1
    Path(folder, "table.json").write_text(json.dumps({**told, "precision": "bf16"}))
    assert "another one" in run("two")["why"]
    Path(folder, "table.json").write_text("{")
    assert "cannot be used" in run("three")["why"]
    Path(folder, "table.json").write_text(json.dumps(told))
    os.truncate(folder / "rows.bin", 100)
    found = run("four")
    assert found["mode"] == "ahead" and "damaged" in found["why"]
    assert all(close("plain", name) for name in ("one", "two", "three", "four"))
    Path(folder, "table.json").unlink()  # as a creation leaves it that was interrupted
    assert run("five")["mode"] == "table" and equal("one", "five")


def test_a_table_that_does_not_fit_is_told_in_words_and_the_run_goes_on(monkeypatch):
    run("plain", "inline")
    with monkeypatch.context() as patch:
        patch.setattr(table_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
        console = QuietConsole()
        told = run("disk", console=console)
    assert told["mode"] == "ahead" and "35.1 kB of disk, and 1.1 GB are free" in told["why"]
    assert sum("35.1 kB of disk" in text for text in console.notices) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tabled_module, "available_memory", lambda device: 5000)
        assert "memory" in run("memory")["why"]

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(table_module, "_reserve", full)
        assert "No space left" in run("reserve")["why"]
    assert [path.name for path in tables()[0].iterdir()] == ["lock"], "nothing of it stays on the full disk"
    assert all(close("plain", name) for name in ("disk", "memory", "reserve"))


def test_a_disk_that_takes_no_more_rows_is_told_once_and_the_run_goes_on(monkeypatch):
    run("plain", "inline")

    def failing(mapped: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    console = QuietConsole()
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "_sync", failing)
        run("failing", console=console)
    assert sum("not kept" in text for text in console.notices) == 1 and close("plain", "failing")


COLUMNS = RowLayout((Feature(),), ((3,),), (torch.float32,))


def test_two_runs_fill_one_table_and_neither_overwrites_the_other():
    one, other = (CacheFile(Path("tables"), {"a": 1}, COLUMNS, 10) for _ in range(2))
    assert one.path == other.path
    places = torch.tensor([2, 5])
    other.add_rows(places, torch.full((2, 3), 7.0))  # computed before the first run has written its own
    one.add_rows(torch.tensor([5, 6]), torch.ones(2, 3))
    one.flush()
    assert other.missing_rows(torch.arange(10)).tolist() == [n not in (5, 6) for n in range(10)]
    other.flush()
    assert one.read_rows(torch.tensor([2, 5, 6]))[:, 0].tolist() == [7.0, 1.0, 1.0]
    again = CacheFile(Path("tables"), {"a": 1}, COLUMNS, 10)
    assert again.missing_rows(torch.arange(10)).sum() == 7 and again.rows_computed == 0


def test_much_that_is_pending_is_written_at_once(monkeypatch):
    monkeypatch.setattr(table_module, "PENDING_BYTES", 100)
    table = CacheFile(Path("tables"), {}, COLUMNS, 20)
    table.add_rows(torch.arange(8), torch.ones(8, 3))
    assert table.missing_rows(torch.arange(8)).all()
    table.add_rows(torch.arange(8, 16), torch.ones(8, 3))
    assert not table.missing_rows(torch.arange(16)).any() and table.rows_computed == 16


def test_a_folder_that_cannot_be_written_is_refused_in_words():
    Path("tables").write_text("a file")
    with pytest.raises(CacheUnavailable, match="cannot be used"):
        CacheFile(Path("tables"), {}, COLUMNS, 10)


def test_rows_of_mixed_types_and_shapes_come_back_as_they_were():
    logits, features = Feature(), Feature("layer1")
    columns = RowLayout((logits, features), ((4,), (2, 3, 3)), (torch.float32, torch.bfloat16))
    values = {logits: torch.randn(5, 4), features: torch.randn(5, 2, 3, 3).bfloat16()}
    rows = columns.pack(values)
    assert rows.shape == (5, 22) and rows.dtype == torch.float32
    back = columns.unpack(rows)
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in values.items())
    narrow = RowLayout((features,), ((2, 3, 3),), (torch.bfloat16,))
    assert narrow.dtype == torch.bfloat16 and torch.equal(
        narrow.unpack(narrow.pack(values))[features], values[features]
    )


def test_sizes_are_told_in_the_unit_that_fits():
    assert [format_bytes(n) for n in (500, 36_000, 2_500_000, 3_240_000_000)] == ["0.5 kB", "36.0 kB", "2.5 MB", "3.2 GB"]


def test_tables_of_half_precision_keep_its_exact_values():
    """bf16 rows take half of the space, and the second run reads what the first one computed."""
    first, second = run("first", "table", "precision=bf16"), run("second", "table", "precision=bf16")
    assert first["mode"] == "table" and second["computed"] == 0 and equal("first", "second")
    assert Path(tables()[0], "rows.bin").stat().st_size == VARIANTS * 4 * 2
