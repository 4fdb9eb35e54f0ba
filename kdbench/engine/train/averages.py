"""Moving averages and snapshots of roles, and the moving average of the exported role."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kdbench.config.schema import RoleConfig
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan


class Averages:
    """The averaged copies (EMA) and snapshots of a stage's roles, that is, of its named networks.

    Each average or snapshot begins as a copy of a role, then follows that role. It has no optimizer.

    Args:
        plan: the checked plan of the stage.
        network: the stage's roles with their initial weights.

    Attributes:
        average: the moving average of the exported role, which is not a role of the network; None without `ema:`.
    """

    def __init__(self, plan: StagePlan, network: Network) -> None:
        self.stage, self.network = plan.stage, network
        roles = (self.stage.roles[name] for name in plan.resolved_stage.order)
        self.roles = [config for config in roles if config.mode in ("ema", "snapshot")]
        self.average = self._copy_exported(plan) if self.stage.ema is not None else None
        for config in self.roles:
            copy_state(*self._source_and_target(config))

    def __bool__(self) -> bool:
        return bool(self.roles) or self.average is not None

    def update(self) -> None:
        """Updates every moving average by one step towards the role that it follows."""
        for config in self.roles:
            if config.mode == "ema":
                average_state(*self._source_and_target(config), config.decay)
        if self.average is not None and self.stage.ema is not None:
            average_state(self.network.role(self.stage.export).model, self.average, self.stage.ema)

    def refresh_snapshots(self, step: int, steps_per_epoch: int) -> None:
        """Replaces each snapshot that is due before the given step by a copy of its role.

        Args:
            step: number of completed steps of the stage.
        """
        for config in self.roles:
            if step and config.mode == "snapshot" and _is_due(config, step, steps_per_epoch):
                copy_state(*self._source_and_target(config))

    def _source_and_target(self, config: RoleConfig) -> tuple[nn.Module, nn.Module]:
        assert config.source_role is not None
        return self.network.role(config.source_role).model, self.network.role(config.name).model

    def _copy_exported(self, plan: StagePlan) -> nn.Module:
        average = copy.deepcopy(self.network.role(self.stage.export).model)
        handles = [handle for name in plan.resolved_stage.order for handle in self.network.role(name).extractor.handles]
        for module in average.modules():  # the copy is evaluated as a whole, so the copied hooks have no use
            for handle in handles:
                module._forward_hooks.pop(handle.id, None)
                module._forward_pre_hooks.pop(handle.id, None)
        return average.requires_grad_(False).eval()


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Copies all parameters and buffers of module `source` into module `target`."""
    with torch.no_grad():
        for value, new_value in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            value.copy_(new_value)


def average_state(source: nn.Module, target: nn.Module, decay: float) -> None:
    """Sets `target` to decay * target + (1 - decay) * source for floating-point values; copies integers."""
    averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for value, new_value in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            if value.is_floating_point():
                averaged[0].append(value)
                averaged[1].append(new_value)
            else:
                value.copy_(new_value)
        torch._foreach_lerp_(averaged[0], averaged[1], 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def _is_due(config: RoleConfig, step: int, steps_per_epoch: int) -> bool:
    """Returns whether a snapshot is replaced before the given step."""
    if config.every_steps:
        return step % config.every_steps == 0
    epoch, remainder = divmod(step, steps_per_epoch)
    return bool(config.every_epochs) and remainder == 0 and epoch % config.every_epochs == 0
