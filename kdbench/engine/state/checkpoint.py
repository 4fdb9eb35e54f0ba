"""One tree that holds everything a run needs to go on, written so that a kill at any moment leaves a good one."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.state.weights import read_checkpoint
from kdbench.errors import CheckpointError
from kdbench.files import write_atomic

CHECKPOINT_FORMAT = 1


def save(path: Path, tree: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes a checkpoint in one step; `keep_previous` keeps the one before it as `<name>.previous`.

    A tree holds `export` (a role's name) and `models` (role -> state dict) at least, so that any checkpoint of kdbench
    can be named as weights.

    Raises:
        TrainingError: no space is left; the old checkpoint stays.
    """
    content = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **_copy_partial_storages(tree)}, content)
    if keep_previous and path.exists():
        os.replace(path, previous_path(path))  # killed before the next line, `load` finds it there
    write_atomic(path, content.getvalue())


def _copy_partial_storages(value: Any) -> Any:
    """The same tree, where a tensor that is part of a larger one is copied: else the larger one would be written."""
    if isinstance(value, Tensor):
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    if isinstance(value, dict):
        result = copy.copy(value)  # a state dict stays one, with what it says of versions
        result.update({name: _copy_partial_storages(item) for name, item in value.items()})
        return result
    return [_copy_partial_storages(item) for item in value] if isinstance(value, list) else value


def previous_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def load(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Reads the newest good checkpoint.

    Returns:
        Its tree, or None when there is none yet; and a notice in words when the newest was damaged.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole and of this format.
    """
    faults = []
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        try:
            tree = read_checkpoint(candidate)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if not is_kdbench_checkpoint(tree):
            faults.append(f"{candidate} is no checkpoint of kdbench, or of another version")
            continue
        return tree, (f"{faults[0]}; going on from the one before it." if faults else "")
    if faults:
        raise CheckpointError(f"{'; '.join(faults)}. Start anew with fresh=true.")
    return None, ""


def is_kdbench_checkpoint(tree: Any) -> bool:
    """Whether a file's content is a checkpoint of this program."""
    return isinstance(tree, dict) and tree.get("format") == CHECKPOINT_FORMAT and "models" in tree
