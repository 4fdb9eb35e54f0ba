"""What happens to a model between its construction and its first step: weights, precision, layout, folding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.config.schema import Recipe, RoleConfig, StageConfig, Weights
from kdbench.engine.distributed import World, synchronise_batchnorm
from kdbench.engine.fold import fold_batchnorm
from kdbench.engine.plan import StagePlan
from kdbench.engine.weights import load_state, read_checkpoint, select_state, state_hash
from kdbench.errors import CheckpointError

DTYPES = {"float64": torch.float64}


@dataclass
class Origin:
    """Where a role's weights came from, for the manifest."""

    source: str = "initialised from the seed"
    sha256: str = ""
    unmatched: list[str] = field(default_factory=list)


@dataclass
class Preparation:
    """Prepares the models of one stage; `build_network` calls it for each role.

    artefacts: stage -> its checkpoint file. produced: role -> the checkpoint of the recipe that its weights name.
    """

    recipe: Recipe
    stage: StageConfig
    plan: StagePlan
    world: World
    artefacts: Mapping[str, Path]
    produced: Mapping[str, Path]
    channels_last: bool = False
    say: Callable[[str], None] = print
    origins: dict[str, Origin] = field(default_factory=dict)

    def __call__(self, config: RoleConfig, model: nn.Module) -> nn.Module:
        origin = self.origins.setdefault(config.name, Origin())
        if config.weights is not None:
            self._load(config, config.weights, model, origin)
        origin.sha256 = state_hash(model)
        dtype = DTYPES.get(self.stage.precision, torch.float32)
        model = model.to(dtype)
        if config.mode == "frozen":
            example = torch.zeros(2, *self.plan.input_shape(config.name), dtype=dtype)
            model, _ = fold_batchnorm(model.eval(), example, self.plan.layout.features[config.name])
        elif self.stage.sync_batchnorm:
            model = synchronise_batchnorm(model, self.world)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def _load(self, config: RoleConfig, weights: Weights, model: nn.Module, origin: Origin) -> None:
        if weights.recipe is not None:
            file, origin.source = self.produced[config.name], f"recipe {weights.recipe}"
            state = _entry(read_checkpoint(file), None, file, config)
        elif weights.stage is not None:
            file, origin.source = self.artefacts[weights.stage], f"stage {weights.stage}"
            state = _entry(read_checkpoint(file, weights.place), weights.role or config.name, file, config)
        else:
            assert weights.path is not None
            file, origin.source = weights_file(weights, self.recipe), str(weights.path)
            state = select_state(read_checkpoint(file, weights.place), weights, file)
        origin.unmatched = load_state(model, state, f"{weights.place}: {file}", strict=weights.strict)
        for fault in origin.unmatched:
            self.say(f"role {config.name!r}: {fault}")


def weights_file(weights: Weights, recipe: Recipe) -> Path:
    """The file of `weights: {path: ...}`, from the working directory or else from the recipe's folder."""
    assert weights.path is not None
    file = Path(weights.path).expanduser()
    beside = Path(recipe.path).parent / file
    return beside if not file.exists() and beside.exists() else file


def _entry(tree: dict, role: str | None, file: Path, config: RoleConfig) -> dict[str, Tensor]:  # type: ignore[type-arg]
    name = role or tree["export"]
    if name not in tree["models"]:
        known = ", ".join(tree["models"])
        raise CheckpointError(f"{config.place}: {file} holds no role {name!r}; it holds {known}")
    return tree["models"][name]
