"""The folder of a run: the paths of its files, the lock that admits one writer, and the status of the run."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from kdbench.entries import EntryError, read_entries
from kdbench.errors import UserError
from kdbench.files import file_lock, read_json, translate_disk_errors

RUN_FORMAT = "kdbench run"
"""Value of `format` in every manifest. It distinguishes a run folder from a folder of the user."""


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
"""All files that kdbench writes into a run folder, as glob patterns; `clear` deletes nothing else."""


RUN_SUBFOLDERS = ("tensorboard", "figures", "checkpoints", "stages")


Status = Literal["new", "interrupted", "finished"]


@dataclass(frozen=True)
class ManifestEntries:
    """The entries of manifest.json that kdbench reads back. All other entries are only for people.

    Attributes:
        format: the constant `RUN_FORMAT`.
        status: status of the last session (one start of the run).
        identity: hash of everything that the results depend on.
        started: time of the first session, ISO 8601.
        roles: role -> facts about the role, merged over the sessions.
        artifacts: `STAGE.NAME` -> facts about the artifact, merged over the sessions.
        frozen_forward: stage -> mode of its frozen roles (`inline`, `prefetch` or `cache`), merged over the sessions.
        sessions: one mapping per start of the run.
    """

    format: Literal["kdbench run"]
    status: Literal["running", "finished", "failed"]
    identity: str
    started: str = ""
    roles: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    frozen_forward: Mapping[str, Any] = field(default_factory=dict)
    sessions: list[Mapping[str, Any]] = field(default_factory=list)


Metrics = Mapping[str, float | str]
"""Metric -> value; NaN and infinities are strings."""


@dataclass(frozen=True)
class EvaluationEntries:
    """Metrics of all roles on all splits at one epoch.

    Attributes:
        metrics: role -> split -> metric -> value.
        epoch: number of finished epochs; None if the run did not evaluate.
    """

    metrics: Mapping[str, Mapping[str, Metrics]]
    epoch: int | None = None


@dataclass(frozen=True)
class BestEntries:
    """Metrics at the best epoch. `description` states how the best epoch was selected."""

    metrics: Mapping[str, Mapping[str, Metrics]]
    epoch: int
    description: str


@dataclass(frozen=True)
class ModelEntries:
    """Size, cost and weights of one role."""

    model: str | None = None
    parameters: int | None = None
    flops: float | None = None
    latency_ms: Mapping[str, float] | None = None
    weights_sha256: str = ""


@dataclass(frozen=True)
class PublishedEntries:
    """Comparison of the run's score with the published score."""

    description: str


@dataclass(frozen=True)
class SummaryEntries:
    """The entries of summary.json that kdbench reads back.

    Attributes:
        frozen: role -> split -> metric -> value, for the frozen roles.
        models: role -> size, cost and weights of the role.
    """

    recipe: str
    seed: int
    identity: str
    export: str
    last: EvaluationEntries
    best: BestEntries | None
    frozen: Mapping[str, Mapping[str, Metrics]]
    models: Mapping[str, ModelEntries]
    published: PublishedEntries | None
    wall_seconds: float
    device: str = ""
    baseline: bool = False
    baseline_removed: list[str] = field(default_factory=list)


class RunFolder:
    """The folder of one run, with the paths of its files.

    Args:
        path: path of the folder, which need not exist yet.
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
        """Returns the path of the file with the weights at the end of a stage."""
        return self.checkpoints / f"stage_{name}.pt"

    def artifact(self, stage: str, name: str) -> Path:
        """Returns the path of the file with an artifact that a stage builds."""
        return self.path / "stages" / f"{stage}.{name}.pt"

    def epoch(self, epoch: int) -> Path:
        """Returns the path of the file with the weights after an epoch."""
        return self.checkpoints / f"epoch_{epoch:04d}.pt"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_run(self) -> bool:
        """True if kdbench created this folder."""
        if (self.path / LOCK_NAME).exists():
            return True
        try:
            return read_json(self.manifest).get("format") == RUN_FORMAT
        except (UserError, AttributeError):
            return False

    def status(self) -> Status:
        """Returns the status of the run, which is determined from the files in the folder.

        A run with a damaged manifest or summary is `interrupted`: its last checkpoint is complete, and the next start
        writes both files again. `problems` reports the damage.

        Raises:
            UserError: the folder is not a run folder.
        """
        self._reject_foreign_folder()
        if not os.path.lexists(self.manifest):
            return "interrupted" if self.last.exists() else "new"
        try:
            finished = read_manifest(self.manifest)["status"] == "finished"
            if finished:
                read_summary(self.summary)
        except UserError:
            return "interrupted"
        return "finished" if finished else "interrupted"

    def problems(self) -> list[str]:
        """Returns one message for a damaged manifest and one for a damaged summary. A missing file is not damaged."""
        messages = []
        for path, read in ((self.manifest, read_manifest), (self.summary, read_summary)):
            if os.path.lexists(path):
                try:
                    read(path)
                except UserError as error:
                    messages.append(str(error))
        return messages

    def create(self) -> None:
        """Creates the folder and its parents. Reuses the folder of an earlier attempt.

        Raises:
            UserError: the path is a file, the folder has other content or is not writable, or a subfolder has the
                name of one of the run's files.
        """
        self._reject_foreign_folder()
        for path in (self.recipe, self.manifest, self.metrics, self.summary, self.last, self.best):
            if path.is_dir():
                raise UserError(f"{path} is a folder; a run has a file of that name. Remove the folder.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK_NAME).touch()
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written to ({error.strerror}). Choose another folder with out=DIR."
            ) from None

    @contextmanager
    def lock(self, on_wait: Callable[[str], object] | None = None) -> Iterator[None]:
        """Context manager: creates the folder and keeps all other processes from writing to it.

        The operating system releases the lock when this process dies, so a killed run never blocks its successor.

        Args:
            on_wait: function that receives a message before this process waits for the lock. None: raise an error
                instead of waiting.

        Raises:
            UserError: another process holds the lock and `on_wait` is None. The message names that process.
        """
        self.create()
        path = self.path / LOCK_NAME

        def on_busy() -> None:
            if on_wait is None:
                raise UserError(
                    f"{self.path} is in use by {_describe_holder(path)}. Wait for that process or end it; the run "
                    "then continues from its last checkpoint. For a second run, choose another folder with out=DIR."
                )
            on_wait(f"{self.path} is in use by {_describe_holder(path)}; waiting for it.")

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now})
        with contextlib.ExitStack() as stack:
            # Entered by hand: an OSError of the block itself must not read as one of the lock.
            try:
                stack.enter_context(file_lock(path, on_busy=on_busy, content=holder.encode()))
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be locked ({error.strerror}); its file system may not support locks. Choose "
                    "another folder with out=DIR or runs=DIR."
                ) from None
            yield

    def clear(self) -> None:
        """Deletes the files that kdbench wrote to the folder, for `fresh=true`. Every other file is kept.

        The caller must hold `lock`.

        Raises:
            UserError: the folder is not a run folder.
            TrainingError: a file cannot be deleted.
        """
        self._reject_foreign_folder()
        with translate_disk_errors(self.path):
            for pattern in RUN_FILES:
                for path in [*self.path.glob(pattern), *self.path.glob(pattern + ".tmp")]:
                    if path.is_dir() and not path.is_symlink():
                        raise UserError(f"{path} is a folder, but a run has a file of that name. Remove the folder.")
                    path.unlink()
            for name in RUN_SUBFOLDERS:
                folder = self.path / name
                if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                    folder.rmdir()
            self.checkpoints.mkdir(exist_ok=True)

    def _reject_foreign_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder. Choose another folder with out=DIR.")
        try:
            is_foreign = self.path.is_dir() and not self.is_run and any(self.path.iterdir())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}). Choose another folder with out=DIR."
            ) from None
        if is_foreign:
            raise UserError(
                f"{self.path} is not empty and is not a run folder of kdbench, so nothing is written there. Choose "
                "another folder with out=DIR."
            )


def read_manifest(path: Path) -> Mapping[str, Any]:
    """Reads manifest.json, checks the entries that `ManifestEntries` declares, and returns the full content.

    Raises:
        UserError: the file is missing or damaged, or an entry is missing or has the wrong type. The message names the
            file and the entry.
    """
    return _read_declared(ManifestEntries, path)


def read_summary(path: Path) -> Mapping[str, Any]:
    """Reads summary.json, checks the entries that `SummaryEntries` declares, and returns the full content.

    Raises:
        UserError: the file is missing or damaged, or an entry is missing or has the wrong type. The message names the
            file and the entry.
    """
    return _read_declared(SummaryEntries, path)


def _read_declared(declaration: type[Any], path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    try:
        read_entries(declaration, content)
        return content
    except EntryError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _describe_holder(path: Path) -> str:
    """Returns a description of the process that holds the lock, for error messages.

    The file can be empty at this moment, if a process takes or releases the lock. Then the text is "another process".
    """
    try:
        holder = json.loads(path.read_text())
        machine = " on this machine" if holder["host"] == platform.node() else f" on {holder['host']}"
        return f"process {holder['pid']}{machine} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
