"""Addresses of operands: features of roles, fields of sources, outputs of terms, what stages made, and combinations."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import check_parameters, read_part
from kdbench.config.schema import EdgeConfig, OperandConfig, PartConfig, PartWithOperands
from kdbench.errors import suggest
from kdbench.registry import ADAPTERS, COMBINERS, Entry, Registry

_ADDRESS = re.compile(r"(?:(?P<role>[\w-]+):)?(?P<path>[\w.\-]*)(?:@(?P<call>\d+))?(?P<side>/in|/out|/stats|/weights)?")


_PAIR = re.compile(r"(?P<owner>[\w@-]+)\.(?P<name>[\w-]+)")


OTHERS = "others"


ADDRESS_KINDS = ("term", "artifact")
"""Words before a colon that are no roles."""


TERM_OUTPUTS = ("loss", "route", "gate")


@dataclass(frozen=True)
class _ParsedOperand:
    """An operand, and whether the recipe spelled out its path."""

    operand: OperandConfig
    explicit: bool


@dataclass(frozen=True)
class OperandParser:
    """Turns what a recipe writes as an operand into an operand.

    roles, sources, terms: the names that there are; of terms, those that come earlier.
    made: what earlier stages make, as written (`STAGE.NAME`) and as the unrolled stage calls it.
    """

    context: ParseContext
    roles: Collection[str]
    sources: Collection[str] = ()
    terms: Sequence[str] = ()
    artifact_names: Mapping[str, str] = field(default_factory=dict)

    def read_operand(self, value: Any, own_role: str | None, key: str) -> _ParsedOperand | None:
        """Reads one operand; a bare path belongs to `own_role`. None after a fault."""
        adapter: PartConfig | None = None
        if isinstance(value, Mapping):
            if value.get("combine") is not None:
                return self._combined(value, own_role, key)
            fields = KeyReader(self.context, value, key, "an operand")
            role = fields.read("role", "str")
            if role is not None and self._known(role, fields.subkey("role")):
                own_role = role
            if fields.has("adapter"):
                adapter = read_part(
                    self.context, ADAPTERS, fields.get_raw("adapter"), fields.subkey("adapter"), ("source", "target")
                )
            path = fields.read("path", "str", "")
            fields.finish()
            bare = role is not None
        elif isinstance(value, str):
            path, bare = value, False
        else:
            self.context.error(key, f"an operand is an address such as `teacher:layer3`, got {value!r}.")
            return None
        return self._address(path, own_role, key, adapter, bare)

    def read_part_with_operands(
        self,
        registry: Registry,
        value: Any,
        key: str,
        own_role: str | None,
        reserved: Sequence[str] = (),
        given: Sequence[str] = (),
    ) -> PartWithOperands | None:
        """Reads `{type: NAME, ...}`: parameters, and the operands that the part's registration declares.

        Args:
            reserved: keys of the mapping that belong to someone else.
            given: declared operands that the part gets without being asked for (those of the term that it weighs).
        """
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            known = ", ".join(sorted(registry.entries)[:12])
            self.context.error(key, f"a {registry.kind} is a name or {{type: NAME, ...}}, one of: {known}.")
            return None
        kind = value["type"]
        type_key = f"{key}.type" if f"{key}.type" in self.context.locations else key
        entry = registry.entries.get(kind)
        declared = [name for name in (entry.facts.get("operands", ()) if entry else ()) if name not in given]
        rest = {k: v for k, v in value.items() if k not in ("type", *declared, *reserved)}
        checked = check_parameters(self.context, registry, kind, rest, key, type_key, beside=("type", *declared, *reserved))
        if checked is None or entry is None:
            return None
        operands = self.read_declared_operands(entry, declared, value, key, own_role)
        return PartWithOperands(type=kind, params=checked, operands=operands, location=self.context.location(key))

    def read_declared_operands(
        self, entry: Entry, names: Sequence[str], value: Mapping[str, Any], key: str, own_role: str | None
    ) -> dict[str, OperandConfig]:
        """Reads the operands that a part declares by name. One of them may be left out when the part can do without."""
        found = {}
        for name in names:
            written = value.get(name)
            if written is None:
                if name not in entry.optional_inputs:
                    self.context.error(key, f"{entry.name!r} reads the operand `{name}`: write `{name}: ADDRESS`.")
                continue
            read = self.read_operand(written, own_role, f"{key}.{name}")
            if read is not None:
                found[name] = read.operand
        return found

    def _combined(self, value: Mapping[str, Any], own_role: str | None, key: str) -> _ParsedOperand | None:
        combiner = value["combine"]
        if isinstance(combiner, Mapping):
            beside = [name for name in value if name not in ("combine", "of", "adapter")]
            for name in beside:
                self.context.error(f"{key}.{name}", "belongs inside `combine`, whose value is a mapping.")
            part = self.read_part_with_operands(COMBINERS, combiner, f"{key}.combine", own_role)
        else:
            flat = {"type": combiner, **{k: v for k, v in value.items() if k != "combine"}}
            part = self.read_part_with_operands(COMBINERS, flat, key, own_role, reserved=("of", "adapter"))
        written = value.get("of")
        if not isinstance(written, list) or len(written) < 2:
            self.context.error(f"{key}.of", "a combination needs `of`, a list of two or more operands.")
            return None
        parts = [self.read_operand(item, own_role, f"{key}.of.{i}") for i, item in enumerate(written)]
        if part is None or any(read is None for read in parts):
            return None
        adapter = None
        if value.get("adapter") is not None:
            adapter = read_part(self.context, ADAPTERS, value["adapter"], f"{key}.adapter", ("source", "target"))
        first = next(read.operand for read in parts if read is not None)
        operand = OperandConfig(
            role=first.role,
            kind="combined",
            combiner=part,
            parts=tuple(read.operand for read in parts if read is not None),
            adapter=adapter,
            location=self.context.location(key),
        )
        return _ParsedOperand(operand, all(read.explicit for read in parts if read is not None))

    def _address(
        self, text: str, own_role: str | None, key: str, adapter: PartConfig | None, bare: bool
    ) -> _ParsedOperand | None:
        kind, _, rest = text.partition(":")
        if kind in ADDRESS_KINDS and rest:
            return self._pair(kind, rest, key, adapter)
        source, _, name = text.partition(".")
        if not bare and name and source in self.sources and source not in self.roles:
            place = self.context.location(key)
            return _ParsedOperand(OperandConfig(role=source, path=name, kind="field", adapter=adapter, location=place), True)
        match = _ADDRESS.fullmatch(text)
        if match is None:
            said = "write ROLE:PATH, ROLE:PATH@CALL, ROLE:PATH/in or SOURCE.FIELD"
            self.context.error(key, f"{text!r} is no address; {said}.")
            return None
        role, path, call = match["role"], match["path"], int(match["call"] or 1)
        if role is None and path in self.roles and not bare:
            role, path = path, ""
        if role is not None and not self._known(role, key):
            return None
        role = role if role is not None else own_role
        if role is None or role not in self.roles:
            known = ", ".join(self.roles)
            self.context.error(
                key,
                f"{text!r} names no role, and there is no role `{role or 'student'}`; write ROLE:PATH "
                f"(roles: {known}).",
            )
            return None
        if call < 1:
            self.context.error(key, f"calls are counted from 1, got @{call}.")
            return None
        side: Any = (match["side"] or "/out")[1:]
        operand = OperandConfig(
            role=role, path=path or "logits", call=call, side=side, adapter=adapter, location=self.context.location(key)
        )
        return _ParsedOperand(operand, bool(path))

    def _pair(self, kind: str, text: str, key: str, adapter: PartConfig | None) -> _ParsedOperand | None:
        """`term:NAME.OUTPUT` or `artifact:STAGE.NAME`."""
        match = _PAIR.fullmatch(text)
        if match is None:
            form = "term:NAME.loss" if kind == "term" else "artifact:STAGE.NAME"
            self.context.error(key, f"{text!r} is no address of a {kind}; write {form}.")
            return None
        owner, name = match["owner"], match["name"]
        if kind == "term" and owner not in self.terms:
            hint = suggest(owner, self.terms) if self.terms else " There is none."
            self.context.error(key, f"no earlier term {owner!r}; a term reads those that stand above it.{hint}")
            return None
        if kind == "term" and name not in TERM_OUTPUTS:
            self.context.error(key, f"a term gives out {', '.join(TERM_OUTPUTS)}.{suggest(name, TERM_OUTPUTS)}")
            return None
        if kind == "artifact":
            full = self.artifact_names.get(text)
            if full is None:
                hint = suggest(text, self.artifact_names) if self.artifact_names else " No earlier stage makes anything."
                self.context.error(key, f"no earlier stage makes {text!r}.{hint}")
                return None
            owner, name = full.rsplit(".", 1)
        place = self.context.location(key)
        return _ParsedOperand(OperandConfig(role=owner, path=name, kind=kind, adapter=adapter, location=place), True)  # type: ignore[arg-type]

    def _known(self, role: str, key: str) -> bool:
        if role not in self.roles:
            self.context.error(key, f"no role {role!r}.{suggest(role, self.roles)}")
        return role in self.roles


class EdgeReader:
    """Reads the operands of one term.

    Args:
        addresses: of everything that there is.
        student: the role that `student` operands belong to when they name none; None where it is not obvious.
        key, entry: the term's key in the recipe, and its registration.
    """

    def __init__(self, addresses: OperandParser, student: str | None, key: str, entry: Entry) -> None:
        self.addresses = addresses
        self.context = addresses.context
        self.roles = addresses.roles
        self.student_role = student
        self.key = key
        self.entry = entry

    @property
    def reads_teacher(self) -> bool:
        return "teacher" in self.entry.inputs

    @property
    def needs_teacher(self) -> bool:
        return self.reads_teacher and "teacher" not in self.entry.optional_inputs

    def edges(self, student: Any, teacher: Any) -> tuple[EdgeConfig, ...]:
        """All pairs of operands; empty after a fault."""
        count = len(self.context.errors)
        students = self._students(student)
        pairs = self._pairs(students, isinstance(student, list), teacher) if students else []
        if len(self.context.errors) > count:
            return ()
        self._check_paths(pairs, teacher)
        return tuple(EdgeConfig(student=s.operand, teacher=t.operand if t else None) for s, t in pairs)

    def _students(self, value: Any) -> list[_ParsedOperand]:
        key = f"{self.key}.student"
        if value is None:
            if self.student_role is None:
                known = ", ".join(self.roles)
                self.context.error(self.key, f"say which role learns: `student: ROLE`, one of {known}.")
                return []
            return [_ParsedOperand(OperandConfig(role=self.student_role, location=self.context.location(self.key)), False)]
        items = value if isinstance(value, list) else [value]
        if not items:
            self.context.error(key, "the list is empty.")
        read = [self._operand(item, self.student_role, key, i) for i, item in enumerate(items)]
        return [operand for operand in read if operand is not None]

    def _pairs(self, students: list[_ParsedOperand], listed: bool, teacher: Any) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        key = f"{self.key}.teacher"
        if not self.reads_teacher:
            if teacher is not None:
                said = f"term {self.entry.name!r} reads no teacher; it reads {', '.join(self.entry.inputs)}. Remove it."
                self.context.error(key, said)
            return [(student, None) for student in students]
        if teacher is None:
            return self._default_teachers(students)
        if teacher == OTHERS:
            return self._others(students, listed)
        if not isinstance(teacher, list):
            only = self._operand(teacher, "teacher", key, 0)
            return [(student, only) for student in students]
        read = [self._operand(item, "teacher", key, i) for i, item in enumerate(teacher)]
        if not listed and read:
            students = students * len(read)
        if len(students) != len(read):
            said = (
                f"the list has {len(read)} operands, but `student` has {len(students)}; element i goes with element i."
            )
            self.context.error(key, said)
            return []
        return list(zip(students, read, strict=True))

    def _default_teachers(self, students: list[_ParsedOperand]) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        if not self.needs_teacher:
            return [(student, None) for student in students]
        if "teacher" not in self.roles:
            known = ", ".join(self.roles)
            self.context.error(
                self.key,
                f"term {self.entry.name!r} reads a teacher, but the recipe has no role `teacher` (roles: {known}). "
                f"Add `teacher: {{model: NAME, weights: ...}}`, or name the role that teaches in {self.key}.teacher.",
            )
            return []
        for student in students:
            if student.explicit and student.operand.path != "logits":
                self.context.error(
                    self.key,
                    f"the student's operand is `{student.operand}`; say which feature of the teacher it is compared "
                    f"with, such as `teacher: {student.operand.path}`.",
                )
        place = self.context.location(self.key)
        return [(student, _ParsedOperand(OperandConfig(role="teacher", location=place), False)) for student in students]

    def _others(self, students: list[_ParsedOperand], listed: bool) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        names = [student.operand.role for student in students]
        if not listed or len(set(names)) < 2 or len(set(names)) != len(names):
            key = f"{self.key}.teacher"
            self.context.error(key, "`others` needs a list of two or more different roles as `student`.")
            return []
        return [(s, t) for s in students for t in students if t is not s]

    def _check_paths(self, pairs: list[tuple[_ParsedOperand, _ParsedOperand | None]], teacher: Any) -> None:
        if not self.entry.facts.get("features"):
            return
        for side, read in [("student", s) for s, _ in pairs] + [("teacher", t) for _, t in pairs if t is not None]:
            if not read.explicit:
                role = read.operand.role
                self.context.error(
                    self.key,
                    f"term {self.entry.name!r} compares features: `{side}` must give a module path, such as "
                    f"`{side}: layer3` (`kdbench inspect MODEL` lists them)"
                    + ("." if role == side else f"; what the role {role!r} itself gives out is `{role}:logits`."),
                )

    def _operand(self, value: Any, own_role: str | None, key: str, position: int) -> _ParsedOperand | None:
        item_key = f"{key}.{position}" if f"{key}.{position}" in self.context.locations else key
        return self.addresses.read_operand(value, own_role, item_key)
