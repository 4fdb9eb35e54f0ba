"""Parses operands: features of roles, fields of sources, outputs of terms, artifacts, and combinations of these."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.parts import check_parameters, invalid_part_message, read_part
from kdbench.config.schema import EdgeConfig, OperandConfig, PartConfig, PartWithOperands, declared_keys
from kdbench.errors import suggest
from kdbench.registry import ADAPTERS, COMBINERS, Entry, Registry

_FEATURE_ADDRESS = re.compile(
    r"(?:(?P<role>[\w-]+):)?(?P<path>[\w.\-]*)(?:@(?P<call>\d+))?(?P<side>/in|/out|/stats|/weights)?"
)


_OWNER_AND_NAME = re.compile(r"(?P<owner>[\w@-]+)\.(?P<name>[\w-]+)")


OTHERS = "others"


ADDRESS_KINDS = ("term", "artifact")
"""The words before the colon of an address that are not names of roles."""


TERM_OUTPUTS = ("loss", "route", "gate")


ADAPTER_INJECTED = ("source", "target")


@dataclass(frozen=True)
class _ParsedOperand:
    """A parsed operand. `has_path` is True if the recipe states the module path of the operand."""

    operand: OperandConfig
    has_path: bool


@dataclass(frozen=True)
class OperandParser:
    """Parses the operands of terms and other parts.

    Attributes:
        roles, sources: names of the existing roles and sources.
        terms: names of the terms that come before the current term.
        artifact_names: name of an artifact in the recipe, such as `query.labels` -> full name with the round of
            the loop, such as `query@2.labels`.
    """

    context: ParseContext
    roles: Collection[str]
    sources: Collection[str] = ()
    terms: Sequence[str] = ()
    artifact_names: Mapping[str, str] = field(default_factory=dict)

    def read_operand(self, value: Any, default_role: str | None, key: str) -> _ParsedOperand | None:
        """Parses an operand that is written as an address or as a mapping.

        Args:
            default_role: role of an address that names no role, such as `layer3`.
            key: dotted key of the operand.

        Returns:
            The operand, or None after an error.
        """
        if isinstance(value, str):
            return self._parse_address(value, default_role, key, adapter=None, is_path=False)
        if not isinstance(value, Mapping):
            self.context.error(key, f"an operand is an address such as `teacher:layer3`, got {value!r}.")
            return None
        if value.get("combine") is not None:
            return self._read_combination(value, default_role, key)
        reader = KeyReader(self.context, value, key, "an operand", declared_keys(OperandConfig))
        if reader.has("of"):
            reader.error(
                "of", "`of` belongs to a combination of operands; add a combiner, such as `combine: mean_logits`."
            )
        role = reader.read("role")
        if role is not None and self._check_role(role, reader.subkey("role")):
            default_role = role
        path = reader.read("path") if reader.has("path") else ""
        return self._parse_address(path, default_role, key, self._read_adapter(reader), is_path=role is not None)

    def read_part_with_operands(
        self,
        registry: Registry,
        value: Any,
        key: str,
        default_role: str | None,
        reserved: Sequence[str] = (),
        available: Sequence[str] = (),
    ) -> PartWithOperands | None:
        """Parses a part `{type: NAME, ...}` with its parameters and its declared operands.

        Args:
            default_role: role of an address that names no role, such as `layer3`.
            reserved: keys of the mapping that are neither parameters nor operands of the part.
            available: operands that the engine passes to the part, so that the recipe does not state them. For a
                sample weight, these are the operands of its term.
        """
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            self.context.error(key, invalid_part_message(registry, value))
            return None
        kind = value["type"]
        entry = registry.entries.get(kind)
        operand_names = [name for name in (entry.facts.get("operands", ()) if entry else ()) if name not in available]
        other_keys = ("type", *operand_names, *reserved)
        params = {name: item for name, item in value.items() if name not in other_keys}
        checked = check_parameters(self.context, registry, kind, params, key, reserved=other_keys)
        if checked is None or entry is None:
            return None
        operands = self.read_declared_operands(entry, operand_names, value, key, default_role)
        return PartWithOperands(type=kind, params=checked, operands=operands, location=self.context.location(key))

    def read_declared_operands(
        self, entry: Entry, names: Sequence[str], data: Mapping[str, Any], key: str, default_role: str | None
    ) -> dict[str, OperandConfig]:
        """Parses the operands that a part declares. A missing operand is reported unless the operand is optional.

        Args:
            entry: declaration of the part.
            names: names of the operands.
            data: mapping that contains the operands.
        """
        operands = {}
        for name in names:
            value = data.get(name)
            if value is None:
                if name not in entry.optional_inputs:
                    self.context.error(key, f"{entry.name!r} needs the operand `{name}`; write `{name}: ADDRESS`.")
                continue
            parsed = self.read_operand(value, default_role, f"{key}.{name}")
            if parsed is not None:
                operands[name] = parsed.operand
        return operands

    def _read_combination(self, value: Mapping[str, Any], default_role: str | None, key: str) -> _ParsedOperand | None:
        # Only some keys of an operand belong to a combination; the rest are parameters of its combiner.
        all_keys = declared_keys(OperandConfig)
        reader = KeyReader(
            self.context,
            value,
            key,
            "a combination",
            {name: all_keys[name] for name in ("combine", "of", "adapter")},
            parameters=True,
        )
        combiner = reader.get_raw("combine")
        if isinstance(combiner, Mapping):
            for name in reader.parameters():
                reader.error(name, f"write `{name}` inside the mapping `combine`.")
            part = self.read_part_with_operands(COMBINERS, combiner, reader.subkey("combine"), default_role)
        else:
            flat = {"type": combiner, **reader.parameters()}
            part = self.read_part_with_operands(COMBINERS, flat, key, default_role, reserved=("of", "adapter"))
        items = reader.get_raw("of")
        if not isinstance(items, list) or len(items) < 2:
            reader.error("of", "a combination needs `of`, a list of two or more operands.")
            return None
        parts = [self.read_operand(item, default_role, reader.subkey(f"of.{i}")) for i, item in enumerate(items)]
        parsed_parts = [parsed for parsed in parts if parsed is not None]
        if part is None or len(parsed_parts) < len(parts):
            return None
        operand = OperandConfig(
            role=parsed_parts[0].operand.role,
            kind="combined",
            combiner=part,
            parts=tuple(parsed.operand for parsed in parsed_parts),
            adapter=self._read_adapter(reader),
            location=reader.location(),
        )
        return _ParsedOperand(operand, all(parsed.has_path for parsed in parsed_parts))

    def _read_adapter(self, reader: KeyReader) -> PartConfig | None:
        if not reader.has("adapter"):
            return None
        return read_part(
            self.context, ADAPTERS, reader.get_raw("adapter"), reader.subkey("adapter"), injected=ADAPTER_INJECTED
        )

    def _parse_address(
        self, text: str, default_role: str | None, key: str, adapter: PartConfig | None, is_path: bool
    ) -> _ParsedOperand | None:
        """Parses the address of an operand, such as `teacher:layer3`.

        Args:
            default_role: role of an address that names no role, such as `layer3`.
            is_path: whether the text is a module path, and not the name of a role or a field.
        """
        prefix, _, remainder = text.partition(":")
        if prefix in ADDRESS_KINDS and remainder:
            return self._parse_owned(prefix, remainder, key, adapter)
        source, _, name = text.partition(".")
        if not is_path and name and source in self.sources and source not in self.roles:
            operand = OperandConfig(
                role=source, path=name, kind="field", adapter=adapter, location=self.context.location(key)
            )
            return _ParsedOperand(operand, has_path=True)
        match = _FEATURE_ADDRESS.fullmatch(text)
        if match is None:
            forms = "write ROLE:PATH, ROLE:PATH@CALL, ROLE:PATH/in or SOURCE.FIELD"
            self.context.error(key, f"{text!r} is not an address; {forms}.")
            return None
        role, path = match["role"], match["path"]
        # A word without colon that names a role is that role; otherwise it is a path in the default role.
        if role is None and path in self.roles and not is_path:
            role, path = path, ""
        if role is not None and not self._check_role(role, key):
            return None
        role = role if role is not None else default_role
        if role is None or role not in self.roles:
            message = f"the address {text!r} has no role, and there is no role `{role or 'student'}`; write ROLE:PATH"
            self.context.error(key, f"{message} (roles: {', '.join(self.roles)}).")
            return None
        return self._feature(match, role, path, key, adapter)

    def _feature(
        self, match: re.Match[str], role: str, path: str, key: str, adapter: PartConfig | None
    ) -> _ParsedOperand | None:
        call = int(match["call"] or 1)
        if call < 1:
            self.context.error(key, f"calls of a module are counted from 1, got @{call}.")
            return None
        side: Any = (match["side"] or "/out")[1:]
        operand = OperandConfig(
            role=role, path=path or "logits", call=call, side=side, adapter=adapter, location=self.context.location(key)
        )
        return _ParsedOperand(operand, has_path=bool(path))

    def _parse_owned(self, kind: Any, text: str, key: str, adapter: PartConfig | None) -> _ParsedOperand | None:
        """Parses an address `term:NAME.OUTPUT` or `artifact:STAGE.NAME`. `text` is the part after the colon."""
        match = _OWNER_AND_NAME.fullmatch(text)
        if match is None:
            form = "term:NAME.loss" if kind == "term" else "artifact:STAGE.NAME"
            self.context.error(key, f"{text!r} is not the address of a {kind}; write {form}.")
            return None
        owner, name = match["owner"], match["name"]
        if kind == "term" and owner not in self.terms:
            hint = suggest(owner, self.terms) if self.terms else " There is no earlier term."
            self.context.error(key, f"no earlier term {owner!r}; a term can read outputs of earlier terms only.{hint}")
            return None
        if kind == "term" and name not in TERM_OUTPUTS:
            self.context.error(key, f"a term has no output {name!r}.{suggest(name, TERM_OUTPUTS)}")
            return None
        if kind == "artifact":
            full_name = self.artifact_names.get(text)
            if full_name is None:
                hint = artifact_hint(text, self.artifact_names)
                self.context.error(key, f"no earlier stage produces the artifact {text!r}.{hint}")
                return None
            owner, name = full_name.rsplit(".", 1)
        operand = OperandConfig(role=owner, path=name, kind=kind, adapter=adapter, location=self.context.location(key))
        return _ParsedOperand(operand, has_path=True)

    def _check_role(self, role: str, key: str) -> bool:
        if role not in self.roles:
            self.context.error(key, f"no role {role!r}.{suggest(role, self.roles)}")
        return role in self.roles


def artifact_hint(name: str, artifact_names: Collection[str]) -> str:
    """Returns the last sentences of an error message about an unknown artifact: the names of existing artifacts."""
    return suggest(name, artifact_names) if artifact_names else " There is no earlier artifact at all."


class EdgeReader:
    """Parses the edges of a term: the pairs of operands that it compares.

    Args:
        student_role: role of a `student` operand that names no role; None if several roles are possible.
        key: dotted key of the term.
        entry: declaration of the term's class.
    """

    def __init__(self, parser: OperandParser, student_role: str | None, key: str, entry: Entry) -> None:
        self.parser = parser
        self.context = parser.context
        self.roles = parser.roles
        self.student_role = student_role
        self.key = key
        self.entry = entry

    @property
    def reads_teacher(self) -> bool:
        return "teacher" in self.entry.inputs

    @property
    def needs_teacher(self) -> bool:
        return self.reads_teacher and "teacher" not in self.entry.optional_inputs

    def edges(self, student: Any, teacher: Any) -> tuple[EdgeConfig, ...]:
        """Returns all edges (pairs of operands) of the term, or an empty tuple after an error.

        Args:
            student, teacher: values of the keys `student` and `teacher` in the recipe.
        """
        error_count = len(self.context.errors)
        students = self._read_students(student)
        pairs = self._pair(students, isinstance(student, list), teacher) if students else []
        if len(self.context.errors) > error_count:
            return ()
        self._check_paths(pairs)
        return tuple(EdgeConfig(student=s.operand, teacher=t.operand if t else None) for s, t in pairs)

    def _read_students(self, value: Any) -> list[_ParsedOperand]:
        key = f"{self.key}.student"
        if value is None:
            if self.student_role is None:
                self.context.error(
                    self.key,
                    f"the role that learns is ambiguous; write `student: ROLE`, one of {', '.join(self.roles)}.",
                )
                return []
            operand = OperandConfig(role=self.student_role, location=self.context.location(self.key))
            return [_ParsedOperand(operand, has_path=False)]
        items = value if isinstance(value, list) else [value]
        if not items:
            self.context.error(key, "the list of operands is empty.")
        parsed = [self._read_item(item, self.student_role, key, index) for index, item in enumerate(items)]
        return [operand for operand in parsed if operand is not None]

    def _pair(
        self, students: list[_ParsedOperand], is_list: bool, teacher: Any
    ) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        """Pairs each student operand with a teacher operand.

        Args:
            is_list: whether `student` is a list in the recipe.
        """
        key = f"{self.key}.teacher"
        if not self.reads_teacher:
            if teacher is not None:
                inputs = ", ".join(self.entry.inputs)
                self.context.error(key, f"term {self.entry.name!r} reads no teacher, only {inputs}. Remove `teacher`.")
            return [(student, None) for student in students]
        if teacher is None:
            return self._pair_with_default_teacher(students)
        if teacher == OTHERS:
            return self._pair_with_others(students, is_list)
        if not isinstance(teacher, list):
            parsed = self._read_item(teacher, "teacher", key, 0)
            return [(student, parsed) for student in students]
        teachers = [self._read_item(item, "teacher", key, index) for index, item in enumerate(teacher)]
        if not is_list and teachers:
            students = students * len(teachers)
        if len(students) != len(teachers):
            counts = f"the list `teacher` has length {len(teachers)}, but the list `student` has {len(students)}"
            self.context.error(key, f"{counts}; operands of equal position in the two lists are compared.")
            return []
        return list(zip(students, teachers, strict=True))

    def _pair_with_default_teacher(
        self, students: list[_ParsedOperand]
    ) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        if not self.needs_teacher:
            return [(student, None) for student in students]
        if "teacher" not in self.roles:
            roles = ", ".join(self.roles)
            self.context.error(
                self.key,
                f"term {self.entry.name!r} reads a teacher, but the recipe has no role `teacher` (roles: {roles}). "
                f"Add `teacher: {{model: NAME, weights: ...}}`, or name the role that teaches in {self.key}.teacher.",
            )
            return []
        for student in students:
            if student.has_path and student.operand.path != "logits":
                # Equal paths of two networks are rarely comparable: the recipe must name the teacher's.
                self.context.error(
                    self.key,
                    f"the student's operand is `{student.operand}`; name also the feature of the teacher, such "
                    f"as `teacher: {student.operand.path}`.",
                )
        teacher = OperandConfig(role="teacher", location=self.context.location(self.key))
        return [(student, _ParsedOperand(teacher, has_path=False)) for student in students]

    def _pair_with_others(
        self, students: list[_ParsedOperand], is_list: bool
    ) -> list[tuple[_ParsedOperand, _ParsedOperand | None]]:
        names = [student.operand.role for student in students]
        if not is_list or len(set(names)) < 2 or len(set(names)) != len(names):
            key = f"{self.key}.teacher"
            self.context.error(key, "`others` needs a list of two or more different roles as `student`.")
            return []
        return [(student, teacher) for student in students for teacher in students if teacher is not student]

    def _check_paths(self, pairs: list[tuple[_ParsedOperand, _ParsedOperand | None]]) -> None:
        """Reports each operand without module path, if the term compares features (outputs of hidden layers)."""
        if not self.entry.facts.get("features"):
            return
        students = [("student", student) for student, _ in pairs]
        teachers = [("teacher", teacher) for _, teacher in pairs if teacher is not None]
        for side, parsed in students + teachers:
            if parsed.has_path:
                continue
            role = parsed.operand.role
            message = (
                f"term {self.entry.name!r} compares features: `{side}` needs a module path, such as "
                f"`{side}: layer3` (`kdbench inspect MODEL` lists the module paths)"
            )
            output = "" if role == side else f"; the output of role {role!r} is `{role}:logits`"
            self.context.error(self.key, f"{message}{output}.")

    def _read_item(self, value: Any, default_role: str | None, key: str, index: int) -> _ParsedOperand | None:
        """Parses one operand: an item of a list, or the only operand."""
        item_key = f"{key}.{index}" if f"{key}.{index}" in self.context.locations else key
        return self.parser.read_operand(value, default_role, item_key)
