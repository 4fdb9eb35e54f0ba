"""Preparation of a model before its first step: initial weights, dtype, memory format, folded BatchNorm."""

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
    """Origin of the initial weights of a role (network), which the run's manifest records.

    Attributes:
        source: description of the recipe, training stage or file that the weights come from.
        sha256: hash of the loaded weights (`state_hash`).
        mismatches: messages about entries that do not match the model and were not loaded (only with `strict:
            false`).
    """

    source: str = "initialised from the seed"
    sha256: str = ""
    mismatches: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunFile:
    """Path of a model file, and the identity of the run that wrote the file."""

    path: Path
    identity: str


@dataclass
class WeightLoader:
    """Callable that loads and converts the models of one stage; `build_network` calls it for each role (network).

    Args:
        recipe: the recipe.
        stage: the training stage.
        plan: plan of the stage (shapes and features of its networks).
        world: the process group.
        stage_files: earlier stage -> the model file that the stage wrote at its end.
        teacher_files: role -> model file of the run that trained the role's weights, for roles with the key
            `weights: {recipe: ...}`.
        channels_last: True converts models to the channels_last memory format.
        notice: function that receives messages for the user.

    Attributes:
        origins: role -> origin of its weights.
        frozen_states: role -> loaded state dict before BatchNorm folding, for frozen roles that later stages load.
    """

    recipe: Recipe
    stage: StageConfig
    plan: StagePlan
    world: World
    stage_files: Mapping[str, RunFile]
    teacher_files: Mapping[str, RunFile]
    channels_last: bool = False
    notice: Callable[[str], None] = print
    origins: dict[str, WeightsOrigin] = field(default_factory=dict)
    frozen_states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, config: RoleConfig, model: nn.Module) -> nn.Module:
        """Loads the initial weights of a role (network) into its model, and returns the model ready for training.

        The model is converted to the dtype and memory format of the stage. In a frozen model, BatchNorm is folded.

        Raises:
            CheckpointError: the weights cannot be read or do not match the model.
        """
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
                model, _ = fold_batchnorm(model, example, _features_to_preserve(self.stage, self.plan, config.name))
        elif self.stage.sync_batchnorm:
            model = convert_sync_batchnorm(model, self.world)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def _load(self, config: RoleConfig, weights: WeightsConfig, model: nn.Module, origin: WeightsOrigin) -> None:
        default_roles: tuple[str, ...] = ()
        identity = None
        if weights.recipe is not None:
            run_file = self.teacher_files[config.name]
            file, identity, origin.source = run_file.path, run_file.identity, f"recipe {weights.recipe}"
        elif weights.stage is not None:
            run_file = self.stage_files[weights.stage]
            file, identity, origin.source = run_file.path, run_file.identity, f"stage {weights.stage}"
            default_roles = (config.name,)
        else:
            assert weights.path is not None
            file, origin.source = find_weights_file(weights, self.recipe), str(weights.path)
        if weights.role:
            origin.source += f", {'mean of ' if len(weights.role) > 1 else ''}{' and '.join(weights.role)}"
        content = read_checkpoint(file, weights.location)
        state = select_state(
            content, weights, file, default_roles, use_effective=not config.transforms, identity=identity
        )
        origin.mismatches = load_state(model, state, f"{weights.location}: {file}", strict=weights.strict)
        for message in origin.mismatches:
            self.notice(f"role {config.name!r}: its weights do not match the model: {message}")


def find_weights_file(weights: WeightsConfig, recipe: Recipe) -> Path:
    """Returns the file that the recipe key `weights: {path: ...}` names.

    A relative path is searched in the working directory, then in the folder of the recipe.
    """
    assert weights.path is not None
    file = Path(weights.path).expanduser()
    beside_recipe = Path(recipe.path).parent / file
    return beside_recipe if not file.exists() and beside_recipe.exists() else file


def _features_to_preserve(stage: StageConfig, plan: StagePlan, name: str) -> list[Feature]:
    """Lists the features of a role (network) whose values BatchNorm folding must not change.

    The list contains the extracted features of the role. If a second role reuses a module of this role (`reuse`), the
    list also contains the output of the module and the features of the second role. Otherwise, folding could move a
    BatchNorm after the module into the module, which would change the second role.
    """
    features = list(plan.resolved_stage.features[name])
    for other_name, config in stage.roles.items():
        if config.mode == "reuse" and config.source_role == name:
            prefix = f"{config.module_path}." if config.module_path else ""
            role_features = plan.resolved_stage.features[other_name]
            features += [f._replace(path=prefix + f.path) for f in role_features if not f.is_output]
            features += [Feature(config.module_path)] if config.module_path else []
    return features


def _has_state_operand(stage: StageConfig, name: str) -> bool:
    """Returns True if a loss term or artifact reads a role's weights or BatchNorm statistics, which folding removes."""
    return any(
        operand.kind == "role" and operand.is_state and root_role(operand.role, stage.roles) == name
        for operand in stage.read_operands()
    )


def roles_read_later(recipe: Recipe, stage: StageConfig) -> set[str]:
    """Returns the names of the roles (networks) of a training stage whose weights later stages load.

    If such a role reuses a module of a second role (`reuse`), the set contains the second role too.
    """
    names: set[str] = set()
    for later_stage in recipe.stages:
        for role in later_stage.roles.values():
            if role.weights is not None and role.weights.stage == stage.name:
                names |= set(role.weights.role or (role.name,))
    for name in list(names):
        while (role := stage.roles.get(name)) is not None and role.mode == "reuse" and role.source_role is not None:
            name = role.source_role
            names.add(name)
    return names


def collect_stage_weights(
    recipe: Recipe,
    stage: StageConfig,
    trained_states: Mapping[str, Mapping[str, Tensor]],
    frozen_states: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Mapping[str, Tensor]]:
    """Collects the weights of a training stage: of trained roles, and of frozen roles that later stages load.

    Args:
        recipe: the recipe.
        stage: the stage.
        trained_states: role (name of a network) -> state dict, for trained roles.
        frozen_states: role -> loaded state dict before BatchNorm folding, for frozen roles.

    Returns:
        Role -> state dict.
    """
    states = {**frozen_states, **trained_states}
    for name in roles_read_later(recipe, stage):
        role, prefix = stage.roles.get(name), ""
        # A `reuse` role has no state of its own: cut it out of the state of its source role.
        while role is not None and role.name not in states and role.mode == "reuse" and role.source_role is not None:
            prefix = f"{role.module_path}.{prefix}" if role.module_path else prefix
            role = stage.roles.get(role.source_role)
        if role is not None and role.name in states and name not in states:
            source_state = states[role.name]
            states[name] = {key[len(prefix) :]: value for key, value in source_state.items() if key.startswith(prefix)}
    return states
