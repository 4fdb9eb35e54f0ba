"""Checkpoint files: a process that is killed at any moment leaves a complete checkpoint."""

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
    """Writes a checkpoint file atomically.

    Args:
        path: path of the file.
        content: content of the file.
        keep_previous: True renames an existing file to `<name>.previous` before the new file is written.

    Raises:
        TrainingError: the file cannot be written. The content of an existing checkpoint is unchanged.
    """
    buffer = io.BytesIO()
    torch.save(_copy_partial_storages(content.to_tree()), buffer)
    if keep_previous and path.exists():
        with translate_disk_errors(path):
            os.replace(path, previous_path(path))  # killed before the next line: `load` reads the previous file
    write_atomic(path, buffer.getvalue())


def _copy_partial_storages(value: Any) -> Any:
    """Clones every tensor that is a view of a larger storage, in nested dicts and lists.

    For such a view, `torch.save` would write the whole storage.
    """
    if isinstance(value, Tensor):
        is_complete = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if is_complete else value.clone()
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps the type of a state dict, with its version metadata
        result.update({name: _copy_partial_storages(item) for name, item in value.items()})
        return result
    return [_copy_partial_storages(item) for item in value] if isinstance(value, list) else value


def previous_path(path: Path) -> Path:
    """Returns the path of the second-newest checkpoint, given the path of the newest checkpoint."""
    return path.with_name(f"{path.name}.previous")


def restore_previous(path: Path) -> None:
    """Replaces a damaged checkpoint file by the file of the previous checkpoint.

    Without this, the next `save` would overwrite the previous checkpoint by the damaged file.
    Raises:
        TrainingError: the file cannot be renamed.
    """
    with translate_disk_errors(path):
        os.replace(previous_path(path), path)


def load(path: Path, *, identity: str | None = None, stages: Sequence[str] = ()) -> tuple[RunState | None, str]:
    """Reads the newest undamaged checkpoint of a run.

    Args:
        path: path of the newest checkpoint. If this file is missing or damaged, the previous checkpoint is read.
        identity: identity (hash of recipe, data and teachers) of the run that must have written the checkpoint. None
            accepts the checkpoint of any run.
        stages: names of the run's training stages, in order; empty if the names are not known.

    Returns:
        A tuple of the run's state, which is None if there is no checkpoint, and a notice for the user. The notice is
        empty unless the newest checkpoint is damaged.

    Raises:
        CheckpointError: all checkpoints are damaged, a checkpoint has another identity, or a folder has the name of a
            checkpoint file.
    """
    problems = []
    for candidate in (path, previous_path(path)):
        if not os.path.lexists(candidate):
            continue
        if candidate.is_dir():  # the next checkpoint could not be written either
            raise CheckpointError(
                f"{candidate} is a folder, but a run writes a checkpoint file with this name. Remove the folder."
            )
        try:
            state = RunState.from_tree(read_checkpoint(candidate), candidate, identity=identity, stages=stages)
        except ForeignRunError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return state, (f"{problems[0]}. The run resumes from the previous checkpoint." if problems else "")
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. There is no undamaged checkpoint: train again with fresh=true.")
    return None, ""
