"""What the manifest says of a run, and what its results depend on besides the recipe's words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdbench.config.schema import Recipe, StageConfig
from kdbench.data.base import SourceSpec, open_dataset, placed
from kdbench.data.source import Source
from kdbench.engine.plan import StagePlan
from kdbench.engine.prepare import Origin, weights_file
from kdbench.engine.roles import root_of
from kdbench.registry import MAKERS, MODELS, SELECTORS, TERMS


def checksums(recipe: Recipe) -> dict[str, str]:
    """The content of every source's dataset, as `stage.source` -> digest; empty for noise."""
    found = {}
    for stage in recipe.stages:
        for config in stage.data.values():
            dataset = open_dataset(config, recipe.data_root)
            with placed(config):
                digest = dataset.checksum() if hasattr(dataset, "checksum") else ""
            found[f"{stage.name}.{config.name}"] = digest
    return found


def outside_facts(
    recipe: Recipe, data: Mapping[str, str], made: Mapping[tuple[str, str], str], world_size: int
) -> dict[str, Any]:
    """What a run's identity covers besides its recipe.

    Args:
        data: of `checksums`.
        made: (stage, role) -> identity of the run whose student are the role's initial weights.
        world_size: how many processes share a batch; the batch grows with it.
    """
    facts: dict[str, Any] = {"data": dict(data)}
    facts |= {f"weights.{stage}.{role}": name for (stage, role), name in made.items()}
    for stage in recipe.stages:
        for name, role in stage.roles.items():
            if role.weights is not None and role.weights.path is not None:
                facts[f"weights.{stage.name}.{name}"] = _file_hash(weights_file(role.weights, recipe))
        facts |= maker_versions(stage)
    return facts | ({"world": world_size} if world_size > 1 else {})


def uses_channels_last(recipe: Recipe, specs: Mapping[str, SourceSpec]) -> bool:
    """channels_last where the recipe says so; by itself for colour images, where convolutions gain by it."""
    if recipe.channels_last is not None:
        return recipe.channels_last
    shapes = [shape for spec in specs.values() for shape, _ in spec.fields.values()]
    return any(len(shape) == 3 and shape[0] == 3 for shape in shapes)


def training_facts(stage: StageConfig, world_size: int) -> dict[str, Any]:
    """The effective batch and rate of a stage, and what BatchNorm normalises by."""
    sizes = {name: config.batch_size * world_size * stage.accumulate for name, config in stage.data.items()}
    return {
        "effective_batch": {name: size for name, size in sizes.items() if name not in ("eval", "validation")},
        "optimizer": stage.optimizer.type,
        "lr": stage.optimizer.params.get("lr"),
        "epochs": stage.epochs,
        "steps": stage.steps,
        "precision": stage.precision,
        "batchnorm": _batchnorm_words(stage, world_size),
    }


def _batchnorm_words(stage: StageConfig, world_size: int) -> str:
    if world_size == 1:
        return "statistics of the whole batch"
    if stage.sync_batchnorm:
        return f"statistics over all {world_size} ranks"
    return f"statistics per rank: each of {world_size} ranks normalises by its own rows"


def data_facts(
    recipe: Recipe, specs: Sequence[Mapping[str, SourceSpec]], data: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Dataset, split, samples, labels and digest of every source."""
    return {
        f"{stage.name}.{name}": {
            "dataset": config.dataset.type,
            "split": config.split,
            "samples": described[name].samples,
            "labels": config.labels,
            "checksum": data[f"{stage.name}.{name}"],
        }
        for stage, described in zip(recipe.stages, specs, strict=True)
        for name, config in stage.data.items()
    }


def source_facts(stage: StageConfig, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
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
        parts |= maker_versions(stage)
    return parts


def maker_versions(stage: StageConfig) -> dict[str, int]:
    """The versions of what makes a stage's things, and of the selectors that it uses."""
    parts = {}
    for make in stage.make.values():
        entry = MAKERS.entry(make.part.type)
        parts[f"maker {entry.name}"] = entry.version
        chooser = make.part.params.get(entry.facts.get("selects", ""))
        if chooser:
            parts[f"selector {chooser['type']}"] = SELECTORS.entry(chooser["type"]).version
    return parts


def role_facts(plan: StagePlan, origins: Mapping[str, Origin], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Model, size, weights and measured accuracy of every role."""
    facts = {}
    for name, role in plan.roles.items():
        root = root_of(name, plan.stage.roles)
        origin = origins[root] if root == name else replace(origins[root], source=f"the network of role {root}")
        facts[name] = {
            "model": role.model,
            "parameters": role.parameters,
            "mode": role.config.mode,
            "weights": {"source": origin.source, "sha256": origin.sha256, "unmatched": origin.unmatched},
            **({"accuracy": measured[name]} if name in measured else {}),
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
