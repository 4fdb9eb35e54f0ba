"""The packed cache: one file with all decoded images of a split. Its checksum is verified at every load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kdbench.data.datasets.base import PackedSplit, content_checksum, pack
from kdbench.files import file_lock

MAGIC = b"kdbench packed images 2\n"


_OLD_MAGIC = b"kdbench packed images 1\n"


_MAX_HEADER_BYTES = 2**24


NOTICES = logging.getLogger("kdbench.data")


@dataclass(frozen=True)
class _Header:
    """The header of a packed cache (a file with all decoded images of a split).

    Attributes:
        shape: shape of all images together, (samples, channels, height, width).
        checksum: SHA-256 of class names, images and labels, see `content_checksum`.
    """

    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True)
class PackedCache:
    """The packed cache of one split: a file with all its decoded images and labels.

    The file has three parts: MAGIC; one line with the SHA-256 of the header, a space, and the header as JSON; images
    (uint8) and labels (int64) as raw bytes. The content is used only if its checksum equals the checksum in the
    header. A damaged file is reported and written again.

    Args:
        folder: folder of the cache, which is created if it is missing. If the folder is not writable, no cache is
            written.
        name: start of the cache file's name, such as `cifar100-train`.
        identity: plain data that distinguishes splits with equal names (folder, image size, ...).
        fingerprint: digest of the image files. A cache that was written with a different fingerprint is stale.
        classes: names of the classes, in the order of the labels.
    """

    folder: Path
    name: str
    identity: Any
    fingerprint: str
    classes: list[str]

    @property
    def path(self) -> Path:
        """The path of the cache file."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{self.name}-{digest}.packed"

    def load(self, decode: Callable[[], tuple[Tensor, Tensor]]) -> PackedSplit:
        """Returns the split from the cache file, or decodes the split and writes the file.

        The split is decoded if the cache file is missing, damaged or stale (written from different image files).

        Args:
            decode: function that returns images, uint8 (samples, channels, height, width), and labels, int64
                (samples,).
        """
        split = self._read()
        if split is not None:
            return split
        with file_lock(self.path.with_suffix(".lock"), optional=True):
            split = self._read(notify=False)  # another process may have written the file in the meantime
            if split is None:
                split = pack(self.classes, *decode())
                self._write(split)
            return split

    def checksum(self) -> str | None:
        """Reads only the header of the cache file. Returns the checksum of the file's content.

        Returns:
            The checksum, or None if the file is missing, damaged or stale (written from different image files).
        """
        try:
            with self._open() as handle:
                header = self._read_header(handle)
        except (OSError, ValueError):
            return None
        return None if header is None else header.checksum

    def _open(self) -> BinaryIO:
        if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for a writer
            raise ValueError("it is not a regular file")
        return self.path.open("rb")

    def _read_header(self, handle: BinaryIO) -> _Header | None:
        """Reads and checks the header of an open cache file.

        Returns:
            The header, or None if the cache is stale (written from different image files).

        Raises:
            ValueError: the file is damaged.
        """
        magic = handle.readline(len(MAGIC))
        if magic == _OLD_MAGIC:
            return None
        if magic != MAGIC:
            raise ValueError("it does not begin with the first line of a packed cache")
        digest, _, text = handle.readline(_MAX_HEADER_BYTES).partition(b" ")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("the checksum of its header is wrong")
        try:
            entries = json.loads(text)
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
        if not isinstance(entries, dict) or not {"fingerprint", "classes"} <= entries.keys():
            raise ValueError("its header has no fingerprint and classes")
        if entries["fingerprint"] != self.fingerprint or entries["classes"] != self.classes:
            return None
        shape, checksum = entries.get("shape"), entries.get("checksum")
        if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError("the shape in its header is not four positive numbers")
        if not isinstance(checksum, str):
            raise ValueError("its header has no checksum of the content")
        return _Header(tuple(shape), checksum)

    def _read(self, *, notify: bool = True) -> PackedSplit | None:
        """Reads the split from the cache file.

        Args:
            notify: whether a stale or damaged file is reported to the user.

        Returns:
            The split, or None if the file is missing, damaged or stale (written from different image files).
        """
        try:
            with self._open() as handle:
                header = self._read_header(handle)
                if header is not None:
                    return self._read_content(handle, header)
            if notify:
                NOTICES.info(
                    "The cache %s is out of date, because its image files have changed; they are decoded again.",
                    self.path,
                )
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            if notify:
                NOTICES.warning("The cache %s is damaged (%s); the images are decoded again.", self.path, error)
        return None

    def _read_content(self, handle: BinaryIO, header: _Header) -> PackedSplit:
        # Compare sizes before memory is allocated: a damaged shape may ask for any amount.
        num_pixels, num_samples = math.prod(header.shape), header.shape[0]
        expected = num_pixels + num_samples * np.dtype(np.int64).itemsize
        size = os.fstat(handle.fileno()).st_size - handle.tell()
        if size != expected:
            raise ValueError(f"it has {size} bytes of images and labels, expected {expected}")
        images = np.fromfile(handle, np.uint8, num_pixels).reshape(header.shape)
        labels = np.fromfile(handle, np.int64, num_samples)
        split = PackedSplit(torch.from_numpy(images), torch.from_numpy(labels), header.checksum)
        if content_checksum(self.classes, split.images, split.labels) != split.checksum:
            raise ValueError("the checksum of its content is wrong")
        return split

    def _write(self, split: PackedSplit) -> None:
        """Writes the cache file atomically. A failure is reported but not raised, because the split is in memory."""
        entries = {
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "shape": list(split.images.shape),
            "checksum": split.checksum,
        }
        text = json.dumps(entries).encode() + b"\n"
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(MAGIC + hashlib.sha256(text).hexdigest().encode() + b" " + text)
                handle.write(split.images.numpy().data)
                handle.write(split.labels.numpy().data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(self.path)
        except OSError as error:
            reason = error.strerror or error
            NOTICES.warning("The decoded images are not cached: %s cannot be written (%s).", self.path, reason)
            with contextlib.suppress(OSError):  # the same error again: the folder is not writable
                temporary.unlink(missing_ok=True)
