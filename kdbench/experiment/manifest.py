"""manifest.json: everything needed to trust and repeat a run, and none of what names the person or the machine."""

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
from kdbench.files import read_json, write_json
from kdbench.registry import ARTIFACTS, MODELS, SELECTORS, TERMS
from kdbench.run_folder import RUN_FORMAT

PACKAGES = ("kdbench", "torch", "torchvision", "numpy", "hydra-core", "omegaconf")


DETERMINISM_KEYS = ("device", "threads", "world_size", "versions", "frozen_forward")
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
        "command": shlex.join(command if command is not None else _command_line()),
        "device": device_name(device),
        "threads": _threads(),
        "world_size": world_size,
        "frozen_forward": f"{recipe.frozen_forward}, {recipe.frozen_batch_size} rows",
        "versions": package_versions(),
        "git": git_state(),
    }
    earlier = read_json(path) if path.exists() else {}
    sessions = earlier.get("sessions", [])
    write_json(
        path,
        {
            "format": RUN_FORMAT,
            "status": "running",
            "started": earlier.get("started", session["started"]),
            "finished": None,
            "identity": identity,
            "recipe": {
                "name": recipe.name,
                "title": recipe.title,
                "paper": recipe.paper,
                "methods": list(recipe.methods),
                "notes": None if recipe.notes is None else asdict(recipe.notes),
                "overrides": list(recipe.overrides),
                "choices": recipe.group_choices,
                "baseline": recipe.baseline,
                "dropped": list(recipe.baseline_removed),
            },
            "seed": recipe.seed,
            "training": training or {},
            "data": data or {},
            "roles": _merge(earlier.get("roles", {}), roles or {}),
            "artifacts": earlier.get("artifacts", {}),
            "frozen_forward": earlier.get("frozen_forward", {}),
            "parts": parts or {},
            "sessions": [*sessions, session],
        },
    )
    return _describe_changes(sessions[-1], session) if sessions else []


def amend_manifest(path: Path, changes: Mapping[str, Any]) -> None:
    """Merges facts that are known later, such as `{"roles": {"teacher": {"accuracy": {"test": 76.3}}}}`."""
    write_json(path, _merge(read_json(path), changes))


def amend_session(path: Path, changes: Mapping[str, Any]) -> None:
    """Merges facts about how the last session computes, such as `{"concurrent": {"label": "seed=2"}}`."""
    *earlier, last = read_json(path)["sessions"]
    amend_manifest(path, {"sessions": [*earlier, _merge(last, changes)]})


def finish_manifest(path: Path, status: Literal["finished", "failed"], reason: str = "") -> None:
    """Says how the run ended and when; `reason` is why it failed."""
    ended = {"status": status, "finished": _now() if status == "finished" else None}
    amend_manifest(path, {**ended, **({"reason": reason} if reason else {})})


def package_versions() -> dict[str, str]:
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


def _command_line() -> list[str]:
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


def _describe_changes(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    found = []
    for key in DETERMINISM_KEYS:
        old, new = previous.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted({*old, *new})
            found += [f"{n} was {old.get(n)}, is {new.get(n)}" for n in names if old.get(n) != new.get(n)]
        elif old != new and key in previous:
            found.append(f"{key.replace('_', ' ')} was {old}, is {new}")
    return [f"{text}: the run goes on, but not to the same bits." for text in found]


def dataset_checksums(recipe: Recipe) -> dict[str, str]:
    """The content of every source's dataset, as `stage.source` -> digest; empty for noise."""
    found = {}
    for stage in recipe.stages:
        for config in stage.data.values():
            dataset = open_dataset(config, recipe.data_root)
            with located_errors(config):
                digest = dataset.checksum() if hasattr(dataset, "checksum") else ""
            found[f"{stage.name}.{config.name}"] = digest
    return found


def external_identity(
    recipe: Recipe, data_checksums: Mapping[str, str], teacher_identities: Mapping[tuple[str, str], str], world_size: int
) -> dict[str, Any]:
    """What a run's identity covers besides its recipe.

    Args:
        data: of `checksums`.
        made: (stage, role) -> identity of the run whose student are the role's initial weights.
        world_size: how many processes share a batch; the batch grows with it.
    """
    facts: dict[str, Any] = {"data": dict(data_checksums)}
    facts |= {f"weights.{stage}.{role}": name for (stage, role), name in teacher_identities.items()}
    for stage in recipe.stages:
        for name, role in stage.roles.items():
            if role.weights is not None and role.weights.path is not None:
                facts[f"weights.{stage.name}.{name}"] = _file_hash(find_weights_file(role.weights, recipe))
        facts |= artifact_versions(stage)
    return facts | ({"world": world_size} if world_size > 1 else {})


def uses_channels_last(recipe: Recipe, specs: Mapping[str, SourceSpec]) -> bool:
    """channels_last where the recipe says so; by itself for colour images, where convolutions gain by it."""
    if recipe.channels_last is not None:
        return recipe.channels_last
    shapes = [shape for spec in specs.values() for shape, _ in spec.fields.values()]
    return any(len(shape) == 3 and shape[0] == 3 for shape in shapes)


def training_entries(stage: StageConfig, world_size: int) -> dict[str, Any]:
    """The effective batch and rate of a stage, and what BatchNorm normalises by."""
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
    """Dataset, split, samples, labels and digest of every source."""
    return {
        f"{stage.name}.{name}": {
            "dataset": config.dataset.type,
            "split": config.split,
            "samples": described[name].samples,
            "labels": config.label_fraction,
            "checksum": data_checksums[f"{stage.name}.{name}"],
        }
        for stage, described in zip(recipe.stages, specs, strict=True)
        for name, config in stage.data.items()
    }


def source_entries(stage: StageConfig, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """What is known of a stage's sources once they are open: of those that an earlier stage made, all that there is."""
    return {
        f"{stage.name}.{name}": {"samples": source.num_samples, "checksum": source.checksum}
        for name, source in sources.items()
        if name in stage.data
    }


def part_versions(recipe: Recipe) -> dict[str, int]:
    """The versions of the models and terms in use; their authors raise them when the maths changes."""
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
    """The versions of what makes a stage's things, and of the selectors that it uses."""
    parts = {}
    for make in stage.artifacts.values():
        entry = ARTIFACTS.entry(make.part.type)
        parts[f"maker {entry.name}"] = entry.version
        chooser = make.part.params.get(entry.facts.get("selector", ""))
        if chooser:
            parts[f"selector {chooser['type']}"] = SELECTORS.entry(chooser["type"]).version
    return parts


def role_entries(plan: StagePlan, origins: Mapping[str, WeightsOrigin], frozen_scores: Mapping[str, Any]) -> dict[str, Any]:
    """Model, size, weights and measured accuracy of every role."""
    facts = {}
    for name, role in plan.roles.items():
        root = root_role(name, plan.stage.roles)
        origin = origins[root] if root == name else replace(origins[root], source=f"the network of role {root}")
        facts[name] = {
            "model": role.model,
            "parameters": role.parameters,
            "mode": role.config.mode,
            "weights": {"source": origin.source, "sha256": origin.sha256, "unmatched": origin.mismatches},
            **({"accuracy": frozen_scores[name]} if name in frozen_scores else {}),
        }
    return facts


def _file_hash(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
