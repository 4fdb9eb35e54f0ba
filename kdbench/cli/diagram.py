"""Draws a stage of a recipe as a text diagram: inputs of networks, losses between them, updates, artifacts, outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kdbench.config.schema import EdgeConfig, OperandConfig, RoleConfig, StageConfig, TermConfig
from kdbench.registry import ARTIFACTS, TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.dry_run import UpdatePlan
    from kdbench.engine.plan.plan import StagePlan

LABELS = ("inputs", "terms", "updates", "artifacts", "outputs")
INDENT = max(len(label) for label in LABELS) + 2


def draw_stage(plan: StagePlan, later: Sequence[StageConfig] = ()) -> list[str]:
    """Returns the lines of a stage's diagram.

    Args:
        plan: plan of the stage.
        later: stages after this stage. The section `outputs` lists the weights and artifacts that they read.
    """
    stage = plan.stage
    sections = (
        _input_lines(plan),
        _term_lines(stage, plan.resolved_stage.terms),
        _update_lines(plan.updates),
        _artifact_lines(stage),
        _output_lines(stage, later),
    )
    lines: list[str] = []
    for label, section in zip(LABELS, sections, strict=True):
        lines += [f"{'' if number else label:<{INDENT}}{line}" for number, line in enumerate(section)]
    return lines


def stage_sequence(stages: Sequence[StageConfig]) -> str:
    """Returns the names of all stages as text. A loop is written once: `prepare -> 4 x (train -> query)`."""
    parts: list[str] = []
    position = 0
    names = [stage.name for stage in stages]
    while position < len(names):
        base, _, number = names[position].partition("@")
        if not number:
            parts.append(base)
            position += 1
            continue
        # A loop's rounds are expanded as `a@1 b@1 a@2 b@2`: the first round gives the body, the rest is counted.
        body = [base]
        while position + len(body) < len(names) and names[position + len(body)].endswith(f"@{number}"):
            body.append(names[position + len(body)].partition("@")[0])
        rounds = 0
        while names[position : position + len(body)] == [f"{name}@{int(number) + rounds}" for name in body]:
            position += len(body)
            rounds += 1
        inner = " -> ".join(body)
        parts.append(f"{rounds} x ({inner})" if len(body) > 1 else f"{rounds} x {inner}")
    return " -> ".join(parts)


def active_roles(plan: StagePlan) -> list[str]:
    """Returns the names of the roles (networks) that run in a stage.

    These are the evaluated roles, the roles whose features are operands, and all roles that provide their inputs.
    """
    stage = plan.stage
    queue = [stage.export, *stage.evaluate]
    queue += [leaf.role for leaf in stage.read_operands(plan.resolved_stage.terms) if leaf.kind == "role"]
    active: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in active:
            active.add(name)
            queue += stage.roles[name].upstream_roles
    return [name for name in plan.resolved_stage.order if name in active]


def is_trained(stage: StageConfig) -> bool:
    """Returns whether a stage trains. A stage of 0 epochs or 0 steps only evaluates networks or builds artifacts."""
    return stage.epochs != 0 and stage.steps != 0


def is_never_updated(role: RoleConfig, stage: StageConfig) -> bool:
    """Returns whether a role (a network) is trainable, but no update of the stage trains it."""
    if role.mode != "trainable" or not stage.updates:
        return False
    updated = [stage.roles[name] for update in stage.updates for name in update.models]
    # An update of a role that reuses this network updates this network.
    return not any(role.name in (model.name, model.source_role if model.mode == "reuse" else None) for model in updated)


def weights_text(role: RoleConfig) -> str:
    """Returns the origin of a network's weights, such as `from digits/teacher at epoch 3`, or "" for random weights."""
    weights = role.weights
    if weights is None:
        return ""
    origin = f"stage {weights.stage}" if weights.stage else weights.recipe or weights.path
    roles = ""
    if len(weights.role) > 1:
        roles = f", mean of {' and '.join(weights.role)}"
    elif weights.role and weights.role[0] != role.name:
        roles = f", role {weights.role[0]}"
    return f"from {origin}{roles}" + (f" at epoch {weights.epoch}" if weights.epoch is not None else "")


def updated_models(update: UpdatePlan) -> str:
    """Returns the names of the models in an update that have at least one parameter with a gradient."""
    names = [
        name
        for name in update.config.models
        if any(parameter.startswith(f"{name}.") for parameter in update.parameters)
    ]
    return ", ".join(names) or "the terms' own parameters"


def _input_lines(plan: StagePlan) -> Iterator[str]:
    """Yields the lines of the diagram of inputs.

    For each field of a source, such as `train.image`, there is a tree of the roles (networks) that read this field.
    """
    stage = plan.stage
    children: dict[str, list[str]] = {}
    for name in active_roles(plan):
        children.setdefault(_parent(stage.roles[name].input), []).append(name)
    for address in (address for address in children if "." in address and ":" not in address):
        yield address
        yield from _branch_lines(stage, children, address, "")


def _parent(address: str) -> str:
    """Returns `ROLE` for an input address `ROLE:PATH`. An address `SOURCE.FIELD` is returned unchanged."""
    return address.split(":", 1)[0]


def _branch_lines(stage: StageConfig, children: Mapping[str, Sequence[str]], parent: str, lead: str) -> Iterator[str]:
    names = children.get(parent, ())
    for number, name in enumerate(names):
        is_last = number == len(names) - 1
        role = stage.roles[name]
        path = role.input.split(":", 1)[1] if ":" in role.input else ""
        feature = f"{path} » " if path not in ("", "logits", "image") else ""
        extra_inputs = f" with {', '.join(role.extra_inputs)}" if role.extra_inputs else ""
        yield f"{lead}{'└─' if is_last else '├─'} {feature}{name}{extra_inputs} ({_role_text(role, stage)})"
        yield from _branch_lines(stage, children, name, f"{lead}{'   ' if is_last else '│  '}")


def _role_text(role: RoleConfig, stage: StageConfig) -> str:
    trainable = "train mode, not updated" if is_never_updated(role, stage) else "trained"
    mode = {
        "frozen": "frozen",
        "trainable": trainable if is_trained(stage) else "not trained",
        "ema": f"EMA of {role.source_role}",
        "snapshot": f"snapshot of {role.source_role}",
        "reuse": f"reuses {role.source_role}{':' + role.module_path if role.module_path else ''}",
    }[role.mode]
    exported = "exported" if role.name == stage.export else ""
    artifact = f"artifact {role.artifact}" if role.artifact else ""
    return ", ".join(text for text in (mode, artifact, weights_text(role), exported) if text)


def _term_lines(stage: StageConfig, terms: Sequence[str]) -> Iterator[str]:
    configs = [stage.terms[name] for name in terms]
    edges = [(_teacher_label(edge, config), config, edge) for config in configs for edge in config.edges]
    width = max((len(teacher) for teacher, _, _ in edges), default=0)
    for teacher, config, edge in edges:
        is_maximized = isinstance(config.weight, int | float) and config.weight < 0
        name = f"{config.name}, maximized" if is_maximized else config.name
        parts = (("router", config.route), ("sample weight", config.sample_weight))
        options = [f"{kind} {part.type}" for kind, part in parts if part]
        options += [f"mask {config.mask}"] if config.mask else []
        operands = [f"{name} = {_operand_label(operand)}" for name, operand in config.operands.items()]
        options += [f"with {', '.join(operands)}"] if operands else []
        # An arrow at both ends: the term has a gradient to the teacher too.
        has_teacher_gradient = config.teacher_grad and edge.teacher is not None
        suffix = f"  ({', '.join(options)})" if options else ""
        arrow = f"{'<' if has_teacher_gradient else '─'}─ {name} ─>"
        yield f"{teacher:>{width}} {arrow} {_operand_label(edge.student)}{suffix}"


def _teacher_label(edge: EdgeConfig, config: TermConfig) -> str:
    if edge.teacher is not None:
        return _operand_label(edge.teacher)
    return "labels" if "label" in TERMS.entry(config.type).inputs else ""


def _operand_label(operand: OperandConfig) -> str:
    """Returns an operand as text, such as `student:layer2`. The default path `:logits` is omitted."""
    if operand.combiner is not None:
        return f"{operand.combiner.type}({', '.join(_operand_label(part) for part in operand.parts)})"
    return re.sub(r":logits$", "", str(operand))


def _update_lines(updates: Sequence[UpdatePlan]) -> Iterator[str]:
    number = 0
    previous_group: int | None = None
    for plan in updates:
        update = plan.config
        # The updates of a group compute gradients at the same weights, so they share a number (`&` from the second on).
        is_joined = update.group is not None and update.group == previous_group
        previous_group = update.group
        number += not is_joined
        options = f", {update.repeat} times" if update.repeat > 1 else ""
        if update.select is not None and update.keep is not None:
            options += f", on {update.keep:g} of the rows, selected by {update.select.type}"
        if update.inner_step is not None:
            inner = update.inner_step
            options += f", through an inner step of {', '.join(inner.models)} on {', '.join(inner.terms)}"
        label = "&".rjust(len(f"{number}.")) if is_joined else f"{number}."
        prefix = f"{label} " if len(updates) > 1 else ""
        yield f"{prefix}{updated_models(plan)} on {', '.join(update.terms)}{options}"


def _artifact_lines(stage: StageConfig) -> Iterator[str]:
    for name, artifact in stage.artifacts.items():
        part = artifact.part
        product = ARTIFACTS.entry(part.type).facts.get("produces", "artifact")
        source = f" over source {artifact.source}" if artifact.source else ""
        operands = ", ".join(_operand_label(operand) for operand in part.operands.values())
        yield f"{stage.name}.{name}: {product}, by {part.type}{source}{' from ' + operands if operands else ''}"


def _output_lines(stage: StageConfig, later: Sequence[StageConfig]) -> Iterator[str]:
    """Yields one line per output (weights or artifact) of a stage, with the names of the later stages that read it."""
    readers: dict[tuple[str, str], list[str]] = {}
    for reader in later:
        for output, purpose in _dependencies(stage, reader):
            readers.setdefault((output, purpose), []).append(reader.name)
    for (output, purpose), names in readers.items():
        stages = f"stages {names[0]} to {names[-1]}" if len(names) > 2 else f"stage {' and '.join(names)}"
        yield f"{output} ─> {purpose} {stages}"


def _dependencies(stage: StageConfig, reader: StageConfig) -> Iterator[tuple[str, str]]:
    """Yields the outputs of `stage` that a later stage reads, as pairs (output, purpose).

    Args:
        stage: stage that has the outputs.
        reader: later stage. The purpose is text such as `subset of source train in`.
    """
    for role in reader.roles.values():
        if role.weights is not None and role.weights.stage == stage.name:
            origin = " and ".join(role.weights.role) or role.name
            yield f"{'mean of ' if len(role.weights.role) > 1 else ''}{origin}", f"{role.name} of"
        if role.artifact is not None and _artifact_stage(role.artifact) == stage.name:
            yield role.artifact, f"model of {role.name} in"
    for source in reader.data.values():
        uses = ((source.artifact, "samples"), (source.subset, "subset"), (source.label_fraction, "labels"))
        for value, purpose in uses:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and _artifact_stage(text) == stage.name:
                    yield text, f"{purpose} of source {source.name} in"
    for term in reader.terms.values():
        for leaf in term.read_operands():
            if leaf.kind == "artifact" and leaf.role == stage.name:
                yield f"{leaf.role}.{leaf.path}", f"term {term.name} of"


def _artifact_stage(artifact: str) -> str:
    """Returns `STAGE` for an artifact `STAGE.NAME`."""
    return artifact.rsplit(".", 1)[0]
