"""What happens to a model between its construction and its first step: weights, precision, layout, folding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.config.schema import Recipe, RoleConfig, StageConfig, WeightsConfig
from kdbench.engine.distributed.batchnorm import convert_sync_batchnorm
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import Feature
from kdbench.engine.network.roles import root_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.state.fold_batchnorm import fold_batchnorm
from kdbench.engine.state.weights import load_state, read_checkpoint, select_state, state_hash

PARAMETER_DTYPES = {"float64": torch.float64}


@dataclass
class WeightsOrigin:
    """Where a role's weights came from, for the manifest."""

    source: str = "initialised from the seed"
    sha256: str = ""
    mismatches: list[str] = field(default_factory=list)


@dataclass
class WeightLoader:
    """Prepares the models of one stage; `build_network` calls it for each role.

    artefacts: stage -> its checkpoint file. produced: role -> the checkpoint of the recipe that its weights name.
    kept: the weights of frozen roles that later stages start from, as they were loaded (before folding).
    """

    recipe: Recipe
    stage: StageConfig
    plan: StagePlan
    world: World
    stage_files: Mapping[str, Path]
    teacher_files: Mapping[str, Path]
    channels_last: bool = False
    notice: Callable[[str], None] = print
    origins: dict[str, WeightsOrigin] = field(default_factory=dict)
    frozen_states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, config: RoleConfig, model: nn.Module) -> nn.Module:
        origin = self.origins.setdefault(config.name, WeightsOrigin())
        if config.weights is not None:
            self._load(config, config.weights, model, origin)
        origin.sha256 = state_hash(model)
        if config.mode == "frozen" and config.name in roles_read_later(self.recipe, self.stage):
            self.frozen_states[config.name] = {name: value.clone() for name, value in model.state_dict().items()}
        dtype = PARAMETER_DTYPES.get(self.stage.precision, torch.float32)
        model = model.to(dtype)
        if config.mode == "frozen":
            model = model.eval()
            if not config.extra_inputs and not _has_state_operand(self.stage, config.name):
                example = torch.zeros(2, *self.plan.input_shape(config.name), dtype=dtype)
                model, _ = fold_batchnorm(model, example, _captured_features(self.stage, self.plan, config.name))
        elif self.stage.sync_batchnorm:
            model = convert_sync_batchnorm(model, self.world)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def _load(self, config: RoleConfig, weights: WeightsConfig, model: nn.Module, origin: WeightsOrigin) -> None:
        roles: tuple[str, ...] = ()
        if weights.recipe is not None:
            file, origin.source = self.teacher_files[config.name], f"recipe {weights.recipe}"
        elif weights.stage is not None:
            file, origin.source = self.stage_files[weights.stage], f"stage {weights.stage}"
            roles = (config.name,)
        else:
            assert weights.path is not None
            file, origin.source = find_weights_file(weights, self.recipe), str(weights.path)
        if weights.role:
            origin.source += f", {'mean of ' if len(weights.role) > 1 else ''}{' and '.join(weights.role)}"
        content = read_checkpoint(file, weights.location)
        state = select_state(content, weights, file, roles, use_effective=not config.transforms)
        origin.mismatches = load_state(model, state, f"{weights.location}: {file}", strict=weights.strict)
        for fault in origin.mismatches:
            self.notice(f"role {config.name!r}: {fault}")


def find_weights_file(weights: WeightsConfig, recipe: Recipe) -> Path:
    """The file of `weights: {path: ...}`, from the working directory or else from the recipe's folder."""
    assert weights.path is not None
    file = Path(weights.path).expanduser()
    beside = Path(recipe.path).parent / file
    return beside if not file.exists() and beside.exists() else file


def _captured_features(stage: StageConfig, plan: StagePlan, name: str) -> list[Feature]:
    """The values inside a network that folding must leave as they are.

    Those that are captured in it, and what comes out of, or is captured in, a part of it that is a role of its own: a
    convolution alone must not answer for the BatchNorm behind it.
    """
    found = list(plan.resolved_stage.features[name])
    for other, config in stage.roles.items():
        if config.mode == "reuse" and config.source_role == name:
            prefix = f"{config.module_path}." if config.module_path else ""
            inner = [f._replace(path=prefix + f.path) for f in plan.resolved_stage.features[other] if not f.is_output]
            found += inner + ([Feature(config.module_path)] if config.module_path else [])
    return found


def _has_state_operand(stage: StageConfig, name: str) -> bool:
    """Whether something is read off a role's own modules, such as the statistics of a BatchNorm: they must stay."""
    return any(o.kind == "role" and o.is_state and root_role(o.role, stage.roles) == name for o in stage.read_operands())


def roles_read_later(recipe: Recipe, stage: StageConfig) -> set[str]:
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


def collect_stage_weights(
    recipe: Recipe,
    stage: StageConfig,
    trained_states: Mapping[str, Mapping[str, Tensor]],
    frozen_states: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Mapping[str, Tensor]]:
    """The weights that a stage leaves: of every role that moved, and of each other one that a later stage reads.

    Args:
        moved: the runner's own. kept: those of frozen roles, as they were loaded.
    """
    states = {**frozen_states, **trained_states}
    for name in roles_read_later(recipe, stage):
        role, part = stage.roles.get(name), ""
        while role is not None and role.name not in states and role.mode == "reuse" and role.source_role is not None:
            part = f"{role.module_path}.{part}" if role.module_path else part
            role = stage.roles.get(role.source_role)
        if role is not None and role.name in states and name not in states:
            whole = states[role.name]
            states[name] = {key[len(part) :]: value for key, value in whole.items() if key.startswith(part)}
    return states
