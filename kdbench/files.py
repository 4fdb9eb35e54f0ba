"""File operations that survive a kill: atomic writes, resumable logs, locks, and readers that name a bad file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from kdbench.errors import TrainingError, UserError


@contextmanager
def translate_disk_errors(path: Path | str) -> Generator[None, None, None]:
    """Context manager: converts an OSError to a TrainingError that names the path.

    Such errors are a full disk, an exhausted quota, a removed folder, a read-only file system and I/O errors.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        advice = "Repeat the command afterwards: the run continues from its last checkpoint."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(
                f"no space left on the device of {path.parent} (while writing {path.name}). Files that are already "
                f"saved are intact. Free some space. {advice}"
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.parent.is_dir():
            raise TrainingError(
                f"{path} cannot be written: the folder {path.parent} does not exist (removed during the run?)."
            ) from error
        reason = error.strerror or str(error)
        raise TrainingError(
            f"{path} cannot be written ({reason}). Files that are already saved are intact. Fix the folder or the "
            f"disk. {advice}"
        ) from error


def to_strict_json(data: Any) -> Any:
    """Converts `data` to values that strict JSON can represent.

    NaN and the infinities become the strings "nan", "inf" and "-inf", which `float()` converts back. All other
    numbers keep their exact value. Keys become strings, tuples become lists, and paths become strings.
    """
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else str(float(data))
    if isinstance(data, Mapping):
        mapping = cast("Mapping[Any, Any]", data)
        return {str(key): to_strict_json(value) for key, value in mapping.items()}
    if isinstance(data, list | tuple):
        return [to_strict_json(value) for value in cast("Sequence[Any]", data)]
    if isinstance(data, Path):
        return str(data)
    return data


def write_atomic(path: Path | str, content: bytes) -> None:
    """Replaces a file atomically: writes a temporary file, syncs it, renames it, and syncs the folder.

    A kill at any moment leaves either the old or the new file.

    Raises:
        TrainingError: the file cannot be written. The old file is unchanged.
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
            with contextlib.suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path | str, data: Any) -> None:
    """Writes data as indented, strict JSON (see `to_strict_json`), with an atomic replacement of the file.

    Raises:
        TrainingError: the file cannot be written. The old file is unchanged.
    """
    text = json.dumps(to_strict_json(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Reads a JSON file and returns its content.

    Raises:
        UserError: the file is missing, is a folder, cannot be read or is not JSON. The message names the file.
    """
    return _parse_json(path, _read_text(path))


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Reads all complete lines of a JSON Lines file and returns one mapping per line.

    The last line of a run in progress can be incomplete; it is left out.

    Raises:
        UserError: the file is missing or unreadable, or a line is not JSON. The message names the file and the line.
    """
    lines = _read_text(path).split("\n")[:-1]
    return [_parse_json(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]


def _read_text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is damaged (not UTF-8 text: byte {error.start} is {error.object[error.start]:#x})"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _parse_json(location: Path | str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        reason = "empty" if not text.strip() else str(error)
        raise UserError(f"{location} is damaged (not JSON: {reason})") from None


class ResumableLog:
    """An append-only log. A resumed run cuts it at the offset in its checkpoint and then appends to it.

    The file is opened at the first write, and cut at `offset` at that time. For a new run `offset` is 0, which
    removes the lines of an attempt that never reached a checkpoint. Every write reaches the operating system before
    `write` returns.

    Args:
        path: path of the log file, which is created at the first write.
        complete_length: function of a file's content that returns the length of all complete records at its
            beginning. If the file is shorter than the offset of the checkpoint, the log continues after the last
            complete record.
    """

    def __init__(self, path: Path | str, complete_length: Callable[[bytes], int] = len) -> None:
        self.path = Path(path)
        self.offset = 0
        self._complete_length = complete_length
        self._file: int | None = None

    def resume(self, offset: int) -> bool:
        """Sets the offset at which the log continues. Returns False if the file is shorter than `offset`.

        In that case the log continues after the last complete record of the file.

        Raises:
            TrainingError: the file cannot be read.
        """
        if self._file is not None:
            raise RuntimeError(f"{self.path.name} is already being written")
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size >= offset:
            self.offset = offset
            return True
        with translate_disk_errors(self.path):
            self.offset = self._complete_length(self.path.read_bytes()) if size else 0
        return False

    def open(self) -> None:
        """Opens the file and cuts it at `offset`. Has no effect if the file is already open."""
        if self._file is None:
            with translate_disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._file, self.offset)
                os.lseek(self._file, self.offset, os.SEEK_SET)

    def write(self, content: bytes) -> None:
        """Appends `content` completely.

        Raises:
            TrainingError: the disk is full or fails. `offset` remains at the end of the last complete write.
        """
        self.open()
        assert self._file is not None
        with translate_disk_errors(self.path):
            try:
                num_written = 0
                while num_written < len(content):
                    num_written += os.write(self._file, content[num_written:])
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    os.ftruncate(self._file, self.offset)
                    os.lseek(self._file, self.offset, os.SEEK_SET)
                raise
        self.offset += len(content)

    def sync(self) -> int:
        """Flushes the file to the disk and returns the offset, which a checkpoint stores."""
        if self._file is not None:
            with translate_disk_errors(self.path):
                os.fsync(self._file)
        return self.offset

    def flush(self) -> None:
        """Does nothing, because `write` does not buffer. TensorBoard's RecordWriter calls this method."""

    def close(self) -> None:
        """Closes the file. A file that was never written to is unchanged."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def closed(self) -> bool:
        return self._file is None


class JsonLinesLog:
    """Appends records to a JSON Lines file. `file` is the `ResumableLog` with which a run resumes."""

    def __init__(self, path: Path | str) -> None:
        self.file = ResumableLog(path, complete_length=lambda content: content.rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record as one line. NaN and infinities become the strings "nan", "inf", "-inf"."""
        text = json.dumps(to_strict_json(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        self.file.write((text + "\n").encode())


@contextmanager
def file_lock(
    path: Path, *, on_busy: Callable[[], object] | None = None, optional: bool = False, content: bytes = b""
) -> Generator[None, None, None]:
    """Context manager: holds an exclusive lock on a file. Waits as long as another process holds the lock.

    The operating system releases the lock when this process dies. A forked child does not inherit the lock.

    Args:
        path: the lock file. The file and its folder are created.
        on_busy: function that is called once before waiting. It may raise an exception instead of waiting.
        optional: whether the block runs without a lock if the folder is not writable or the file system has no locks.
        content: content of the lock file while the lock is held, such as the process id.

    Raises:
        OSError: the lock file cannot be created, locked or written, and `optional` is False.
    """
    try:
        descriptor = _acquire_lock(path, on_busy, content)
    except (ImportError, OSError):
        if not optional:
            raise
        yield
        return
    try:
        yield
    finally:
        # A forked child that leaves the block has closed its copy; the number may belong to another file there.
        if descriptor in _LOCK_DESCRIPTORS:
            _LOCK_DESCRIPTORS.discard(descriptor)
            if content:
                with contextlib.suppress(OSError):  # an error of the block is the one to report
                    os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _acquire_lock(path: Path, on_busy: Callable[[], object] | None, content: bytes) -> int:
    import fcntl  # absent on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _LOCK_DESCRIPTORS.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if on_busy is not None:
                on_busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if content:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
    except BaseException:
        _LOCK_DESCRIPTORS.discard(descriptor)
        os.close(descriptor)
        raise
    return descriptor


_LOCK_DESCRIPTORS: set[int] = set()


def _close_lock_descriptors() -> None:
    """Closes inherited lock files in a forked data worker.

    Otherwise the worker would hold the locks after its parent was killed.
    """
    for descriptor in _LOCK_DESCRIPTORS:
        os.close(descriptor)
    _LOCK_DESCRIPTORS.clear()


os.register_at_fork(after_in_child=_close_lock_descriptors)
