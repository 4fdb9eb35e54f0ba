"""Weights in and out: own checkpoints, foreign ones, and the hash that names them."""

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
from kdbench.errors import CheckpointError, Location, suggest


def read_checkpoint(path: str | Path, location: Location | str = "") -> Any:
    """Reads a checkpoint without running code that it may contain.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{location}: there is no checkpoint {path}".lstrip(": "))
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
                if (spoilt := archive.testzip()) is not None:
                    raise ValueError(f"its part {spoilt!r} does not have the checksum that it was written with")
        with warnings.catch_warnings():  # about the pickle's protocol: what matters is told below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can end in any of them
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        if path.is_file() and path.stat().st_size == 0:
            reason = "the file is empty"
        elif isinstance(error, pickle.UnpicklingError) and "eights" in reason:
            reason = "it holds Python objects besides tensors, which kdbench does not load"
        raise CheckpointError(f"{location}: {path} is damaged or no checkpoint ({reason})".lstrip(": ")) from None


def state_hash(module: nn.Module) -> str:
    """Returns a short hash of a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = full_tensors(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def select_state(
    content: Any, weights: WeightsConfig, file: Path, default_roles: Sequence[str] = (), *, use_effective: bool = True
) -> dict[str, Tensor]:
    """Finds the state dict inside a checkpoint's content, and translates its names.

    Args:
        roles: those of a checkpoint of kdbench that are wanted (the exported one, unless the recipe says otherwise); of
            several, the mean of their weights.
        baked: take the weights that the forward really used, of a role whose weights are transformed (quantised).

    Raises:
        CheckpointError: the key is not there, what stands there is no state dict, or roles cannot be averaged.
    """
    where = f"{weights.location}: {file}"
    if not weights.key and isinstance(content, Mapping) and "export" in content and "models" in content:
        wanted = weights.role or default_roles or (content["export"],)
        models = {**content["models"], **(content.get("baked", {}) if use_effective else {})}
        for role in wanted:
            if role not in models:
                raise CheckpointError(f"{where} holds no role {role!r}.{suggest(role, models)}")
        content = mean_state({role: models[role] for role in wanted}, where)
    elif weights.role:
        raise CheckpointError(f"{where} is no checkpoint of kdbench, so it has no roles ({', '.join(weights.role)})")
    if weights.key:
        for part in weights.key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                keys = [str(k) for k in content] if isinstance(content, Mapping) else []
                raise CheckpointError(f"{where} has no entry {weights.key!r}.{suggest(part, keys)}")
            content = content[part]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        keys = [str(k) for k in content] if isinstance(content, Mapping) else []
        hint = f" Its entries: {', '.join(keys[:8])}; choose one with `key`." if keys else ""
        raise CheckpointError(f"{where} holds no state dict.{hint}")
    state = {}
    for name, tensor in content.items():
        if weights.strip and name.startswith(weights.strip):
            name = name[len(weights.strip) :]
        for old, new in weights.rename.items():
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        state[name] = tensor
    return state


def mean_state(states: Mapping[str, Mapping[str, Tensor]], location: Location | str = "") -> Mapping[str, Tensor]:
    """Averages weights name by name; what is no real number (a count of batches) is the first one's.

    Raises:
        CheckpointError: names or shapes differ.
    """
    (first, own), *others = states.items()
    for other, state in others:
        unlike = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
        if unlike:
            raise CheckpointError(
                f"{location}: the weights of {first!r} and {other!r} cannot be averaged: they differ in {_join_some(unlike)}"
            )
    if not others:
        return own
    return {
        name: torch.stack([state[name] for state in states.values()]).mean(0) if value.is_floating_point() else value
        for name, value in own.items()
    }


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], location: Location | str, *, strict: bool = True
) -> list[str]:
    """Loads a state dict and returns, in words, what did not match (nothing when `strict`).

    Raises:
        CheckpointError: `strict`, and names or shapes do not match; the message lists them.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [name for name in own if name in state and own[name].shape != state[name].shape]
    faults = []
    if missing:
        faults.append(f"missing ({len(missing)}): {_join_some(missing)}")
    if unexpected:
        faults.append(f"unexpected ({len(unexpected)}): {_join_some(unexpected)}")
    for name in differing[:4]:
        faults.append(f"{name} is {list(state[name].shape)} there and {list(own[name].shape)} in the model")
    if strict and faults:
        hint = ""
        prefix = unexpected[0].split(".", 1)[0] + "." if unexpected and "." in unexpected[0] else ""
        if prefix and unexpected[0][len(prefix) :] in own:
            hint = f" Try `strip: {prefix}`."
        raise CheckpointError(f"{location}: the weights do not match the model: {'; '.join(faults)}.{hint}")
    module.load_state_dict({k: v for k, v in state.items() if k in own and k not in differing}, strict=False)
    return faults


def _join_some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
