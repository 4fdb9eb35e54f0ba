"""Simulates kills of a run in this process: at a write to the disk, or at a step of a stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kdbench import files
from kdbench.engine.train.runner import Runner


class KilledRun(BaseException):
    """Ends a run at once, like a signal."""


@contextmanager
def kill_at_write(write_number: int) -> Iterator[None]:
    """Kills a run of this process at a write to the disk: before a write, in the middle of it, or before a rename."""
    count = itertools.count(1)
    write, replace, fsync = files.os.write, files.os.replace, files.os.fsync

    def die() -> None:
        if next(count) >= write_number:
            raise KilledRun

    def write_half(file: int, content: bytes) -> int:
        if next(count) >= write_number:
            write(file, content[: len(content) // 2])
            raise KilledRun
        return write(file, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "write", write_half)
        patch.setattr(files.os, "replace", lambda *names: (die(), replace(*names))[1])
        patch.setattr(files.os, "fsync", lambda file: (die(), fsync(file))[1])
        yield


@contextmanager
def kill_at_step(stage: str, step: int) -> Iterator[None]:
    """Kills a run before a step (counted from 0) of a stage, and expects that."""
    original_step = Runner.step

    def killing_step(self: Runner, window: list) -> None:
        if (self.stage.name, self.progress.steps_done) == (stage, step):
            raise KilledRun
        original_step(self, window)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledRun):
        patch.setattr(Runner, "step", killing_step)
        yield
