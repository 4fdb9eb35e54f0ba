"""Writes manifest.json, and computes the part of a run's identity that is not in the recipe.

The manifest contains what is needed to repeat a run: recipe, versions, devices, data checksums, origin of weights. It
contains nothing that identifies the user or the host.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.describe import located_errors, open_dataset
from kdbench.data.loading.source import Source
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.roles import root_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.weight_loader import WeightsOrigin, find_weights_file
from kdbench.errors import Location, UserError
from kdbench.files import write_json
from kdbench.registry import ARTIFACTS, MODELS, SELECTORS, TERMS
from kdbench.run_folder import RUN_FORMAT, read_manifest

PACKAGES = ("kdbench", "torch", "torchvision", "numpy", "hydra-core", "omegaconf")


DETERMINISM_KEYS = ("device", "threads", "world_size", "versions", "frozen_forward")
"""Entries of a session that must be equal for a resumed run to end with the same bits."""


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
    """Writes the manifest of a new run, or adds a session to the manifest of a resumed run.

    A damaged manifest is written again without the entries of earlier sessions.

    Args:
        path: path of the manifest, `RunFolder.manifest`.
        identity: hash of everything that the results depend on.
        device: name of the device, such as `cpu`, `cuda:0` or `mps`.
        training: stage -> effective batch, learning rate, precision, batchnorm and other settings.
        data: `STAGE.SOURCE` -> dataset, split, samples, checksum.
        roles: role -> model, parameters, mode, weights (source and sha256).
        parts: versions of the models, terms and artifact builders in use.
        command: command line of the run; None: the command line of this process.

    Returns:
        One message for each difference from the previous session that may change results; an empty list for a new
        run.

    Raises:
        TrainingError: the file cannot be written.
    """
    session = {
        "started": _now(),
        "command": shlex.join(command if command is not None else _command_line()),
        "device": device_name(device),
        "threads": _threads(),
        "world_size": world_size,
        "frozen_forward": f"{recipe.frozen_forward}, {recipe.frozen_batch_size} rows",
        "versions": package_versions(),
        "git": git_state(),
    }
    earlier = _earlier_entries(path)
    sessions = earlier.get("sessions", [])
    write_json(
        path,
        {
            "format": RUN_FORMAT,
            "status": "running",
            "started": earlier.get("started", session["started"]),
            "finished": None,
            "identity": identity,
            "recipe": _recipe_entries(recipe),
            "seed": recipe.seed,
            "training": training or {},
            "data": data or {},
            # Entries of finished stages are known only to earlier sessions.
            "roles": _merge(earlier.get("roles", {}), roles or {}),
            "artifacts": earlier.get("artifacts", {}),
            "frozen_forward": earlier.get("frozen_forward", {}),
            "parts": parts or {},
            # Sessions accumulate: a resumed run may have used several machines and versions.
            "sessions": [*sessions, session],
        },
    )
    return _describe_changes(sessions[-1], session) if sessions else []


def _earlier_entries(path: Path) -> Mapping[str, Any]:
    """Reads the manifest of earlier sessions. Returns an empty mapping if the file is missing or damaged."""
    try:
        return read_manifest(path)
    except UserError:
        return {}


def _recipe_entries(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "paper": recipe.paper,
        "methods": list(recipe.methods),
        "notes": None if recipe.notes is None else asdict(recipe.notes),
        "overrides": list(recipe.overrides),
        "choices": recipe.group_choices,
        "baseline": recipe.baseline,
        "baseline_removed": list(recipe.baseline_removed),
    }


def amend_manifest(path: Path, entries: Mapping[str, Any]) -> None:
    """Merges later entries into the manifest, such as `{"roles": {"teacher": {"scores": {"test": {"top1": 76.3}}}}}`.

    Raises:
        UserError: the manifest is damaged.
        TrainingError: the file cannot be written.
    """
    write_json(path, _merge(read_manifest(path), entries))


def amend_session(path: Path, entries: Mapping[str, Any]) -> None:
    """Merges entries about the current session into the manifest, such as `{"concurrent": {"label": "seed=2"}}`."""
    *earlier, present = read_manifest(path).get("sessions") or [{}]
    amend_manifest(path, {"sessions": [*earlier, _merge(present, entries)]})


def finish_manifest(path: Path, status: Literal["finished", "failed"], reason: str = "") -> None:
    """Writes the end of a run into the manifest. `reason` is the error message of a failed run."""
    entries = {"status": status, "finished": _now() if status == "finished" else None}
    amend_manifest(path, {**entries, **({"reason": reason} if reason else {})})


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            if package == "kdbench":
                import kdbench

                versions[package] = kdbench.__version__
    return versions


def git_state() -> dict[str, Any] | None:
    """Returns the entries `commit` and `dirty` for a kdbench in a git checkout, or None for an installed package."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment).stdout

    try:
        # Fails for a virtual environment inside the repository of another project.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: str) -> str:
    """Returns a description of the device without the host name, such as `cuda:0 (NVIDIA H100 80GB HBM3)`."""
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


def _command_line() -> list[str]:
    """Returns the command line of the user, from `sys.orig_argv`, because Hydra replaces `sys.argv`."""
    arguments = sys.orig_argv
    for number, argument in enumerate(arguments):
        if Path(argument).name == "kdbench" or (argument == "-m" and arguments[number + 1 : number + 2] == ["kdbench"]):
            return ["kdbench", *arguments[number + (2 if argument == "-m" else 1) :]]
    return [Path(arguments[0]).name, *arguments[1:]]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _merge(old: Any, new: Any) -> Any:
    """Returns `old` updated by `new`. Nested mappings are merged key by key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return new


def _describe_changes(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns a message for each difference between two sessions that may change results."""
    changes = []
    for key in DETERMINISM_KEYS:
        old, new = previous.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted({*old, *new})
            changes += [f"{n} was {old.get(n)}, is {new.get(n)}" for n in names if old.get(n) != new.get(n)]
        elif old != new and key in previous:
            changes.append(f"{key.replace('_', ' ')} was {old}, is {new}")
    return [f"{text}: the run continues, but its results may differ in the last bits." for text in changes]


def dataset_checksums(recipe: Recipe) -> dict[str, str]:
    """Returns `STAGE.SOURCE` -> digest of the dataset; the digest of generated noise is empty."""
    digests = {}
    for stage in recipe.stages:
        for config in stage.data.values():
            dataset = open_dataset(config, recipe.data_root)
            with located_errors(config):
                digest = dataset.checksum() if hasattr(dataset, "checksum") else ""
            digests[f"{stage.name}.{config.name}"] = digest
    return digests


def external_identity(
    recipe: Recipe,
    data_checksums: Mapping[str, str],
    teacher_identities: Mapping[tuple[str, str], str],
    world_size: int,
) -> dict[str, Any]:
    """Returns the parts of a run's identity that are not in the recipe.

    Args:
        data_checksums: return value of `dataset_checksums`.
        teacher_identities: (stage, role) -> identity of the run that trains the role's initial weights.
        world_size: number of processes, to which the effective batch size is proportional.

    Raises:
        UserError: a file of weights cannot be read.
    """
    entries: dict[str, Any] = {"data": dict(data_checksums)}
    entries |= {f"weights.{stage}.{role}": name for (stage, role), name in teacher_identities.items()}
    for stage in recipe.stages:
        for name, role in stage.roles.items():
            if role.weights is not None and role.weights.path is not None:
                file = find_weights_file(role.weights, recipe)
                entries[f"weights.{stage.name}.{name}"] = _file_hash(file, role.weights.location)
        entries |= artifact_versions(stage)
    return entries | ({"world": world_size} if world_size > 1 else {})


def uses_channels_last(recipe: Recipe, specs: Mapping[str, SourceSpec]) -> bool:
    """Returns the recipe's `channels_last`.

    The default is True for colour images, because their convolutions are faster then.
    """
    if recipe.channels_last is not None:
        return recipe.channels_last
    shapes = [shape for spec in specs.values() for shape, _ in spec.fields.values()]
    return any(len(shape) == 3 and shape[0] == 3 for shape in shapes)


def training_entries(stage: StageConfig, world_size: int) -> dict[str, Any]:
    """Returns the manifest entries of a stage: effective batch, learning rate, length, precision, BatchNorm mode."""
    sizes = {name: config.batch_size * world_size * stage.accumulate for name, config in stage.data.items()}
    return {
        "effective_batch": {name: size for name, size in sizes.items() if name not in ("eval", "validation")},
        "optimizer": stage.optimizer.type,
        "lr": stage.optimizer.params.get("lr"),
        "epochs": stage.epochs,
        "steps": stage.steps,
        "precision": stage.precision,
        "batchnorm": _batchnorm_text(stage, world_size),
    }


def _batchnorm_text(stage: StageConfig, world_size: int) -> str:
    if world_size == 1:
        return "statistics of the whole batch"
    if stage.sync_batchnorm:
        return f"statistics over all {world_size} ranks"
    return f"statistics per rank: each of {world_size} ranks normalises by its own rows"


def data_entries(
    recipe: Recipe, specs: Sequence[Mapping[str, SourceSpec]], data_checksums: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns the manifest entries of every source: dataset, split, samples, labelled fraction, checksum.

    Args:
        specs: for each stage, source -> description.
        data_checksums: return value of `dataset_checksums`.
    """
    return {
        f"{stage.name}.{name}": {
            "dataset": config.dataset.type,
            "split": config.split,
            "samples": stage_specs[name].samples,
            "labels": config.label_fraction,
            "checksum": data_checksums[f"{stage.name}.{name}"],
        }
        for stage, stage_specs in zip(recipe.stages, specs, strict=True)
        for name, config in stage.data.items()
    }


def source_entries(stage: StageConfig, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Returns the manifest entries `samples` and `checksum` of a stage's opened data sources.

    These entries of a source that reads an artifact are unknown until the artifact is built.
    """
    return {
        f"{stage.name}.{name}": {"samples": source.num_samples, "checksum": source.checksum}
        for name, source in sources.items()
        if name in stage.data
    }


def part_versions(recipe: Recipe) -> dict[str, int]:
    """Returns the versions of the models, terms and artifact builders in use.

    The author of a part (a model, a term, ...) raises its version when its mathematics changes.
    """
    parts = {}
    for stage in recipe.stages:
        for role in stage.roles.values():
            if role.model is not None:
                parts[f"model {role.model.type}"] = MODELS.entry(role.model.type).version
        for term in stage.terms.values():
            parts[f"term {term.type}"] = TERMS.entry(term.type).version
        parts |= artifact_versions(stage)
    return parts


def artifact_versions(stage: StageConfig) -> dict[str, int]:
    """Returns the versions of a stage's artifact builders and of their selectors."""
    parts = {}
    for artifact in stage.artifacts.values():
        entry = ARTIFACTS.entry(artifact.part.type)
        parts[f"artifact {entry.name}"] = entry.version
        selector = artifact.part.params.get(entry.facts.get("selector", ""))
        if selector:
            parts[f"selector {selector['type']}"] = SELECTORS.entry(selector["type"]).version
    return parts


def role_entries(
    plan: StagePlan, origins: Mapping[str, WeightsOrigin], frozen_scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the manifest entries of every role: model, size, mode, origin of the weights, scores of frozen roles.

    Args:
        frozen_scores: role -> metric -> value on the test split.
    """
    entries = {}
    for name, role in plan.roles.items():
        root = root_role(name, plan.stage.roles)
        origin = origins[root] if root == name else replace(origins[root], source=f"the network of role {root}")
        entries[name] = {
            "model": role.model,
            "parameters": role.parameters,
            "mode": role.config.mode,
            "weights": {"source": origin.source, "sha256": origin.sha256, "mismatches": origin.mismatches},
            **({"scores": frozen_scores[name]} if name in frozen_scores else {}),
        }
    return entries


def _file_hash(path: Path, location: Location) -> str:
    """Returns the SHA-256 of a file, or an empty string for a missing file, which is reported when it is loaded."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{location}: {path} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()
