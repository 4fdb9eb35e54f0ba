"""A named network inside a step: how it lives, what it sees, and what is captured in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from kdbench.config.schema import InnerStepConfig, RoleConfig, UpdateConfig
from kdbench.engine.distributed.batchnorm import SyncBatchNorm
from kdbench.engine.network.features import Feature, FeatureExtractor, find_module


class Role(nn.Module):
    """A named network, and what is captured inside it.

    A frozen role stays in eval mode whatever anyone calls, so that its statistics and its dropout never move.

    Args:
        root: the role whose network, or a part of it, this role is too (`reuse`); it owns parameters and mode.
    """

    def __init__(
        self,
        config: RoleConfig,
        model: nn.Module,
        features: Iterable[Feature],
        overwritten: frozenset[Feature] = frozenset(),
        root: Role | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.trainable: bool = root.trainable if root is not None else config.mode == "trainable"
        if root is None:
            for parameter in model.parameters():
                parameter.requires_grad_(self.trainable and parameter.requires_grad)
        self.frozen = [find_module(model, path, config.location)[1] for path in config.freeze]
        for module in self.frozen:
            module.requires_grad_(False)
        self.eval_modules = root.frozen if root is not None else self.frozen
        self.sync_batchnorms = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
        self.extractor = FeatureExtractor(model, features, overwritten=overwritten, stop=True)
        self.features: tuple[Feature, ...] = self.extractor.features
        self.train(self.trainable)

    def train(self, mode: bool = True) -> Role:
        super().train(mode and self.trainable)
        for module in self.eval_modules:
            module.eval()
        return self

    def forward(self, *inputs: Tensor) -> dict[Feature, Tensor]:
        return self.extractor(*inputs)


def input_addresses(config: RoleConfig) -> tuple[str, ...]:
    """The addresses of everything that a role sees."""
    return (config.input, *config.extra_inputs)


def upstream_role(config: RoleConfig) -> str | None:
    """The role whose output a role sees first, or None when it sees a field of a source."""
    return config.input.split(":", 1)[0] if ":" in config.input else None


def parse_role_input(address: str) -> tuple[str, Feature]:
    """The role and the feature that a `ROLE:PATH` input names."""
    role, path = address.split(":", 1)
    return role, Feature(path or "logits")


def root_role(name: str, roles: Mapping[str, RoleConfig]) -> str:
    """The role that owns a role's network: itself, or what it is the `reuse` as."""
    while roles[name].mode == "reuse":
        name = roles[name].source_role or ""
    return name


def updated_roles(update: UpdateConfig | InnerStepConfig, roles: Mapping[str, RoleConfig]) -> tuple[str, ...]:
    """The roles whose own parameters a move moves."""
    return tuple(dict.fromkeys(root_role(name, roles) for name in update.models))
