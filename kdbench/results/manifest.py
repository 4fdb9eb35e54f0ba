"""manifest.json: everything needed to trust and repeat a run, and none of what names the person or the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from kdbench.config.schema import Recipe
from kdbench.files import read_json, write_json
from kdbench.results.folder import FORMAT

PACKAGES = ("kdbench", "torch", "torchvision", "numpy", "hydra-core", "omegaconf")
SAME_BITS = ("device", "threads", "world_size", "versions", "frozen_forward")
"""A resumed run ends with the same bits only when these are as they were."""


def write_manifest(
    path: Path,
    *,
    recipe: Recipe,
    identity: str,
    device: str,
    world_size: int = 1,
    training: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    roles: Mapping[str, Any] | None = None,
    parts: Mapping[str, int] | None = None,
    command: Sequence[str] | None = None,
) -> list[str]:
    """Writes the manifest when a run begins, or adds a session to it when an interrupted run goes on.

    Args:
        path: `RunFolder.manifest`.
        identity: the hash of everything that the results depend on.
        device: `cpu`, `cuda:0`, `mps`.
        training: such as effective_batch, lr, precision, batchnorm (in words), by stage.
        data: by source: dataset, split, samples, checksum.
        roles: by role: model, parameters, trainable, weights (source and sha256).
        parts: versions of the models and terms in use.
        command: the command line; this process's own when None.

    Returns:
        What differs from the last session and may change bits, one sentence each; empty for a new run.

    Raises:
        TrainingError: no space is left.
    """
    session = {
        "started": _now(),
        "command": shlex.join(command if command is not None else _command()),
        "device": device_name(device),
        "threads": _threads(),
        "world_size": world_size,
        "frozen_forward": f"{recipe.frozen_forward}, {recipe.frozen_rows} rows",
        "versions": versions(),
        "git": git_state(),
    }
    earlier = read_json(path) if path.exists() else {}
    sessions = earlier.get("sessions", [])
    write_json(
        path,
        {
            "format": FORMAT,
            "status": "running",
            "started": earlier.get("started", session["started"]),
            "finished": None,
            "identity": identity,
            "recipe": {
                "name": recipe.name,
                "title": recipe.title,
                "paper": recipe.paper,
                "methods": list(recipe.methods),
                "notes": recipe.notes,
                "overrides": list(recipe.overrides),
                "choices": recipe.choices,
                "twin": recipe.twin,
                "dropped": list(recipe.dropped),
            },
            "seed": recipe.seed,
            "training": training or {},
            "data": data or {},
            "roles": _merge(earlier.get("roles", {}), roles or {}),
            "made": earlier.get("made", {}),
            "frozen_forward": earlier.get("frozen_forward", {}),
            "parts": parts or {},
            "sessions": [*sessions, session],
        },
    )
    return _changes(sessions[-1], session) if sessions else []


def amend_manifest(path: Path, changes: Mapping[str, Any]) -> None:
    """Merges facts that are known later, such as `{"roles": {"teacher": {"accuracy": {"test": 76.3}}}}`."""
    write_json(path, _merge(read_json(path), changes))


def amend_session(path: Path, changes: Mapping[str, Any]) -> None:
    """Merges facts about how the last session computes, such as `{"gang": {"label": "seed=2"}}`."""
    *earlier, last = read_json(path)["sessions"]
    amend_manifest(path, {"sessions": [*earlier, _merge(last, changes)]})


def finish_manifest(path: Path, status: Literal["finished", "failed"], reason: str = "") -> None:
    """Says how the run ended and when; `reason` is why it failed."""
    ended = {"status": status, "finished": _now() if status == "finished" else None}
    amend_manifest(path, {**ended, **({"reason": reason} if reason else {})})


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            if package == "kdbench":
                import kdbench

                found[package] = kdbench.__version__
    return found


def git_state() -> dict[str, Any] | None:
    """Returns commit and dirty of the checkout that this kdbench runs from; None when it is an installed copy."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        asked = ["git", "-C", str(package), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10, env=environment).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a virtual environment inside another repository is not ours
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: str) -> str:
    """Returns the device in words, without the name of the host: `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device == "cpu":
        return f"cpu ({_processor()}, {os.cpu_count()} cores)"
    return f"{device} ({platform.machine()})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _command() -> list[str]:
    """The command line as it was typed: Hydra puts its own words into sys.argv for the time of a job."""
    words = sys.orig_argv
    for number, word in enumerate(words):
        if Path(word).name == "kdbench" or (word == "-m" and words[number + 1 : number + 2] == ["kdbench"]):
            return ["kdbench", *words[number + (2 if word == "-m" else 1) :]]
    return [Path(words[0]).name, *words[1:]]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _merge(old: Any, new: Any) -> Any:
    """Lays `new` over `old`; mappings are merged key by key, everything else is replaced."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for key in SAME_BITS:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted({*old, *new})
            found += [f"{n} was {old.get(n)}, is {new.get(n)}" for n in names if old.get(n) != new.get(n)]
        elif old != new and key in before:
            found.append(f"{key.replace('_', ' ')} was {old}, is {new}")
    return [f"{text}: the run goes on, but not to the same bits." for text in found]
