"""Roles that follow others: moving averages, snapshots, and the moving average of the result."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kdbench.config.schema import RoleConfig
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan


class Averages:
    """What follows the moving roles of a stage, and belongs to no optimiser. At the start, all are copies.

    Args:
        plan: the rehearsed stage.
        network: its roles, with the weights that they start from.

    Attributes:
        average: the moving average of the exported role, when the recipe asks for one. It is no role of the network.
    """

    def __init__(self, plan: StagePlan, network: Network) -> None:
        self.stage, self.network = plan.stage, network
        roles = (self.stage.roles[name] for name in plan.resolved_stage.order)
        self.roles = [config for config in roles if config.mode in ("ema", "snapshot")]
        self.average = self._start_average(plan) if self.stage.ema is not None else None
        for config in self.roles:
            copy_state(*self._pair(config))

    def __bool__(self) -> bool:
        return bool(self.roles) or self.average is not None

    def update(self) -> None:
        """Moves the averages one step after the roles that they follow."""
        for config in self.roles:
            if config.mode == "ema":
                average_state(*self._pair(config), config.decay)
        if self.average is not None and self.stage.ema is not None:
            average_state(self.network.role(self.stage.export).model, self.average, self.stage.ema)

    def refresh_snapshots(self, step: int, steps_per_epoch: int) -> None:
        """Takes the snapshots anew that are due before a step."""
        for config in self.roles:
            if step and config.mode == "snapshot" and _is_due(config, step, steps_per_epoch):
                copy_state(*self._pair(config))

    def _pair(self, config: RoleConfig) -> tuple[nn.Module, nn.Module]:
        """The role that is followed, and the one that follows it."""
        assert config.source_role is not None
        return self.network.role(config.source_role).model, self.network.role(config.name).model

    def _start_average(self, plan: StagePlan) -> nn.Module:
        average = copy.deepcopy(self.network.role(self.stage.export).model)
        handles = [handle for name in plan.resolved_stage.order for handle in self.network.role(name).extractor.handles]
        for module in average.modules():  # the copy is evaluated whole: nothing is captured in it
            for handle in handles:
                module._forward_hooks.pop(handle.id, None)
                module._forward_pre_hooks.pop(handle.id, None)
        return average.requires_grad_(False).eval()


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers."""
    with torch.no_grad():
        for own, other in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            own.copy_(other)


def average_state(source: nn.Module, target: nn.Module, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source for real values; whole numbers are copied."""
    real: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for own, other in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            if own.is_floating_point():
                real[0].append(own)
                real[1].append(other)
            else:
                own.copy_(other)
        torch._foreach_lerp_(real[0], real[1], 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def _is_due(config: RoleConfig, step: int, steps_per_epoch: int) -> bool:
    """Whether a snapshot is taken anew before this step."""
    if config.every_steps:
        return step % config.every_steps == 0
    epoch, inside = divmod(step, steps_per_epoch)
    return bool(config.every_epochs) and inside == 0 and epoch % config.every_epochs == 0
