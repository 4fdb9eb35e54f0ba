"""What happens to a model between its construction and its first step: weights, precision, layout, folding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.config.schema import Recipe, RoleConfig, StageConfig, WeightsConfig
from kdbench.engine.distributed.batchnorm import synchronise_batchnorm
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import Feature
from kdbench.engine.network.roles import root_of
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.fold_batchnorm import fold_batchnorm
from kdbench.engine.state.weights import load_state, read_checkpoint, select_state, state_hash

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
    kept: the weights of frozen roles that later stages start from, as they were loaded (before folding).
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
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, config: RoleConfig, model: nn.Module) -> nn.Module:
        origin = self.origins.setdefault(config.name, Origin())
        if config.weights is not None:
            self._load(config, config.weights, model, origin)
        origin.sha256 = state_hash(model)
        if config.mode == "frozen" and config.name in read_later(self.recipe, self.stage):
            self.kept[config.name] = {name: value.clone() for name, value in model.state_dict().items()}
        dtype = DTYPES.get(self.stage.precision, torch.float32)
        model = model.to(dtype)
        if config.mode == "frozen":
            model = model.eval()
            if not config.extra_inputs and not _reads_state(self.stage, config.name):
                example = torch.zeros(2, *self.plan.input_shape(config.name), dtype=dtype)
                model, _ = fold_batchnorm(model, example, _seen(self.stage, self.plan, config.name))
        elif self.stage.sync_batchnorm:
            model = synchronise_batchnorm(model, self.world)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def _load(self, config: RoleConfig, weights: WeightsConfig, model: nn.Module, origin: Origin) -> None:
        roles: tuple[str, ...] = ()
        if weights.recipe is not None:
            file, origin.source = self.produced[config.name], f"recipe {weights.recipe}"
        elif weights.stage is not None:
            file, origin.source = self.artefacts[weights.stage], f"stage {weights.stage}"
            roles = (config.name,)
        else:
            assert weights.path is not None
            file, origin.source = weights_file(weights, self.recipe), str(weights.path)
        if weights.role:
            origin.source += f", {'mean of ' if len(weights.role) > 1 else ''}{' and '.join(weights.role)}"
        content = read_checkpoint(file, weights.location)
        state = select_state(content, weights, file, roles, baked=not config.transforms)
        origin.unmatched = load_state(model, state, f"{weights.location}: {file}", strict=weights.strict)
        for fault in origin.unmatched:
            self.say(f"role {config.name!r}: {fault}")


def weights_file(weights: WeightsConfig, recipe: Recipe) -> Path:
    """The file of `weights: {path: ...}`, from the working directory or else from the recipe's folder."""
    assert weights.path is not None
    file = Path(weights.path).expanduser()
    beside = Path(recipe.path).parent / file
    return beside if not file.exists() and beside.exists() else file


def _seen(stage: StageConfig, plan: StagePlan, name: str) -> list[Feature]:
    """The values inside a network that folding must leave as they are.

    Those that are captured in it, and what comes out of, or is captured in, a part of it that is a role of its own: a
    convolution alone must not answer for the BatchNorm behind it.
    """
    found = list(plan.layout.features[name])
    for other, config in stage.roles.items():
        if config.mode == "reuse" and config.source_role == name:
            prefix = f"{config.module_path}." if config.module_path else ""
            inner = [f._replace(path=prefix + f.path) for f in plan.layout.features[other] if not f.is_output]
            found += inner + ([Feature(config.module_path)] if config.module_path else [])
    return found


def _reads_state(stage: StageConfig, name: str) -> bool:
    """Whether something is read off a role's own modules, such as the statistics of a BatchNorm: they must stay."""
    return any(o.kind == "role" and o.is_state and root_of(o.role, stage.roles) == name for o in stage.read_operands())


def read_later(recipe: Recipe, stage: StageConfig) -> set[str]:
    """The roles of a stage whose weights a later stage starts from, and the roles that those are part of."""
    found = set()
    for later in recipe.stages:
        for role in later.roles.values():
            if role.weights is not None and role.weights.stage == stage.name:
                found |= set(role.weights.role or (role.name,))
    for name in list(found):
        while (role := stage.roles.get(name)) is not None and role.mode == "reuse" and role.source_role is not None:
            name = role.source_role
            found.add(name)
    return found


def handed_on(
    recipe: Recipe,
    stage: StageConfig,
    moved: Mapping[str, Mapping[str, Tensor]],
    kept: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Mapping[str, Tensor]]:
    """The weights that a stage leaves: of every role that moved, and of each other one that a later stage reads.

    Args:
        moved: the runner's own. kept: those of frozen roles, as they were loaded.
    """
    states = {**kept, **moved}
    for name in read_later(recipe, stage):
        role, part = stage.roles.get(name), ""
        while role is not None and role.name not in states and role.mode == "reuse" and role.source_role is not None:
            part = f"{role.module_path}.{part}" if role.module_path else part
            role = stage.roles.get(role.source_role)
        if role is not None and role.name in states and name not in states:
            whole = states[role.name]
            states[name] = {key[len(part) :]: value for key, value in whole.items() if key.startswith(part)}
    return states
