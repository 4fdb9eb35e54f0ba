"""Weights: checkpoints of kdbench and of other programs, state dicts, and the hash of a module's weights."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.config.schema import WeightsConfig
from kdbench.engine.distributed.dtensor import full_tensors
from kdbench.engine.state.run_state import ModelFile
from kdbench.errors import CheckpointError, Location, suggest


def read_checkpoint(path: str | Path, location: Location | str = "") -> Any:
    """Reads a file that `torch.save` wrote, without executing code that the file may contain.

    Args:
        path: path of the file.
        location: file and line of the recipe key that names the checkpoint, for messages.

    Raises:
        CheckpointError: the file is missing, is a folder, is damaged, or contains Python objects other than tensors.
    """
    path = Path(path)
    prefix = f"{location}: " if str(location) else ""
    if not path.is_file():
        problem = f"{path} is a folder, not a checkpoint file" if path.is_dir() else f"there is no checkpoint {path}"
        raise CheckpointError(prefix + problem)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
                if (damaged_part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of the file's entry {damaged_part!r} is wrong")
        with warnings.catch_warnings():  # about the pickle protocol; a real problem raises
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can raise any type
        reason = _damage_reason(path, error)
        raise CheckpointError(f"{prefix}{path} is damaged or not a checkpoint ({reason})") from None


def _damage_reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
    if isinstance(error, pickle.UnpicklingError) and "eights" in reason:
        return "it contains Python objects other than tensors, which kdbench does not load"
    return reason or type(error).__name__


def state_hash(module: nn.Module) -> str:
    """Returns a short hash of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = full_tensors(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def select_state(
    content: Any,
    weights: WeightsConfig,
    file: Path,
    default_roles: Sequence[str] = (),
    *,
    use_effective: bool = True,
    identity: str | None = None,
) -> dict[str, Tensor]:
    """Selects a state dict in the content of a checkpoint, and renames entries according to the recipe.

    Args:
        content: content of the file, which kdbench or another program wrote.
        weights: value of the recipe key `weights`.
        file: path of the file, for messages.
        default_roles: roles (networks) to read from a checkpoint of kdbench if the recipe names no role. Empty: the
            role that the checkpoint exports as its result. The weights of several roles are averaged.
        use_effective: for a role with weight transforms (such as quantisation), True selects the weights that the
            forward uses, and False selects the weights that the optimizer updates.
        identity: identity (a hash) of the run that must have written the file. None accepts any file, including a
            file of another program.

    Returns:
        Name -> tensor, with the names of the model that loads the state dict.

    Raises:
        CheckpointError: the key or role does not exist, the entry is not a state dict, roles cannot be averaged, or
            the file belongs to another run.
    """
    location = f"{weights.location}: {file}"
    is_model_file = isinstance(content, Mapping) and "export" in content and "models" in content
    if identity is not None or (is_model_file and not weights.key):
        try:
            saved = ModelFile.from_tree(content, file, identity=identity)
        except CheckpointError as error:
            raise type(error)(f"{weights.location}: {error}") from None
        roles = weights.role or default_roles or (saved.export,)
        models = {**saved.models, **(saved.effective if use_effective else {})}
        for role in roles:
            if role not in models:
                raise CheckpointError(f"{location} has no role {role!r}.{suggest(role, models)}")
        content = content if weights.key else mean_state({role: models[role] for role in roles}, location)
    elif weights.role:
        raise CheckpointError(
            f"{location} is not a checkpoint of kdbench, so it has no roles ({', '.join(weights.role)})"
        )
    if weights.key:
        content = _entry_at(content, weights.key, location)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        hint = f" Its entries: {', '.join(keys[:8])}; select one with `key`." if keys else ""
        raise CheckpointError(f"{location} has no state dict.{hint}")
    return {_rename_entry(str(name), weights): tensor for name, tensor in content.items()}


def _entry_at(content: Any, key: str, location: str) -> Any:
    """Returns the entry of nested mappings at a dotted key, such as `model.state_dict`."""
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            keys = [str(name) for name in content] if isinstance(content, Mapping) else []
            raise CheckpointError(f"{location} has no entry {key!r}.{suggest(part, keys)}")
        content = content[part]
    return content


def _rename_entry(name: str, weights: WeightsConfig) -> str:
    """Renames a state dict entry: removes the prefix `weights.strip`, then replaces the first match of `rename`."""
    if weights.strip:
        name = name.removeprefix(weights.strip)
    for old, new in weights.rename.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def mean_state(states: Mapping[str, Mapping[str, Tensor]], location: Location | str = "") -> Mapping[str, Tensor]:
    """Averages state dicts entry by entry. Integer and boolean entries are copied from the first state dict.

    Args:
        states: role (name of a network) -> state dict.
        location: recipe line or file in which the weights were requested, for messages.

    Raises:
        CheckpointError: the state dicts differ in names or shapes.
    """
    (first_role, first_state), *other_states = states.items()
    for role, state in other_states:
        differences = sorted(set(first_state) ^ set(state)) or [
            name for name in first_state if first_state[name].shape != state[name].shape
        ]
        if differences:
            raise CheckpointError(
                f"{location}: the weights of {first_role!r} and {role!r} cannot be averaged: they differ in "
                f"{_join_some(differences)}"
            )
    if not other_states:
        return first_state
    return {
        name: torch.stack([state[name] for state in states.values()]).mean(0) if value.is_floating_point() else value
        for name, value in first_state.items()
    }


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], location: Location | str, *, strict: bool = True
) -> list[str]:
    """Loads a state dict into a module.

    Returns:
        Messages about names and shapes that do not match. With `strict`, the list is empty.

    Raises:
        CheckpointError: `strict` is True, and names or shapes do not match. The message lists them.
    """
    expected = module.state_dict()
    missing_names = [name for name in expected if name not in state]
    unexpected_names = [name for name in state if name not in expected]
    misshapen = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    problems = []
    if missing_names:
        problems.append(f"missing ({len(missing_names)}): {_join_some(missing_names)}")
    if unexpected_names:
        problems.append(f"unexpected ({len(unexpected_names)}): {_join_some(unexpected_names)}")
    for name in misshapen[:4]:
        shapes = f"{list(state[name].shape)} in the file and {list(expected[name].shape)} in the model"
        problems.append(f"{name} has shape {shapes}")
    if strict and problems:
        hint = ""
        prefix = unexpected_names[0].split(".", 1)[0] + "." if unexpected_names and "." in unexpected_names[0] else ""
        if prefix and unexpected_names[0][len(prefix) :] in expected:
            hint = f" Try `strip: {prefix}`."
        raise CheckpointError(f"{location}: the weights do not match the model: {'; '.join(problems)}.{hint}")
    module.load_state_dict(
        {name: value for name, value in state.items() if name in expected and name not in misshapen}, strict=False
    )
    return problems


def _join_some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
