"""Addresses of operands: `ROLE:PATH[@K][/in]`, a bare role, a bare path, lists of them, `others`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kdbench.config.fields import Context, Fields, named
from kdbench.config.schema import Edge, Named, Operand
from kdbench.errors import nearest
from kdbench.registry import ADAPTERS, Entry

_ADDRESS = re.compile(r"(?:(?P<role>[\w-]+):)?(?P<path>[\w.\-]*)(?:@(?P<call>\d+))?(?P<side>/in|/out)?")
OTHERS = "others"


@dataclass(frozen=True)
class _Read:
    """An operand, and whether the recipe spelled out its path."""

    operand: Operand
    explicit: bool


class OperandReader:
    """Reads the operands of one term.

    Args:
        roles: the names of all roles.
        student: the role that `student` operands belong to when they name none; None where it is not obvious.
        key, entry: the term's key in the recipe, and its registration.
    """

    def __init__(self, context: Context, roles: Collection[str], student: str | None, key: str, entry: Entry) -> None:
        self.context = context
        self.roles = roles
        self.student_role = student
        self.key = key
        self.entry = entry

    @property
    def reads_teacher(self) -> bool:
        return "teacher" in self.entry.inputs

    @property
    def needs_teacher(self) -> bool:
        return self.reads_teacher and "teacher" not in self.entry.optional_inputs

    def edges(self, student: Any, teacher: Any) -> tuple[Edge, ...]:
        """All pairs of operands; empty after a fault."""
        count = len(self.context.faults)
        students = self._students(student)
        pairs = self._pairs(students, isinstance(student, list), teacher) if students else []
        if len(self.context.faults) > count:
            return ()
        self._check_paths(pairs, teacher)
        return tuple(Edge(student=s.operand, teacher=t.operand if t else None) for s, t in pairs)

    def _students(self, value: Any) -> list[_Read]:
        key = f"{self.key}.student"
        if value is None:
            if self.student_role is None:
                known = ", ".join(self.roles)
                self.context.fault(self.key, f"say which role learns: `student: ROLE`, one of {known}.")
                return []
            return [_Read(Operand(role=self.student_role, place=self.context.place(self.key)), False)]
        items = value if isinstance(value, list) else [value]
        if not items:
            self.context.fault(key, "the list is empty.")
        read = [self._operand(item, self.student_role, key, i) for i, item in enumerate(items)]
        return [operand for operand in read if operand is not None]

    def _pairs(self, students: list[_Read], listed: bool, teacher: Any) -> list[tuple[_Read, _Read | None]]:
        key = f"{self.key}.teacher"
        if not self.reads_teacher:
            if teacher is not None:
                said = f"term {self.entry.name!r} reads no teacher; it reads {', '.join(self.entry.inputs)}. Remove it."
                self.context.fault(key, said)
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
            self.context.fault(key, said)
            return []
        return list(zip(students, read, strict=True))

    def _default_teachers(self, students: list[_Read]) -> list[tuple[_Read, _Read | None]]:
        if not self.needs_teacher:
            return [(student, None) for student in students]
        if "teacher" not in self.roles:
            known = ", ".join(self.roles)
            self.context.fault(
                self.key,
                f"term {self.entry.name!r} reads a teacher, but the recipe has no role `teacher` (roles: {known}). "
                f"Add `teacher: {{model: NAME, weights: ...}}`, or name the role that teaches in {self.key}.teacher.",
            )
            return []
        for student in students:
            if student.explicit and student.operand.path != "logits":
                self.context.fault(
                    self.key,
                    f"the student's operand is `{student.operand}`; say which feature of the teacher it is compared "
                    f"with, such as `teacher: {student.operand.path}`.",
                )
        place = self.context.place(self.key)
        return [(student, _Read(Operand(role="teacher", place=place), False)) for student in students]

    def _others(self, students: list[_Read], listed: bool) -> list[tuple[_Read, _Read | None]]:
        names = [student.operand.role for student in students]
        if not listed or len(set(names)) < 2 or len(set(names)) != len(names):
            key = f"{self.key}.teacher"
            self.context.fault(key, "`others` needs a list of two or more different roles as `student`.")
            return []
        return [(s, t) for s in students for t in students if t is not s]

    def _check_paths(self, pairs: list[tuple[_Read, _Read | None]], teacher: Any) -> None:
        if not self.entry.facts.get("features"):
            return
        for side, read in [("student", s) for s, _ in pairs] + [("teacher", t) for _, t in pairs if t is not None]:
            if not read.explicit:
                self.context.fault(
                    self.key,
                    f"term {self.entry.name!r} compares features: `{side}` must give a module path, such as "
                    f"`{side}: layer3` (`kdbench inspect MODEL` lists them).",
                )

    def _operand(self, value: Any, own_role: str | None, key: str, position: int) -> _Read | None:
        item_key = f"{key}.{position}" if f"{key}.{position}" in self.context.places else key
        adapter: Named | None = None
        if isinstance(value, Mapping):
            fields = Fields(self.context, value, item_key, "an operand")
            role = fields.take("role", "str")
            if role is not None and self._known(role, fields.path("role")):
                own_role = role
            if fields.has("adapter"):
                adapter = named(
                    self.context, ADAPTERS, fields.raw("adapter"), fields.path("adapter"), ("source", "target")
                )
            path = fields.take("path", "str", "")
            fields.done()
            bare = role is not None
        elif isinstance(value, str):
            path, bare = value, False
        else:
            self.context.fault(item_key, f"an operand is an address such as `teacher:layer3`, got {value!r}.")
            return None
        return self._address(path, own_role, item_key, adapter, bare)

    def _address(self, text: str, own_role: str | None, key: str, adapter: Named | None, bare: bool) -> _Read | None:
        match = _ADDRESS.fullmatch(text)
        if match is None:
            self.context.fault(key, f"{text!r} is no address; write ROLE:PATH, ROLE:PATH@CALL or ROLE:PATH/in.")
            return None
        role, path, call = match["role"], match["path"], int(match["call"] or 1)
        if role is None and path in self.roles and not bare:
            role, path = path, ""
        if role is not None and not self._known(role, key):
            return None
        role = role if role is not None else own_role
        if role is None or role not in self.roles:
            known = ", ".join(self.roles)
            self.context.fault(
                key,
                f"{text!r} names no role, and there is no role `{role or 'student'}`; write ROLE:PATH "
                f"(roles: {known}).",
            )
            return None
        if call < 1:
            self.context.fault(key, f"calls are counted from 1, got @{call}.")
            return None
        operand = Operand(
            role=role,
            path=path or "logits",
            call=call,
            side="in" if match["side"] == "/in" else "out",
            adapter=adapter,
            place=self.context.place(key),
        )
        return _Read(operand, bool(path))

    def _known(self, role: str, key: str) -> bool:
        if role not in self.roles:
            self.context.fault(key, f"no role {role!r}.{nearest(role, self.roles)}")
        return role in self.roles
