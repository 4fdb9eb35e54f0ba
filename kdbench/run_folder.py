"""The folder of a run: where its files lie, who may write to it, and how far it has come."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from kdbench.errors import UserError
from kdbench.files import read_json

RUN_FORMAT = "kdbench run"
"""Stands in every manifest, and tells a run's folder from a folder of the user's own."""


LOCK_NAME = ".kdbench.lock"


RUN_FILES = (
    "resolved.yaml",
    "manifest.json",
    "metrics.jsonl",
    "summary.json",
    "tensorboard/events.out.tfevents.*.kdbench",
    "figures/confusion_*.png",
    "figures/predictions_*.png",
    "checkpoints/last.pt",
    "checkpoints/best.pt",
    "checkpoints/stage_*.pt",
    "checkpoints/epoch_*.pt",
    "stages/*.*.pt",
    "checkpoints/*.pt.previous",
)
"""Everything that kdbench itself writes into a run's folder, as glob patterns; `clear` deletes nothing else."""


RUN_SUBFOLDERS = ("tensorboard", "figures", "checkpoints", "stages")


Status = Literal["new", "interrupted", "finished"]


class RunFolder:
    """One run's folder and the paths of its files.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "resolved.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.tensorboard = self.path / "tensorboard"
        self.figures = self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"

    def stage(self, name: str) -> Path:
        """Where the roles lie as stage `name` left them."""
        return self.checkpoints / f"stage_{name}.pt"

    def artifact(self, stage: str, name: str) -> Path:
        """Where the thing called `name` lies that a stage made."""
        return self.path / "stages" / f"{stage}.{name}.pt"

    def epoch(self, epoch: int) -> Path:
        """Where the exported role of one epoch lies."""
        return self.checkpoints / f"epoch_{epoch:04d}.pt"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_run(self) -> bool:
        """Whether kdbench made this folder."""
        if (self.path / LOCK_NAME).exists():
            return True
        try:
            return read_json(self.manifest).get("format") == RUN_FORMAT
        except (OSError, ValueError, AttributeError):
            return False

    def status(self) -> Status:
        """How far the run has come, by what lies in the folder.

        Raises:
            UserError: the folder belongs to something else.
        """
        self._reject_foreign_folder()
        try:
            told = read_json(self.manifest).get("status")
        except (OSError, ValueError, AttributeError):
            return "new"
        return "finished" if told == "finished" and self.summary.exists() else "interrupted"

    def create(self) -> None:
        """Makes the folder and its parents; a folder of an earlier attempt is taken as it is.

        Raises:
            UserError: there is a file of that name, the folder holds something else, or it cannot be written to.
        """
        self._reject_foreign_folder()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK_NAME).touch()
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written to ({error.strerror}). Choose another with out=DIR."
            ) from None

    @contextmanager
    def lock(self, on_wait: Callable[[str], object] | None = None) -> Iterator[None]:
        """Keeps every other process out while the block runs; makes the folder when it is not there.

        The system drops the lock when this process dies, however it dies, so a killed run never blocks its successor.

        Args:
            wait: when another process holds the lock, this is told so in a sentence, and the lock is waited for.

        Raises:
            UserError: another process is writing to the folder and `wait` is None; the message says which.
        """
        self.create()
        path = self.path / LOCK_NAME
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _LOCKS.add(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(
                        f"the file system of {self.path} does not support locks ({error.strerror}). Choose another "
                        "place with out=DIR or runs=DIR."
                    ) from None
                if on_wait is None:
                    raise UserError(
                        f"{self.path} is in use by {_describe_holder(path)}. Wait for it or end it; the run then goes on from "
                        "its last checkpoint. For a run of its own, choose another folder with out=DIR."
                    ) from None
                on_wait(f"{self.path} is in use by {_describe_holder(path)}; waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            holder = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now})
            os.ftruncate(file, 0)
            os.pwrite(file, holder.encode(), 0)
            try:
                yield
            finally:
                if file in _LOCKS:
                    os.ftruncate(file, 0)
        finally:
            if file in _LOCKS:  # not in a forked child that runs off the end of the block
                _LOCKS.discard(file)
                os.close(file)

    def clear(self) -> None:
        """Deletes what kdbench wrote here, for `fresh=true`; every other file stays. Call it under `lock`.

        Raises:
            UserError: the folder belongs to something else.
        """
        self._reject_foreign_folder()
        for pattern in RUN_FILES:
            for found in [*self.path.glob(pattern), *self.path.glob(pattern + ".tmp")]:
                found.unlink()
        for name in RUN_SUBFOLDERS:
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        self.checkpoints.mkdir(exist_ok=True)

    def _reject_foreign_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder. Choose another with out=DIR.")
        if self.path.is_dir() and not self.is_run and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} is not empty and holds no run of kdbench, so nothing is written there. Choose another "
                "folder with out=DIR."
            )


_LOCKS: set[int] = set()


def _close_locks() -> None:
    """A forked data worker inherits the lock, and would hold it for a while after its parent was killed."""
    for file in _LOCKS:
        os.close(file)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_close_locks)


def _describe_holder(path: Path) -> str:
    """Says who holds the lock; it may be just taking or leaving it."""
    try:
        told = json.loads(path.read_text())
        here = " on this machine" if told["host"] == platform.node() else f" on {told['host']}"
        return f"process {told['pid']}{here} (since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
