"""What a frozen network gives for every image that it can be shown, kept on disk: one memory-mapped file of rows.

A table has a row for each variant of each sample of a split (a crop padded by 4 and a flip: 162 images of a sample).
Rows are filled as runs need them, and shared by all runs whose networks, data and numbers are the same: the folder's
name is a hash of everything that a row depends on, which `cache.json` spells out.

A row is written and synced before it is marked as filled, so that a run may be killed at any moment: what is marked is
whole, and what is not is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.data.loading.packed_cache import locked
from kdbench.engine.network.features import Feature
from kdbench.errors import UserError
from kdbench.files import read_json, to_strict_json, write_json

FORMAT = 1


SPARE_BYTES = 2**30
"""What a table leaves free on its disk."""


PENDING_BYTES, PENDING_SECONDS = 2**26, 5.0
"""How much, and for how long, is held back before it is written to the disk in one go."""


class CacheUnavailable(Exception):
    """A table cannot be used; the text says why, in words that follow "no table: "."""


@dataclass(frozen=True)
class RowLayout:
    """Where each feature stands in a row. One type holds them all exactly: the widest of theirs."""

    features: tuple[Feature, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def widths(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, self.dtypes)

    def pack(self, values: Mapping[Feature, Tensor]) -> Tensor:
        """Puts the features of some samples into rows (samples, elements)."""
        return torch.cat([values[feature].flatten(1).to(self.dtype) for feature in self.features], dim=1)

    def unpack(self, rows: Tensor) -> dict[Feature, Tensor]:
        """Takes rows apart; nothing is copied where there is one feature."""
        parts = rows.split(self.widths, dim=1)
        told = zip(self.features, parts, self.shapes, self.dtypes, strict=True)
        return {feature: part.reshape(len(rows), *shape).to(dtype) for feature, part, shape, dtype in told}

    def manifest_entry(self) -> list[list[Any]]:
        told = zip(self.features, self.shapes, self.dtypes, strict=True)
        return [[str(feature), list(shape), str(dtype)] for feature, shape, dtype in told]


def cache_key(dependencies: Mapping[str, Any]) -> str:
    """The name of a table: a hash of everything that its rows depend on."""
    text = json.dumps(to_strict_json(dependencies), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CacheFile:
    """One table, opened: created where it is missing, taken as it is where another run has begun it.

    Args:
        folder: of all tables.
        content: everything that a row depends on, as plain data; it names the table.
        columns: of a row.
        rows: how many there are.

    Attributes:
        name: the last two folders of its path, which names nobody's machine.
        computed: rows that were computed by this run.
        fault: why the disk did not take them, in words; they are there for this run all the same.

    Raises:
        Refused: it does not fit the disk, cannot be written, or is not what its name says.
    """

    def __init__(self, folder: Path, dependencies: Mapping[str, Any], row_layout: RowLayout, num_rows: int) -> None:
        dependencies = to_strict_json({"format": FORMAT, **dependencies, "columns": row_layout.manifest_entry(), "rows": num_rows})
        self.path = folder / cache_key(dependencies)
        self.name = f"{folder.name}/{self.path.name}"
        self.row_layout, self.num_rows = row_layout, num_rows
        self.row_elements = sum(row_layout.widths)
        self.rows_computed = 0
        self.write_error = ""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._since = time.monotonic()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self._lock, needed=True):
                self._create(dependencies)
            self._rows_map = _mapped(self.path / "rows.bin", self.row_bytes)
            self._filled_map = _mapped(self.path / "filled.bin", num_rows)
        except (OSError, ValueError, UserError) as error:
            raise CacheUnavailable(f"{self.name} cannot be used ({getattr(error, 'strerror', None) or error})") from None
        self.rows = torch.frombuffer(self._rows_map, dtype=row_layout.dtype).view(num_rows, self.row_elements)
        self.filled = torch.frombuffer(self._filled_map, dtype=torch.bool)

    @property
    def row_bytes(self) -> int:
        return self.num_rows * self.row_elements * self.row_layout.dtype.itemsize

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    def _create(self, content: Mapping[str, Any]) -> None:
        """Makes the files. `cache.json` comes last: without it a creation was interrupted, and is begun again."""
        told, sizes = self.path / "cache.json", {"rows.bin": self.row_bytes, "filled.bin": self.num_rows}
        if told.exists():
            if read_json(told) != content:
                raise CacheUnavailable(f"{self.name} says of itself that it is another one; delete the folder")
            if any((self.path / name).stat().st_size != size for name, size in sizes.items()):
                raise CacheUnavailable(f"{self.name} is damaged; delete the folder")
            return
        free = shutil.disk_usage(self.path).free
        if self.row_bytes + self.num_rows + SPARE_BYTES > free:
            raise CacheUnavailable(f"it would take {format_bytes(self.row_bytes)} of disk, and {format_bytes(free)} are free")
        try:
            for name, size in sizes.items():
                _reserve(self.path / name, size)
            write_json(told, content)
        except (OSError, UserError):
            for name in sizes:
                (self.path / name).unlink(missing_ok=True)
            raise

    def missing_rows(self, indices: Tensor) -> Tensor:
        """Which of these rows are not filled yet, bool (places,)."""
        return ~self.filled.index_select(0, indices)

    def read_rows(self, indices: Tensor) -> Tensor:
        """Returns rows (places, elements), on the CPU."""
        return self.rows.index_select(0, indices)

    def add_rows(self, indices: Tensor, rows: Tensor) -> None:
        """Takes computed rows; they are in the table at the latest after `write`."""
        self.rows_computed += len(indices)
        self._pending.append((indices, rows))
        held = sum(rows.nbytes for _, rows in self._pending)
        if held >= PENDING_BYTES or time.monotonic() - self._since >= PENDING_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added, syncs it, and only then marks it as filled. A row that another run filled stays."""
        pending, self._pending = self._pending, []
        self._since = time.monotonic()
        if not pending:
            return
        places, rows = torch.cat([p for p, _ in pending]), torch.cat([r for _, r in pending])
        with locked(self._lock, needed=True):
            new = self.missing_rows(places)
            places = places[new]
            self.rows[places] = rows[new]
            try:
                _sync(self._rows_map)
                self.filled[places] = True
                _sync(self._filled_map)
            except OSError as error:
                self.write_error = error.strerror or str(error)


def _reserve(path: Path, size: int) -> None:
    """Makes a file of zeros and takes its blocks now: a write into mapped memory must not find the disk full."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())


def _sync(mapped: mmap.mmap) -> None:
    mapped.flush()


def _mapped(path: Path, size: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def format_bytes(count: int) -> str:
    """A number of bytes in words."""
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"
