"""All roles and terms of a stage as one module: a batch in, one reduced loss per term out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kdbench.config.parse.roles import upstream_closure
from kdbench.config.schema import InnerStepConfig, OperandConfig, RoleConfig, UpdateConfig
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import module_state
from kdbench.engine.network.operands import Batch, OperandReader, Values, given_key, operand_feature
from kdbench.engine.network.roles import Role, input_addresses, parse_role_input, root_role, updated_roles
from kdbench.engine.network.terms import Count, TermGroup


class NamedModules(nn.ModuleDict):
    """A ModuleDict whose names may be any: a term called `forward` is no method of it."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Network(nn.Module):
    """The roles and terms of a stage, wired.

    Args:
        roles: in an order in which each role's input is there when it runs.
        terms: by name; those of constant weight 0 are left out by the plan.
        sources: which source's fields go with each role (the one at the root of its input).
        world: this process among all.
        observers: what selectors and makers read of a batch, by who reads (`make.NAME`, `select.N`) and operand.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        terms: Mapping[str, TermGroup],
        sources: Mapping[str, str],
        world: World = World(),  # noqa: B008
        observers: Mapping[str, Mapping[str, OperandReader]] | None = None,
    ) -> None:
        super().__init__()
        self.roles = NamedModules(roles)
        self.terms = NamedModules(terms)
        self.sources = dict(sources)
        self.world = world
        self.observers = {owner: NamedModules(readers) for owner, readers in (observers or {}).items()}
        self.configs: dict[str, RoleConfig] = {name: role.config for name, role in roles.items()}
        self.sharded: tuple[str, ...] = ()  # the roles that lie in parts (kdbench.engine.distributed.sharding)
        self.lap: Callable[[str], None] | None = None  # set by the runner where it times the parts of a step

    def role(self, name: str) -> Role:
        role = self.roles[name]
        assert isinstance(role, Role)
        return role

    def term(self, name: str) -> TermGroup:
        term = self.terms[name]
        assert isinstance(term, TermGroup)
        return term

    def required_roles(self, terms: Iterable[str]) -> set[str]:
        """The roles that must run for these terms, those upstream included."""
        return self.roles_for(operand for name in terms for operand in self.term(name).config.read_operands())

    def candidate_parameters(self, move: UpdateConfig | InnerStepConfig) -> dict[str, nn.Parameter]:
        """The parameters that a move could reach, by name: those of its roles, and those of its terms."""
        roles = updated_roles(move, self.configs)
        found = {f"{role}.{n}": p for role in roles for n, p in self.role(role).model.named_parameters()}
        return found | {f"terms.{t}.{n}": p for t in move.terms for n, p in self.term(t).named_parameters()}

    def roles_for(self, operands: Iterable[OperandConfig]) -> set[str]:
        """The roles that must run so that these operands can be read."""
        return roles_for_operands(operands, self.configs)

    def valid_counts(self, window: Sequence[Batch], terms: Iterable[str]) -> dict[str, Count]:
        """What each term's sum is divided by over one effective batch."""
        groups = {name: self.term(name) for name in terms}
        return {n: group.count([batch[group.source] for batch in window], self.world) for n, group in groups.items()}

    def run_roles(self, batch: Batch, terms: Iterable[str], moving: Iterable[str]) -> Values:
        """Runs each role that these terms need once."""
        return self._run(batch, self.required_roles(terms), moving)

    @torch.no_grad()
    def run_frozen(self, batch: Batch, names: Iterable[str]) -> Values:
        """Runs roles of which none moves, and nothing upstream of them; the batch has the fields that they see."""
        return self._run(batch, upstream_closure(names, self.configs), ())

    def _run(self, batch: Batch, needed: set[str], moving: Iterable[str]) -> Values:
        """Runs each needed role once, unless the batch has what it gives.

        Without gradient where nothing that moves is the role or stands upstream.
        """
        moving = set(moving)
        with_gradient: set[str] = set()
        values: Values = {}
        for name in self.roles:
            if name not in needed:
                continue
            role = self.role(name)
            config = role.config
            if root_role(name, self.configs) in moving or not with_gradient.isdisjoint(config.upstream_roles):
                with_gradient.add(name)
            fields = batch[self.sources[name]]
            if role.features and given_key(name, role.features[0]) in fields:
                values |= {(name, feature): fields[given_key(name, feature)] for feature in role.features}
                continue
            for module in role.sync_batchnorms:
                module.valid = fields.get("valid")
            with nullcontext() if name in with_gradient else torch.no_grad():
                for feature, value in role(*(self._input(a, batch, values) for a in input_addresses(config))).items():
                    values[name, feature] = value
            if self.lap is not None:
                self.lap("student" if role.trainable else "teacher")
        return values

    def _add_module_states(self, operands: Iterable[OperandConfig], moving: Iterable[str], values: Values) -> None:
        """Adds what is read of a network without running it: statistics of a BatchNorm, weights as one vector."""
        for leaf in (leaf for operand in operands for leaf in operand.feature_operands() if leaf.is_state):
            with nullcontext() if root_role(leaf.role, self.configs) in moving else torch.no_grad():
                values[leaf.role, operand_feature(leaf)] = module_state(self.role(leaf.role).model, operand_feature(leaf))

    @staticmethod
    def _input(address: str, batch: Batch, values: Values) -> Tensor:
        if ":" in address:
            return values[parse_role_input(address)]
        source, field = address.split(".", 1)
        return batch[source][field]

    def forward(
        self, batch: Batch, counts: Mapping[str, Count], terms: Sequence[str], moving: Sequence[str], share: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted total, and one detached vector: the loss of each term, then each one weighted.

        Args:
            batch: one micro-batch.
            counts: as `counts` gave them for the effective batch that this micro-batch is part of.
            terms: the terms of this update.
            moving: the roles that this update moves.
            share: this micro-batch's share of the effective batch, for terms that depend on no row.
        """
        values = self.run_roles(batch, terms, moving)
        self._add_module_states((operand for name in terms for operand in self.term(name).config.read_operands()), moving, values)
        total: Tensor | None = None
        losses, shares = [], []
        for name in terms:
            group = self.term(name)
            loss = group(values, batch, counts[name], share, self.world)
            weighted = group.weight * loss
            total = weighted if total is None else total + weighted
            losses.append(loss.detach().float())
            shares.append(weighted.detach().float())
        assert total is not None
        if self.lap is not None:
            self.lap("terms")
        return total, torch.stack([*losses, *shares])

    @torch.no_grad()
    def observe(self, batch: Batch, owner: str) -> dict[str, Tensor]:
        """Reads the operands of a selector or a maker, by name, with every network as it is in evaluation.

        Args:
            owner: `make.NAME` or `select.N`.
        """
        readers = self.observers[owner]
        modes = [(module, module.training) for module in self.modules()]
        lap, self.lap = self.lap, None
        self.eval()
        try:
            operands = [reader.operand for reader in readers.values()]
            values = self._run(batch, self.roles_for(operands), ())  # type: ignore[arg-type]
            self._add_module_states(operands, (), values)  # type: ignore[arg-type]
            return {name: reader(values, batch) for name, reader in readers.items()}
        finally:
            self.lap = lap
            for module, mode in modes:
                module.training = mode


def roles_for_operands(operands: Iterable[OperandConfig], configs: Mapping[str, RoleConfig]) -> set[str]:
    """The roles that must run so that operands can be read: those that they name, and those that these see."""
    return upstream_closure(
        (leaf.role for operand in operands for leaf in operand.feature_operands() if not leaf.is_state), configs
    )


class RoleChain(nn.Module):
    """A role together with the roles that it sees: what is evaluated where the result is a head on another network.

    Args:
        network: of the stage.
        name: the role whose output counts.
    """

    def __init__(self, network: Network, name: str) -> None:
        super().__init__()
        above = upstream_closure(network.configs[name].upstream_roles, network.configs)
        self.names = [n for n in network.roles if n in above]
        self.members = nn.ModuleList(network.role(n) for n in self.names)
        self.last = network.role(name).model
        self.config = network.role(name).config

    def forward(self, image: Tensor) -> object:
        values: Values = {}
        for name, member in zip(self.names, self.members, strict=True):
            assert isinstance(member, Role)
            for feature, value in member(*self._inputs(member.config, image, values)).items():
                values[name, feature] = value
        return self.last(*self._inputs(self.config, image, values))

    @staticmethod
    def _inputs(config: RoleConfig, image: Tensor, values: Values) -> list[Tensor]:
        """Further fields of a training source, such as masks, are not there when a network is evaluated."""
        found = [values[parse_role_input(config.input)] if ":" in config.input else image]
        return found + [values[parse_role_input(address)] for address in config.extra_inputs if ":" in address]
