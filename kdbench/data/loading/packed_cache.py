"""The packed cache: a dataset decoded once into one file, with a checksum that every load verifies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kdbench.data.datasets.base import PackedSplit, content_checksum, pack

MAGIC = b"kdbench packed images 1\n"


NOTICES = logging.getLogger("kdbench.data")


@dataclass(frozen=True)
class PackedCache:
    """Where one split is kept once it is decoded.

    folder: made when it is missing. Where it cannot be written, the split lives in memory only.
    name: how the file's name begins, such as `cifar100-train`.
    identity: what tells this split from others of the same name (its folder, its size), as plain data.
    fingerprint: of the files that are decoded; another one than the cache remembers makes the cache stale.
    classes: names in the order of the labels.
    """

    folder: Path
    name: str
    identity: Any
    fingerprint: str
    classes: list[str]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{self.name}-{digest}.packed"

    def load(self, decode: Callable[[], tuple[Tensor, Tensor]]) -> PackedSplit:
        """Returns the packed split, from the cache where a sound and current one lies, else decoded and then kept.

        Args:
            decode: returns images, uint8 (samples, channels, height, width), and labels, int64 (samples,).
        """
        found = self._read()
        if found is not None:
            return found
        with locked(self.path.with_suffix(".lock")):
            found = self._read()  # another process may have built it while this one waited
            if found is not None:
                return found
            packed = pack(self.classes, *decode())
            self._write(packed)
            return packed

    def checksum(self) -> str | None:
        """Returns what the file says of its content, unread, or None when it is absent, stale or damaged."""
        try:
            with self.path.open("rb") as handle:
                header = self._header(handle)
                return None if header is None else str(header["checksum"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _header(self, handle: BinaryIO) -> dict[str, Any] | None:
        if handle.readline() != MAGIC:
            raise ValueError("its first line is not ours")
        header = json.loads(handle.readline())
        if header["fingerprint"] != self.fingerprint or header["classes"] != self.classes:
            return None
        return header

    def _read(self) -> PackedSplit | None:
        """Returns what the file holds, or None when it is absent, stale or damaged."""
        try:
            with self.path.open("rb") as handle:
                header = self._header(handle)
                if header is None:
                    NOTICES.info("%s is out of date: the files it was made from have changed.", self.path)
                    return None
                shape = header["shape"]
                images = np.fromfile(handle, np.uint8, int(np.prod(shape))).reshape(shape)
                labels = np.fromfile(handle, np.int64, shape[0])
                packed = PackedSplit(torch.from_numpy(images), torch.from_numpy(labels), header["checksum"])
            if content_checksum(self.classes, packed.images, packed.labels) != packed.checksum:
                raise ValueError("its checksum does not fit")
            return packed
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            NOTICES.warning("The cache %s is damaged (%s); it is made anew.", self.path, error)
            return None

    def _write(self, packed: PackedSplit) -> None:
        header = {
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "shape": list(packed.images.shape),
            "checksum": packed.checksum,
        }
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(MAGIC + json.dumps(header).encode() + b"\n")
                handle.write(packed.images.numpy().data)
                handle.write(packed.labels.numpy().data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(self.path)
        except OSError as error:
            reason = error.strerror or error
            NOTICES.warning("The decoded images are not kept: %s cannot be written (%s).", self.path, reason)
            with contextlib.suppress(OSError):  # the notice has said why this folder is of no use
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, needed: bool = False) -> Iterator[None]:
    """Lets one process at a time through; where the folder cannot be written or the file system has no locks, all.

    Args:
        needed: a file system without locks is an OSError instead.
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except (ImportError, OSError):
        if needed:
            raise
        yield
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            if needed:
                raise
        yield
