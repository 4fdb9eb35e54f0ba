"""Roles: the named networks of a stage (such as student and teacher), with their extracted features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from kdbench.config.schema import InnerStepConfig, RoleConfig, UpdateConfig
from kdbench.engine.distributed.batchnorm import SyncBatchNorm
from kdbench.engine.network.features import Feature, FeatureExtractor, find_module


class Role(nn.Module):
    """A named network with its feature extractor.

    A frozen role stays in eval mode even after `train()`, so that its BatchNorm statistics do not change and its
    dropout is off.

    Args:
        config: the role's configuration.
        model: the role's network.
        features: features to extract.
        overwritten: features that a later in-place operation overwrites. They are cloned.
        root: for a role with `reuse:`, the role that owns the shared network and determines its mode (train or eval);
            None for any other role.

    Attributes:
        trainable: whether an update may train the role.
        frozen_modules: modules that `freeze:` names. Their parameters and BatchNorm statistics do not change.
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
        # A plain list: as submodules these would appear twice among the role's parameters.
        self.frozen_modules = [find_module(model, path, config.location)[1] for path in config.freeze]
        for module in self.frozen_modules:
            module.requires_grad_(False)
        self.eval_modules = root.frozen_modules if root is not None else self.frozen_modules
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
        """Runs the network up to the last feature that is extracted. Returns feature -> tensor."""
        return self.extractor(*inputs)


def input_addresses(config: RoleConfig) -> tuple[str, ...]:
    """Returns the addresses of all inputs of a role: `SOURCE.FIELD` or `ROLE:PATH`."""
    return (config.input, *config.extra_inputs)


def upstream_role(config: RoleConfig) -> str | None:
    """Returns the role whose output is the first input of the given role.

    Returns None if the first input is a field of a source, such as the image.
    """
    return config.input.split(":", 1)[0] if ":" in config.input else None


def parse_role_input(address: str) -> tuple[str, Feature]:
    """Returns the role and the feature that an input `ROLE:PATH` names."""
    role, path = address.split(":", 1)
    return role, Feature(path or "logits")


def root_role(name: str, roles: Mapping[str, RoleConfig]) -> str:
    """Returns the role that owns the network of the given role: the role itself, or the role that `reuse:` names."""
    while roles[name].mode == "reuse":
        name = roles[name].source_role or ""
    return name


def updated_roles(update: UpdateConfig | InnerStepConfig, roles: Mapping[str, RoleConfig]) -> tuple[str, ...]:
    """Returns the names of the roles that own the parameters of an update.

    For a role with `reuse:`, this is the role whose network it shares.
    """
    return tuple(dict.fromkeys(root_role(name, roles) for name in update.models))
