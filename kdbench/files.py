"""Writing that survives a kill, and says so in words when there is no space left."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdbench.errors import TrainingError


@contextmanager
def translate_disk_errors(path: Path | str) -> Iterator[None]:
    """Turns a full disk or an exhausted quota into a TrainingError; every other OSError stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"no space left on the device of {Path(path).parent} (while writing {Path(path).name}); what was saved "
            "stays. Free some space and repeat the command: the run goes on from its last checkpoint."
        ) from None


def to_strict_json(data: Any) -> Any:
    """Returns `data` as strict JSON can hold it.

    NaN and the infinities become the strings "nan", "inf" and "-inf", which `float()` reads back; everything else
    round-trips exactly. Keys become strings, tuples lists, paths text.
    """
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else str(float(data))
    if isinstance(data, Mapping):
        return {str(key): to_strict_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [to_strict_json(value) for value in data]
    if isinstance(data, Path):
        return str(data)
    return data


def write_atomic(path: Path | str, content: bytes) -> None:
    """Replaces a file in one step: temporary file, fsync, rename, fsync of the folder. A kill leaves old or new.

    Raises:
        TrainingError: no space is left; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with translate_disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path | str, data: Any) -> None:
    """Writes strict JSON (see `strict`), indented, in one step.

    Raises:
        TrainingError: no space is left; the old file stays.
    """
    text = json.dumps(to_strict_json(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Reads a file of `write_json`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


class ResumableLog:
    """A log that a resumed run cuts off where its checkpoint stands, and goes on from there.

    The file is opened at the first write and cut to `offset` then: 0 for a new run, so that the lines of an attempt
    that never reached a checkpoint go away. Every write reaches the operating system before `write` returns.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.offset = 0
        self._file: int | None = None

    def resume(self, offset: int) -> bool:
        """Goes on at `offset`; False when the file has lost lines that the checkpoint knew."""
        if self._file is not None:
            raise RuntimeError(f"{self.path.name} is already being written")
        size = self.path.stat().st_size if self.path.exists() else 0
        self.offset = min(offset, size)
        return size >= offset

    def open(self) -> None:
        """Opens the file and cuts it to `offset`; later calls do nothing."""
        if self._file is None:
            with translate_disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._file, self.offset)
                os.lseek(self._file, self.offset, os.SEEK_SET)

    def write(self, content: bytes) -> None:
        """Appends all of `content`.

        Raises:
            TrainingError: no space is left; `offset` stays at the last whole write.
        """
        self.open()
        assert self._file is not None
        with translate_disk_errors(self.path):
            try:
                done = 0
                while done < len(content):
                    done += os.write(self._file, content[done:])
            except OSError:
                os.ftruncate(self._file, self.offset)
                os.lseek(self._file, self.offset, os.SEEK_SET)
                raise
        self.offset += len(content)

    def sync(self) -> int:
        """Waits until everything is on the disk, and returns the offset for the checkpoint."""
        if self._file is not None:
            with translate_disk_errors(self.path):
                os.fsync(self._file)
        return self.offset

    def flush(self) -> None:
        """Does nothing: `write` keeps nothing back. TensorBoard's RecordWriter calls it."""

    def close(self) -> None:
        """Closes the file; a file that was never written to stays as it is."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def closed(self) -> bool:
        return self._file is None


class JsonLinesLog:
    """Appends records to a file; see `ResumableLog` for how a resumed run goes on."""

    def __init__(self, path: Path | str) -> None:
        self.file = ResumableLog(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one line. NaN and infinities become the strings "nan", "inf", "-inf"."""
        text = json.dumps(to_strict_json(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        self.file.write((text + "\n").encode())


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Reads all whole lines; the unfinished last line of a run that is being written is left out."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]
