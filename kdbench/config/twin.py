"""`twin: true`: the same student, initialisation, order and crops, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kdbench.config.schema import Recipe, RoleConfig, StageConfig, TermConfig, UpdateConfig
from kdbench.errors import ConfigError


def without_teachers(recipe: Recipe) -> Recipe:
    """Drops every role that teaches another, each term that reads one, and what hangs on them; says what it dropped.

    The exported role and whatever its input needs always stay.

    Raises:
        ConfigError: nothing is left to train.
    """
    stages: list[StageConfig] = []
    dropped: list[str] = []
    for stage in recipe.stages:
        left = _stage(stage, {kept.name for kept in stages}, dropped, len(recipe.stages) > 1)
        if left is not None:
            stages.append(left)
    if not stages:
        raise ConfigError(
            f"{recipe.places.get('twin', recipe.file)}: twin leaves nothing to train: every term of "
            f"{recipe.name} reads a teacher. Add a term that reads labels, such as cross_entropy."
        )
    return replace(recipe, stages=tuple(stages), dropped=tuple(dropped))


def _stage(stage: StageConfig, earlier: set[str], dropped: list[str], several: bool) -> StageConfig | None:
    where = f"stage {stage.name}: " if several else ""
    gone = _teachers(stage)
    roles = {name: role for name, role in stage.roles.items() if name not in gone}
    terms: dict[str, TermConfig] = {}
    for name, term in stage.terms.items():
        edges = tuple(
            edge
            for edge in term.edges
            if edge.student.role in roles and (edge.teacher is None or edge.teacher.role in roles)
        )
        if edges:
            terms[name] = replace(term, edges=edges)
    trains = bool(stage.epochs or stage.steps)
    if trains and not terms:
        dropped.append(f"{where}the whole stage, whose terms all read a teacher" if several else "every term")
        return None
    dropped += [f"{where}role {name}" for name in stage.roles if name in gone]
    dropped += [f"{where}term {name}" for name in stage.terms if name not in terms]
    for name, role in roles.items():
        if role.weights is not None and role.weights.stage is not None and role.weights.stage not in earlier:
            roles[name] = replace(role, weights=None)
            dropped.append(f"{where}the weights that role {name} took from stage {role.weights.stage}")
    updates: list[UpdateConfig] = []
    for update in stage.updates:
        models = tuple(name for name in update.models if name in roles)
        names = tuple(name for name in update.terms if name in terms)
        if models and names:
            updates.append(replace(update, models=models, terms=names))
    metrics = tuple(metric for metric in stage.metrics if metric.type != "agreement")
    return replace(stage, roles=roles, terms=terms, updates=tuple(updates), metrics=metrics)


def _teachers(stage: StageConfig) -> set[str]:
    """The roles that teach another, and those that follow or see one of them."""
    needed = _upstream(stage.export, stage.roles)
    edges = [edge for term in stage.terms.values() for edge in term.edges if edge.teacher is not None]
    gone = {e.teacher.role for e in edges if e.teacher is not None and e.teacher.role != e.student.role} - needed
    changed = True
    while changed:
        changed = False
        for name, role in stage.roles.items():
            upstream = role.input.split(":", 1)[0] if ":" in role.input else None
            if name not in gone | needed and (role.of in gone or upstream in gone):
                gone.add(name)
                changed = True
    return gone


def _upstream(name: str, roles: Mapping[str, RoleConfig]) -> set[str]:
    """A role, what it follows and what it sees."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        role = roles.get(waiting.pop())
        if role is None or role.name in found:
            continue
        found.add(role.name)
        if role.of is not None:
            waiting.append(role.of)
        if ":" in role.input:
            waiting.append(role.input.split(":", 1)[0])
    return found
