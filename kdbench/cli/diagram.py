"""A stage as a small drawing: who sees what, who teaches whom, who moves by what and when, what is handed on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kdbench.config.schema import EdgeConfig, OperandConfig, RoleConfig, StageConfig, TermConfig
from kdbench.registry import ARTIFACTS, TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.dry_run import UpdatePlan
    from kdbench.engine.plan.plan import StagePlan


LABELS = ("sees", "teaches", "moves", "makes", "hands on")


INDENT = max(len(label) for label in LABELS) + 2


def draw_stage(plan: StagePlan, later: Sequence[StageConfig] = ()) -> list[str]:
    """Draws one stage, line by line.

    Args:
        later: the stages after it, of which some may start from what it leaves.
    """
    stage = plan.stage
    sections = {
        "sees": list(_input_lines(plan)),
        "teaches": list(_term_lines(stage, plan.resolved_stage.terms)),
        "moves": list(_update_lines(plan.updates)),
        "makes": list(_artifact_lines(stage)),
        "hands on": list(_later_stage_lines(stage, later)),
    }
    lines = []
    for label, body in sections.items():
        for number, line in enumerate(body):
            lines.append(f"{label if number == 0 else '':<{INDENT}}{line}")
    return lines


def stage_sequence(stages: Sequence[StageConfig]) -> str:
    """The stages in their order, the rounds of a loop told once: `prepare -> 4 x (train -> query)`."""
    parts: list[str] = []
    position = 0
    names = [stage.name for stage in stages]
    while position < len(names):
        base, _, number = names[position].partition("@")
        if not number:
            parts.append(base)
            position += 1
            continue
        body = [base]
        while position + len(body) < len(names) and names[position + len(body)].endswith(f"@{number}"):
            body.append(names[position + len(body)].partition("@")[0])
        rounds = 0
        expected = int(number)
        while names[position : position + len(body)] == [f"{name}@{expected}" for name in body]:
            position += len(body)
            rounds += 1
            expected += 1
        inner = " -> ".join(body)
        parts.append(f"{rounds} x ({inner})" if len(body) > 1 else f"{rounds} x {inner}")
    return " -> ".join(parts)


def _input_lines(plan: StagePlan) -> Iterator[str]:
    """The fields of the sources, and below each the roles that see it, and those that see these."""
    stage = plan.stage
    children: dict[str, list[str]] = {}
    for name in active_roles(plan):
        children.setdefault(_root_name(stage.roles[name].input), []).append(name)
    for address in (address for address in children if "." in address and ":" not in address):
        yield address
        yield from _branch_lines(stage, children, address, "")


def active_roles(plan: StagePlan) -> list[str]:
    """The roles that run in a stage: what terms and makers read, what is measured, and what those see."""
    stage = plan.stage
    waiting = [stage.export, *stage.evaluate]
    waiting += [leaf.role for leaf in stage.read_operands(plan.resolved_stage.terms) if leaf.kind == "role"]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            role = stage.roles[name]
            waiting += [_root_name(address) for address in (role.input, *role.extra_inputs) if ":" in address]
    return [name for name in plan.resolved_stage.order if name in found]


def _root_name(address: str) -> str:
    """The role that an address belongs to, or the field of a source itself."""
    return address.split(":", 1)[0] if ":" in address else address


def _branch_lines(stage: StageConfig, children: Mapping[str, Sequence[str]], parent: str, lead: str) -> Iterator[str]:
    own = children.get(parent, ())
    for number, name in enumerate(own):
        last = number == len(own) - 1
        role = stage.roles[name]
        path = role.input.split(":", 1)[1] if ":" in role.input else ""
        at = f"{path} " if path not in ("", "logits", "image") else ""
        besides = f" with {', '.join(role.extra_inputs)}" if role.extra_inputs else ""
        yield f"{lead}{'└─' if last else '├─'} {at}{'» ' if at else ''}{name}{besides} ({_role_text(role, stage)})"
        yield from _branch_lines(stage, children, name, f"{lead}{'   ' if last else '│  '}")


def is_never_updated(role: RoleConfig, stage: StageConfig) -> bool:
    """Whether a role could learn, but the stage has updates and none of them names it."""
    if role.mode != "trainable" or not stage.updates:
        return False
    named = [stage.roles[name] for update in stage.updates for name in update.models]
    return all(role.name not in (one.name, one.source_role if one.mode == "reuse" else None) for one in named)


def _role_text(role: RoleConfig, stage: StageConfig) -> str:
    words = {
        "frozen": "frozen",
        "trainable": "in train mode, moved by nothing" if is_never_updated(role, stage) else "learns",
        "ema": f"average of {role.source_role}",
        "snapshot": f"copy of {role.source_role}",
        "reuse": f"{role.source_role}{':' + role.module_path if role.module_path else ''} itself",
    }[role.mode]
    where = weights_text(role)
    return words + (f", {where}" if where else "") + (", the result" if role.name == stage.export else "")


def weights_text(role: RoleConfig) -> str:
    """Where a role's weights come from, in words; empty where they are drawn from the seed."""
    weights = role.weights
    if weights is None:
        return ""
    where = f"stage {weights.stage}" if weights.stage else weights.recipe or weights.path
    own = ""
    if len(weights.role) > 1:
        own = f", the mean of {' and '.join(weights.role)}"
    elif weights.role and weights.role[0] != role.name:
        own = f", its {weights.role[0]}"
    return f"from {where}{own}" + (f" at epoch {weights.epoch}" if weights.epoch is not None else "")


def _term_lines(stage: StageConfig, terms: Sequence[str]) -> Iterator[str]:
    configs = [stage.terms[name] for name in terms]
    drawn = [(_teacher_label(edge, config), config, edge) for config in configs for edge in config.edges]
    width = max((len(teacher) for teacher, _, _ in drawn), default=0)
    for teacher, config, edge in drawn:
        away = isinstance(config.weight, int | float) and config.weight < 0
        name = f"{config.name}, away" if away else config.name
        how = [
            f"{word} by {part.type}"
            for word, part in (("routed", config.route), ("weighed", config.sample_weight))
            if part
        ]
        how += [f"where {config.mask}"] if config.mask else []
        named = [f"{name} {_operand_label(operand)}" for name, operand in config.operands.items()]
        how += [f"with {', '.join(named)}"] if named else []
        both = config.teacher_grad and edge.teacher is not None
        told = f"  ({', '.join(how)})" if how else ""
        yield f"{teacher:>{width}} {'<' if both else '─'}─ {name} ─> {_operand_label(edge.student)}{told}"


def _teacher_label(edge: EdgeConfig, config: TermConfig) -> str:
    if edge.teacher is not None:
        return _operand_label(edge.teacher)
    return "labels" if "label" in TERMS.entry(config.type).inputs else ""


def _operand_label(operand: OperandConfig) -> str:
    """An address without what goes without saying."""
    if operand.combiner is not None:
        return f"{operand.combiner.type}({', '.join(_operand_label(part) for part in operand.parts)})"
    return re.sub(r":logits$", "", str(operand))


def updated_models(update: UpdatePlan) -> str:
    """The models that an update really moves: those with a parameter that its terms reach."""
    found = [name for name in update.config.models if any(p.startswith(f"{name}.") for p in update.parameters)]
    return ", ".join(found) or "the terms' own parameters"


def _update_lines(updates: Sequence[UpdatePlan]) -> Iterator[str]:
    number = 0
    before: int | None = None
    for plan in updates:
        update = plan.config
        together = update.group is not None and update.group == before
        before = update.group
        number += not together
        how = f", {update.repeat} times" if update.repeat > 1 else ""
        if update.select is not None and update.keep is not None:
            how += f", on {update.keep:g} of the rows, chosen by {update.select.type}"
        if update.inner_step is not None:
            how += f", after a virtual step of {', '.join(update.inner_step.models)} by {', '.join(update.inner_step.terms)}"
        label = f"{number}." if not together else "&".rjust(len(f"{number}."))
        yield f"{label + ' ' if len(updates) > 1 else ''}{updated_models(plan)} by {', '.join(update.terms)}{how}"


def _artifact_lines(stage: StageConfig) -> Iterator[str]:
    for name, make in stage.artifacts.items():
        kind = ARTIFACTS.entry(make.part.type).facts.get("produces", "thing")
        source = f" over {make.source}" if make.source else ""
        read = ", ".join(_operand_label(operand) for operand in make.part.operands.values())
        yield f"{stage.name}.{name}, a {kind}, by {make.part.type}{source}{' from ' + read if read else ''}"


def _later_stage_lines(stage: StageConfig, later: Sequence[StageConfig]) -> Iterator[str]:
    """What later stages start from, each with all the stages that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for other in later:
        for what, becomes in _dependencies(stage, other):
            found.setdefault((what, becomes), []).append(other.name)
    for (what, becomes), names in found.items():
        shown = f"stages {names[0]} to {names[-1]}" if len(names) > 2 else f"stage {' and '.join(names)}"
        yield f"{what} ─> {becomes} {shown}"


def _dependencies(stage: StageConfig, other: StageConfig) -> Iterator[tuple[str, str]]:
    """What another stage takes from this one, and what becomes of it there."""
    for role in other.roles.values():
        if role.weights is not None and role.weights.stage == stage.name:
            own = " and ".join(role.weights.role) or role.name
            yield f"{'the mean of ' if len(role.weights.role) > 1 else ''}{own}", f"{role.name} of"
        if role.artifact is not None and _artifact_stage(role.artifact) == stage.name:
            yield role.artifact, f"the model of {role.name} in"
    for source in other.data.values():
        for made, what in ((source.artifact, "samples"), (source.subset, "choice"), (source.label_fraction, "labels")):
            for text in made if isinstance(made, tuple) else (made,):
                if isinstance(text, str) and _artifact_stage(text) == stage.name:
                    yield text, f"the {what} of source {source.name} in"
    for term in other.terms.values():
        for leaf in term.read_operands():
            if leaf.kind == "artifact" and leaf.role == stage.name:
                yield f"{leaf.role}.{leaf.path}", f"term {term.name} of"


def _artifact_stage(made: str) -> str:
    """The stage that makes `STAGE.NAME`."""
    return made.rsplit(".", 1)[0]
