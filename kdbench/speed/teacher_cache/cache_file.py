"""Teacher cache on disk: the outputs of one frozen role for every variant of every sample, in a memory-mapped file.

A variant is one of the finitely many images that the augmentations make of a sample (162 for a crop padded by 4 and a
flip). A cache has one row for each variant of each sample of a split. A training run computes the rows that the run
needs and the cache does not contain yet. All runs with the same network, data and number formats share a cache: the
name of the cache's folder is a hash of everything that a row depends on. The file `cache.json` lists these
dependencies.

A row is written and synced to the disk before it is marked as filled. Therefore a process may be killed at any time:
marked rows are complete, and the next run computes all unmarked rows again.
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

from kdbench.engine.network.features import Feature
from kdbench.errors import UserError
from kdbench.files import file_lock, read_json, to_strict_json, write_json

FORMAT = 1
"""Version of the file format. It is part of the hash that names a cache."""


SPARE_BYTES = 2**30
"""Number of bytes that must stay free on the disk after a new cache is created."""


PENDING_BYTES, PENDING_SECONDS = 2**26, 5.0
"""Size in bytes and age in seconds at which computed rows are written to disk. A sync for each batch would be slow."""


class CacheUnavailable(Exception):
    """Error: a network cannot have a teacher cache. The message is the reason, in lower case without a full stop."""


@dataclass(frozen=True)
class RowLayout:
    """Layout of a row of a teacher cache. A row contains all features (outputs) of the teacher for one sample.

    A row has a single dtype: the narrowest dtype that represents all features exactly.

    Attributes:
        features: the features, in the order of the row.
        shapes: shape of each feature, for one sample.
        dtypes: dtype of each feature.
    """

    features: tuple[Feature, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def widths(self) -> list[int]:
        """Number of elements of each feature, for one sample."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, self.dtypes)

    def pack(self, values: Mapping[Feature, Tensor]) -> Tensor:
        """Concatenates the features of each sample to one cache row.

        Shape:
            values: (samples, *shape) for each feature. Returns (samples, elements).
        """
        return torch.cat([values[feature].flatten(1).to(self.dtype) for feature in self.features], dim=1)

    def unpack(self, rows: Tensor) -> dict[Feature, Tensor]:
        """Splits cache rows into features (the inverse of `pack`). A feature that fills the row is a view of `rows`."""
        parts = rows.split(self.widths, dim=1)
        entries = zip(self.features, parts, self.shapes, self.dtypes, strict=True)
        return {feature: part.reshape(len(rows), *shape).to(dtype) for feature, part, shape, dtype in entries}

    def to_json(self) -> list[list[Any]]:
        """Returns a list [name, shape, dtype] for each feature, in JSON types."""
        entries = zip(self.features, self.shapes, self.dtypes, strict=True)
        return [[str(feature), list(shape), str(dtype)] for feature, shape, dtype in entries]


def cache_key(dependencies: Mapping[str, Any]) -> str:
    """Returns the name of a teacher cache's folder: a hash of everything that the rows of the cache depend on."""
    text = json.dumps(to_strict_json(dependencies), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CacheFile:
    """One teacher cache on disk. The constructor opens the cache if it exists, and creates it otherwise.

    Args:
        folder: folder of all caches.
        dependencies: name -> value, for everything that a row depends on. The name of the cache is a hash of this
            mapping.
        row_layout: layout of a row.
        num_rows: number of rows.

    Attributes:
        path: folder of this cache.
        name: last two components of the path, for messages.
        rows: (num_rows, elements), memory-mapped.
        filled: bool (num_rows,), memory-mapped; True for a complete row.
        rows_computed: number of rows that this run computed.
        write_error: reason why rows could not be written to disk, or an empty string. After such an error, the process
            can still read the rows.

    Raises:
        CacheUnavailable: the cache does not fit on the disk, cannot be read or written, or is damaged.
    """

    def __init__(self, folder: Path, dependencies: Mapping[str, Any], row_layout: RowLayout, num_rows: int) -> None:
        dependencies = to_strict_json(
            {"format": FORMAT, **dependencies, "features": row_layout.to_json(), "rows": num_rows}
        )
        self.path = folder / cache_key(dependencies)
        self.name = f"{folder.name}/{self.path.name}"
        self.row_layout, self.num_rows = row_layout, num_rows
        self.row_elements = sum(row_layout.widths)
        self.rows_computed = 0
        self.write_error = ""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._last_write = time.monotonic()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with file_lock(self._lock):
                self._create_or_check(dependencies)
            self._rows_map = _map_file(self.path / "rows.bin", self.row_bytes)
            self._filled_map = _map_file(self.path / "filled.bin", num_rows)
        except (OSError, ValueError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheUnavailable(f"{self.name} cannot be used ({reason})") from None
        self.rows = torch.frombuffer(self._rows_map, dtype=row_layout.dtype).view(num_rows, self.row_elements)
        self.filled = torch.frombuffer(self._filled_map, dtype=torch.bool)

    @property
    def row_bytes(self) -> int:
        """Size of all rows in bytes."""
        return self.num_rows * self.row_elements * self.row_layout.dtype.itemsize

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    def _create_or_check(self, dependencies: Mapping[str, Any]) -> None:
        description, sizes = self.path / "cache.json", {"rows.bin": self.row_bytes, "filled.bin": self.num_rows}
        if description.exists():
            if read_json(description) != dependencies:
                raise CacheUnavailable(f"{self.name} contains the description of another cache; delete the folder")
            if any((self.path / name).stat().st_size != size for name, size in sizes.items()):
                raise CacheUnavailable(f"{self.name} is damaged; delete the folder")
            return
        free = shutil.disk_usage(self.path).free
        if self.row_bytes + self.num_rows + SPARE_BYTES > free:
            raise CacheUnavailable(
                f"it would need {format_bytes(self.row_bytes)} of disk space, and {format_bytes(free)} are free"
            )
        try:
            for name, size in sizes.items():
                _allocate(self.path / name, size)
            # Last, because its presence shows that the files are complete: without it the next run creates them again.
            write_json(description, dependencies)
        except (OSError, UserError):
            for name in sizes:
                (self.path / name).unlink(missing_ok=True)
            raise

    def missing_rows(self, indices: Tensor) -> Tensor:
        """Returns a bool mask (indices,), True for each row at `indices` that the cache does not contain yet."""
        return ~self.filled.index_select(0, indices)

    def read_rows(self, indices: Tensor) -> Tensor:
        """Returns the rows at `indices` as a tensor (indices, elements) on the CPU."""
        return self.rows.index_select(0, indices)

    def add_rows(self, indices: Tensor, rows: Tensor) -> None:
        """Adds computed rows to the cache. The rows can be read after the next `flush`.

        If many rows wait for a `flush`, or if the last `flush` is old, this method calls `flush`.
        """
        self.rows_computed += len(indices)
        self._pending.append((indices, rows))
        size = sum(rows.nbytes for _, rows in self._pending)
        if size >= PENDING_BYTES or time.monotonic() - self._last_write >= PENDING_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the added rows to disk, then marks them as filled. Rows that another run has filled do not change."""
        pending, self._pending = self._pending, []
        self._last_write = time.monotonic()
        if not pending:
            return
        indices, rows = torch.cat([indices for indices, _ in pending]), torch.cat([rows for _, rows in pending])
        with file_lock(self._lock):
            missing = self.missing_rows(indices)
            indices = indices[missing]
            self.rows[indices] = rows[missing]
            try:
                # The rows must be on disk before the marks: a crash between the two leaves rows unmarked, not wrong.
                _sync(self._rows_map)
                self.filled[indices] = True
                _sync(self._filled_map)
            except OSError as error:
                self.write_error = error.strerror or str(error)


def _allocate(path: Path, size: int) -> None:
    """Creates a file of zeros, and allocates disk blocks for all of its bytes.

    Without allocated blocks, a write to the memory-mapped file would kill the process when the disk is full.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())


def _sync(mapping: mmap.mmap) -> None:
    mapping.flush()


def _map_file(path: Path, size: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def format_bytes(count: int) -> str:
    """Formats a number of bytes for messages, such as `35.1 kB`."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if count >= size), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"
