"""Checkpoints: one file with the state of a run. A kill at any moment leaves a complete one."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.state.run_state import ArtifactFile, ForeignRunError, ModelFile, RunState
from kdbench.engine.state.weights import read_checkpoint
from kdbench.errors import CheckpointError
from kdbench.files import translate_disk_errors, write_atomic


def save(path: Path, content: RunState | ModelFile | ArtifactFile, *, keep_previous: bool = False) -> None:
    """Writes a checkpoint file in one step.

    Args:
        keep_previous: keeps the file before it as `<name>.previous`.

    Raises:
        TrainingError: the file cannot be written; the old checkpoint is unchanged.
    """
    buffer = io.BytesIO()
    torch.save(_copy_partial_storages(content.to_tree()), buffer)
    if keep_previous and path.exists():
        with translate_disk_errors(path):
            os.replace(path, previous_path(path))  # killed before the next line: `load` reads the previous file
    write_atomic(path, buffer.getvalue())


def _copy_partial_storages(value: Any) -> Any:
    """Copies each tensor that is a view of a larger storage; torch would otherwise save the whole storage."""
    if isinstance(value, Tensor):
        is_complete = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if is_complete else value.clone()
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the type of a state dict, with its version metadata
        result.update({name: _copy_partial_storages(item) for name, item in value.items()})
        return result
    return [_copy_partial_storages(item) for item in value] if isinstance(value, list) else value


def previous_path(path: Path) -> Path:
    """Returns the path of the checkpoint before the newest."""
    return path.with_name(f"{path.name}.previous")


def restore_previous(path: Path) -> None:
    """Replaces a damaged checkpoint by the one before it, which the next `save` would overwrite otherwise.

    Raises:
        TrainingError: the file cannot be renamed.
    """
    with translate_disk_errors(path):
        os.replace(previous_path(path), path)


def load(path: Path, *, identity: str | None = None, stages: Sequence[str] = ()) -> tuple[RunState | None, str]:
    """Reads the newest good checkpoint of a run.

    Args:
        path: of the newest checkpoint; the one before it is tried when this one is damaged.
        identity: of the run; None accepts every run.
        stages: names of the run's stages, in order; empty: unknown.

    Returns:
        The state, or None without any checkpoint; and a notice, empty unless the newest was damaged.

    Raises:
        CheckpointError: checkpoints exist, but none is good, one belongs to another run, or a folder has the name of
            one.
    """
    problems = []
    for candidate in (path, previous_path(path)):
        if not os.path.lexists(candidate):
            continue
        if candidate.is_dir():  # the next checkpoint could not be written either
            raise CheckpointError(
                f"{candidate} is a folder; a run has a checkpoint file of that name. Remove the folder."
            )
        try:
            state = RunState.from_tree(read_checkpoint(candidate), candidate, identity=identity, stages=stages)
        except ForeignRunError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return state, (f"{problems[0]}; resuming from the checkpoint before it." if problems else "")
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. No good checkpoint is left: train again with fresh=true.")
    return None, ""
