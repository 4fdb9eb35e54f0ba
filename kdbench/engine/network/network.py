"""The network of a stage: one module with all roles and terms. It maps a micro-batch to one loss per term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdbench.config.parse.roles import upstream_closure
from kdbench.config.schema import InnerStepConfig, OperandConfig, RoleConfig, UpdateConfig
from kdbench.data.loading.batch import MicroBatch
from kdbench.engine.distributed.world import World
from kdbench.engine.network.features import Feature, module_state
from kdbench.engine.network.operands import OperandReader, Values, operand_feature
from kdbench.engine.network.roles import Role, input_addresses, parse_role_input, root_role, updated_roles
from kdbench.engine.network.terms import Count, TermGroup
from kdbench.engine.timer import SectionTimer


class RoleRun(NamedTuple):
    """One role's forward pass within a step.

    Attributes:
        name: name of the role.
        with_gradient: whether autograd records the forward pass.
        inputs: address of each input of the role, (source, field) or (role, feature).
    """

    name: str
    with_gradient: bool
    inputs: tuple[tuple[str, str | Feature], ...]


class StateRead(NamedTuple):
    """The address of a value that is read without a forward pass: BatchNorm statistics or a vector of weights.

    Attributes:
        role: role whose statistics or weights are read.
        feature: address of the module in the role.
        with_gradient: whether gradients flow into the weights.
    """

    role: str
    feature: Feature
    with_gradient: bool


class Wiring(NamedTuple):
    """The forward pass of some terms: which roles run and what is read. It is computed once and used in every step.

    Attributes:
        terms: names of the terms, in the order in which they are computed.
        runs: the roles that run, in order.
        states: statistics and weights that are read after the roles have run.
    """

    terms: tuple[str, ...]
    runs: tuple[RoleRun, ...]
    states: tuple[StateRead, ...]


class NamedModules(nn.ModuleDict):
    """A module dictionary that accepts any name.

    `nn.ModuleDict` rejects the names of its own methods, such as `forward`.
    """

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Network(nn.Module):
    """The roles (named networks) and loss terms of a stage, as one module.

    Args:
        roles: name -> role, ordered so that a role comes after the roles whose outputs it reads.
        terms: name -> term, without the terms whose weight is constantly 0.
        sources: role -> name of the source from which its input comes.
        world: the process group.
        observers: operand readers of artifact builders and selectors. The keys are the owner (`make.NAME` for an
            artifact builder, `select.N` for a selector) and the operand name.
        timer: timer that receives the ends of the sections `student`, `teacher` and `terms`; None: no timing.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        terms: Mapping[str, TermGroup],
        sources: Mapping[str, str],
        world: World = World(),  # noqa: B008
        observers: Mapping[str, Mapping[str, OperandReader]] | None = None,
        timer: SectionTimer | None = None,
    ) -> None:
        super().__init__()
        self.roles = NamedModules(roles)
        self.terms = NamedModules(terms)
        self.sources = dict(sources)
        self.world = world
        self.observers = {owner: NamedModules(readers) for owner, readers in (observers or {}).items()}
        self.configs: dict[str, RoleConfig] = {name: role.config for name, role in roles.items()}
        self.sharded: tuple[str, ...] = ()  # set by `kdbench.engine.distributed.sharding.shard`
        self.timer = timer if timer is not None else SectionTimer(enabled=False)
        self._wirings: dict[tuple[tuple[str, ...], frozenset[str]], Wiring] = {}
        self._observer_wirings: dict[str, Wiring] = {}

    def role(self, name: str) -> Role:
        role = self.roles[name]
        assert isinstance(role, Role)
        return role

    def term(self, name: str) -> TermGroup:
        term = self.terms[name]
        assert isinstance(term, TermGroup)
        return term

    # Resolved once

    def wiring(self, terms: Iterable[str], updated: Iterable[str]) -> Wiring:
        """Determines which roles run, and with which inputs, to compute some terms.

        Args:
            terms: names of the terms, in the order in which they are computed.
            updated: names of the roles that the update trains. A role runs with gradient if it is one of these roles
                or reads the output of such a role.
        """
        key = (tuple(terms), frozenset(updated))
        if key not in self._wirings:
            operands = [operand for name in key[0] for operand in self.term(name).config.read_operands()]
            self._wirings[key] = self._resolve(key[0], operands, key[1])
        return self._wirings[key]

    def _observer_wiring(self, owner: str) -> Wiring:
        if owner not in self._observer_wirings:
            operands = [reader.operand for reader in self.observers[owner].values()]
            self._observer_wirings[owner] = self._resolve((), operands, ())  # type: ignore[arg-type]
        return self._observer_wirings[owner]

    def _resolve(self, terms: tuple[str, ...], operands: Sequence[OperandConfig], updated: Iterable[str]) -> Wiring:
        updated = set(updated)
        runs = self._runs(roles_for_operands(operands, self.configs), updated)
        leaves = [leaf for operand in operands for leaf in operand.feature_operands() if leaf.is_state]
        states = (StateRead(leaf.role, operand_feature(leaf), self._is_updated(leaf.role, updated)) for leaf in leaves)
        return Wiring(terms, runs, tuple(dict.fromkeys(states)))

    def _is_updated(self, role: str, updated: set[str]) -> bool:
        return root_role(role, self.configs) in updated

    def _runs(self, required: Iterable[str], updated: set[str]) -> tuple[RoleRun, ...]:
        required = set(required)
        with_gradient: set[str] = set()
        runs = []
        for name in self.roles:
            if name not in required:
                continue
            config = self.configs[name]
            if self._is_updated(name, updated) or not with_gradient.isdisjoint(config.upstream_roles):
                with_gradient.add(name)
            runs.append(RoleRun(name, name in with_gradient, _resolve_inputs(config)))
        return tuple(runs)

    def candidate_parameters(self, update: UpdateConfig | InnerStepConfig) -> dict[str, nn.Parameter]:
        """Returns name -> parameter for all parameters of an update's roles and terms, trainable or not."""
        roles = updated_roles(update, self.configs)
        parameters = {f"{role}.{n}": p for role in roles for n, p in self.role(role).model.named_parameters()}
        return parameters | {f"terms.{t}.{n}": p for t in update.terms for n, p in self.term(t).named_parameters()}

    # In every step

    def valid_counts(self, window: Sequence[MicroBatch], terms: Iterable[str]) -> dict[str, Count]:
        """Returns term -> number of valid entries in one effective batch (all micro-batches, all ranks).

        The sum of a term's losses is divided by this number. Padded, unlabelled and masked entries are not valid.

        Args:
            window: list of the micro-batches of the effective batch.
            terms: names of the terms.
        """
        groups = {name: self.term(name) for name in terms}
        return {n: g.valid_count([batches[g.source] for batches in window], self.world) for n, g in groups.items()}

    def run_roles(self, batches: MicroBatch, runs: Iterable[RoleRun]) -> Values:
        """Runs each role once and returns all extracted features.

        A role whose features were precomputed (arrived with the batch) does not run.

        Args:
            batches: source -> its batch.
            runs: the forward passes, in order.

        Returns:
            (role, feature) -> tensor.
        """
        values: Values = {}
        for name, with_gradient, inputs in runs:
            role = self.role(name)
            batch = batches[self.sources[name]]
            if role.features and (name, role.features[0]) in batch.precomputed:
                values |= {(name, feature): batch.precomputed[name, feature] for feature in role.features}
                continue
            for module in role.sync_batchnorms:
                module.valid = batch.fields.get("valid")
            with nullcontext() if with_gradient else torch.no_grad():
                for feature, value in role(*(_read_input(address, batches, values) for address in inputs)).items():
                    values[name, feature] = value
            if self.timer.enabled:
                self.timer.end_section("student" if role.trainable else "teacher")
        return values

    @torch.no_grad()
    def run_frozen(self, batches: MicroBatch, names: Iterable[str]) -> Values:
        """Runs frozen roles, which depend on no trained parameter, and returns all extracted features.

        Args:
            batches: source -> its batch. The batches contain at least the fields that these roles read.
            names: names of the frozen roles.

        Returns:
            (role, feature) -> tensor.
        """
        return self.run_roles(batches, self._runs(upstream_closure(names, self.configs), set()))

    def _read_states(self, states: Iterable[StateRead], values: Values) -> None:
        for name, feature, with_gradient in states:
            with nullcontext() if with_gradient else torch.no_grad():
                values[name, feature] = module_state(self.role(name).model, feature)

    def forward(
        self, batches: MicroBatch, counts: Mapping[str, Count], wiring: Wiring, fraction: float
    ) -> tuple[Tensor, Tensor]:
        """Computes the losses of one update on a micro-batch.

        Args:
            batches: source -> its batch, together one micro-batch.
            counts: the return value of `valid_counts` for the effective batch that contains this micro-batch.
            wiring: the return value of `wiring` for the update's terms and roles.
            fraction: this micro-batch's fraction of the effective batch, for terms whose loss does not depend on
                the rows.

        Returns:
            The weighted total loss (scalar), and a detached float32 vector (2 * terms,) with all losses, then all
            weighted losses.
        """
        values = self.run_roles(batches, wiring.runs)
        self._read_states(wiring.states, values)
        total: Tensor | None = None
        losses, weighted_losses = [], []
        for name in wiring.terms:
            group = self.term(name)
            loss = group(values, batches, counts[name], fraction, self.world)
            weighted = group.weight * loss
            total = weighted if total is None else total + weighted
            losses.append(loss.detach().float())
            weighted_losses.append(weighted.detach().float())
        assert total is not None
        if self.timer.enabled:
            self.timer.end_section("terms")
        return total, torch.stack([*losses, *weighted_losses])

    @torch.no_grad()
    def observe(self, batches: MicroBatch, owner: str) -> dict[str, Tensor]:
        """Computes the operands of a selector or an artifact builder, with all networks in eval mode.

        Args:
            batches: source -> its batch.
            owner: name of the artifact builder (`make.NAME`) or of the selector (`select.N`).

        Returns:
            Operand name -> tensor.
        """
        readers, wiring = self.observers[owner], self._observer_wiring(owner)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with self.timer.paused():
                values = self.run_roles(batches, wiring.runs)
                self._read_states(wiring.states, values)
                return {name: reader(values, batches) for name, reader in readers.items()}
        finally:
            for module, mode in modes:
                module.training = mode


def _resolve_inputs(config: RoleConfig) -> tuple[tuple[str, str | Feature], ...]:
    inputs: list[tuple[str, str | Feature]] = []
    for address in input_addresses(config):
        if ":" in address:
            inputs.append(parse_role_input(address))
        else:
            source, _, field = address.partition(".")
            inputs.append((source, field))
    return tuple(inputs)


def _read_input(address: tuple[str, str | Feature], batches: MicroBatch, values: Values) -> Tensor:
    owner, name = address
    return values[owner, name] if isinstance(name, Feature) else batches[owner].fields[name]


def roles_for_operands(operands: Iterable[OperandConfig], configs: Mapping[str, RoleConfig]) -> set[str]:
    """Returns the names of the roles that must run before some operands can be read.

    These are the roles of the operands, and all roles whose outputs they read, directly or through other roles.
    """
    leaves = (leaf for operand in operands for leaf in operand.feature_operands())
    return upstream_closure((leaf.role for leaf in leaves if not leaf.is_state), configs)


class RoleChain(nn.Module):
    """A role together with all roles that it depends on, as one module that maps an image to the role's output.

    The module is used to evaluate a role that reads another role's output, such as a head.

    Args:
        network: the stage's network.
        name: the role whose output is evaluated.
    """

    def __init__(self, network: Network, name: str) -> None:
        super().__init__()
        upstream = upstream_closure(network.configs[name].upstream_roles, network.configs)
        self.names = [n for n in network.roles if n in upstream]
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
        """Returns a role's inputs in evaluation.

        Extra inputs that are fields of a training source, such as masks, are left out: they do not exist in
        evaluation.
        """
        inputs = [values[parse_role_input(config.input)] if ":" in config.input else image]
        return inputs + [values[parse_role_input(address)] for address in config.extra_inputs if ":" in address]
