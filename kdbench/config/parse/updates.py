"""Parses `updates`: the ordered updates of one training step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.operands import OperandParser
from kdbench.config.parse.optimizers import read_optimizer
from kdbench.config.parse.parts import read_schedule
from kdbench.config.parse.roles import mode_text
from kdbench.config.schema import (
    InnerStepConfig,
    PartConfig,
    PartWithOperands,
    RoleConfig,
    TermConfig,
    UpdateConfig,
    declared_keys,
)
from kdbench.config.schema.updates import SELECTION_KEYS
from kdbench.errors import suggest
from kdbench.registry import SELECTORS


def read_updates(
    context: ParseContext,
    top: KeyReader,
    roles: Mapping[str, RoleConfig],
    terms: Mapping[str, TermConfig],
    sources: Collection[str] = (),
) -> tuple[UpdateConfig, ...]:
    """Parses the key `updates` of a stage. A nested list is a group of simultaneous updates.

    Args:
        top: reader of the stage's keys.
        roles, terms, sources: roles (networks), terms and sources of the stage.
    """
    value = top.get_raw("updates") or []
    if not isinstance(value, list):
        top.error("updates", f"must be a list such as `- {{models: [student], terms: [kd]}}`, got {value!r}.")
        return ()
    reader = _UpdateReader(context, roles, terms, sources)
    updates: list[UpdateConfig] = []
    for index, item in enumerate(value):
        key = top.subkey(f"updates.{index}")
        if not isinstance(item, list):
            updates.append(reader.read(item, key, group=None))
            continue
        group = [reader.read(member, f"{key}.{i}", group=index) for i, member in enumerate(item)]
        _check_group(context, key, group)
        updates += group
    return tuple(updates)


class _UpdateReader:
    """Parser of the updates of a stage, which has access to the stage's roles, terms and sources."""

    def __init__(
        self,
        context: ParseContext,
        roles: Mapping[str, RoleConfig],
        terms: Mapping[str, TermConfig],
        sources: Collection[str],
    ) -> None:
        self.context = context
        self.roles = roles
        self.terms = terms
        self.sources = sources

    def read(self, data: Any, key: str, group: int | None) -> UpdateConfig:
        """Parses an update.

        Args:
            group: position of the group to which the update belongs; None: the update is in no group.
        """
        reader = KeyReader(self.context, data, key, "an update", declared_keys(UpdateConfig))
        models, terms = self._read_models_and_terms(reader)
        repeat = reader.read("repeat")
        if group is not None and repeat > 1:
            reader.error("repeat", "`repeat` is not allowed in a group of simultaneous updates.")
        optimizer = reader.get_raw("optimizer")
        select, keep = self._read_selection(reader)
        return UpdateConfig(
            models=models,
            terms=terms,
            repeat=repeat,
            optimizer=None
            if optimizer is None
            else read_optimizer(self.context, optimizer, reader.subkey("optimizer")),
            group=group,
            select=select,
            keep=keep,
            inner_step=self._read_inner_step(reader),
            location=reader.location(),
        )

    def _read_models_and_terms(self, reader: KeyReader) -> tuple[tuple[str, ...], tuple[str, ...]]:
        models, terms = reader.read("models") or (), reader.read("terms") or ()
        for name, values in (("models", models), ("terms", terms)):
            if not values:
                reader.error("", f"{reader.subject} needs `{name}`, a list of names.")
            for value in sorted({value for value in values if values.count(value) > 1}):
                reader.error(name, f"{value!r} is listed twice.")
        for name in models:
            if name not in self.roles:
                reader.error("models", f"no role {name!r}.{suggest(name, self.roles)}")
            elif self.roles[name].mode != "trainable":
                message = (
                    f"role {name!r} is {mode_text(self.roles[name])}; {reader.subject} can only change trainable roles."
                )
                reader.error("models", message)
        for index, name in enumerate(terms):
            if name not in self.terms:
                if f"term {name}" not in self.context.invalid:
                    reader.error("terms", f"no term {name!r}.{suggest(name, self.terms)}")
                continue
            for operand in self.terms[name].read_operands():
                if operand.kind == "term" and operand.role not in terms[:index]:
                    message = (
                        f"term {name!r} reads {operand}, but the term {operand.role!r} is not earlier in this list"
                    )
                    reader.error("terms", f"{message}; add it before {name!r}.")
        return models, terms

    def _read_inner_step(self, update: KeyReader) -> InnerStepConfig | None:
        value = update.get_raw("inner_step")
        if value is None:
            return None
        reader = KeyReader(
            self.context, value, update.subkey("inner_step"), "an inner step", declared_keys(InnerStepConfig)
        )
        models, terms = self._read_models_and_terms(reader)
        if update.has("select"):
            update.error(
                "select", "`select` cannot be combined with `inner_step`, because the inner step uses the whole batch."
            )
        return InnerStepConfig(models=models, terms=terms, lr=_read_lr(reader), location=reader.location())

    def _read_selection(self, update: KeyReader) -> tuple[PartWithOperands | None, float | int | None]:
        """Parses `select`. Returns the selector, and the fraction or number of rows to keep."""
        value = update.get_raw("select")
        if value is None:
            return None, None
        key = update.subkey("select")
        if isinstance(value, str):
            value = {"type": value}
        reader = KeyReader(self.context, value, key, "select", SELECTION_KEYS, parameters=True)
        if reader.check_required():
            reader.read("keep")
        parser = OperandParser(self.context, list(self.roles), self.sources)
        student = "student" if "student" in self.roles else None
        selector = parser.read_part_with_operands(SELECTORS, value, key, student, reserved=tuple(SELECTION_KEYS))
        return selector, reader.read("keep")


def _read_lr(reader: KeyReader) -> float | PartConfig | None:
    value = reader.get_raw("lr")
    if isinstance(value, Mapping):
        return read_schedule(reader.context, value, reader.subkey("lr"))
    if value is not None and (not reader.check_type("lr", value) or not reader.check_value("lr", value)):
        return None
    return value


def _check_group(context: ParseContext, key: str, group: list[UpdateConfig]) -> None:
    """Reports a role or a term that is in two updates of one group. Updates of a group are simultaneous."""
    if len(group) < 2:
        context.error(key, "a group of simultaneous updates needs two or more updates.")
    previous_members: set[tuple[str, str]] = set()
    for update in group:
        members = [("model", name) for name in update.models] + [("term", name) for name in update.terms]
        for kind, name in members:
            if (kind, name) in previous_members:
                message = f"{kind} {name!r} is in two simultaneous updates of one group"
                context.error(key, f"{message}; list the updates one after the other, or merge them.")
        previous_members.update(members)
