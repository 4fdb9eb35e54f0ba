"""`baseline: true`: the same student, initialisation, order and crops, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kdbench.config.parse.roles import upstream_closure
from kdbench.config.schema import (
    EdgeConfig,
    InnerStepConfig,
    PartWithOperands,
    Recipe,
    RoleConfig,
    StageConfig,
    TermConfig,
    UpdateConfig,
)
from kdbench.errors import ConfigError


def remove_teachers(recipe: Recipe) -> Recipe:
    """Drops every role that teaches another, each term that reads one, and what hangs on them; says what it dropped.

    The exported role and whatever its input needs always stay, and so does a role of which a stage makes something: it
    labels or chooses data, which is no teaching.

    Raises:
        ConfigError: nothing is left to train.
    """
    stages: list[StageConfig] = []
    dropped: list[str] = []
    for stage in recipe.stages:
        left = _stage(stage, {kept.name: kept for kept in stages}, dropped, len(recipe.stages) > 1)
        if left is not None:
            stages.append(left)
    if not stages:
        raise ConfigError(
            f"{recipe.locations.get('twin', recipe.file)}: twin leaves nothing to train: every term of "
            f"{recipe.name} reads a teacher. Add a term that reads labels, such as cross_entropy."
        )
    return replace(recipe, stages=tuple(stages), baseline_removed=tuple(dropped))


def _stage(
    stage: StageConfig, earlier: Mapping[str, StageConfig], dropped: list[str], several: bool
) -> StageConfig | None:
    where = f"stage {stage.name}: " if several else ""
    gone = _teachers(stage)
    makers = _behind_makers(stage)  # they label or choose data, but teach no more
    roles = {name: role for name, role in stage.roles.items() if name not in gone - makers}
    terms: dict[str, TermConfig] = {}
    for name, term in stage.terms.items():
        left = _term(term, stage, gone)
        if left is not None:
            terms[name] = left
    trains = bool(stage.epochs or stage.steps)
    if trains and not terms and not stage.artifacts:
        dropped.append(f"{where}the whole stage, whose terms all read a teacher" if several else "every term")
        return None
    dropped += [f"{where}role {name}" for name in stage.roles if name not in roles]
    dropped += [f"{where}term {name}" for name in stage.terms if name not in terms]
    dropped += [
        f"{where}how term {n} is weighed"
        for n, term in terms.items()
        if term.sample_weight != stage.terms[n].sample_weight
    ]
    dropped += [f"{where}how term {n} is routed" for n, term in terms.items() if term.route != stage.terms[n].route]
    for name, role in roles.items():
        weights = role.weights
        if weights is None or weights.stage is None:
            continue
        source = earlier.get(weights.stage)
        if source is None or any(wanted not in source.roles for wanted in weights.role or (name,)):
            roles[name] = replace(role, weights=None)
            dropped.append(f"{where}the weights that role {name} took from stage {weights.stage}")
    updates: list[UpdateConfig] = []
    for update in stage.updates:
        models = tuple(name for name in update.models if name in roles)
        names = tuple(name for name in update.terms if name in terms)
        if models and names:
            select = None if _reads(update.select, gone) else update.select
            if select != update.select:
                dropped.append(f"{where}how the update of {', '.join(models)} chooses its rows")
            keep = update.keep if select is not None else None
            after = _virtual(update.inner_step, roles, terms)
            if after is None and update.inner_step is not None:
                dropped.append(f"{where}the virtual step before the update of {', '.join(models)}")
            updates.append(replace(update, models=models, terms=names, select=select, keep=keep, inner_step=after))
    metrics = tuple(metric for metric in stage.metrics if metric.type != "agreement")
    kept = replace(stage, roles=roles, terms=terms, updates=tuple(updates), metrics=metrics)
    kept = replace(kept, evaluate=tuple(name for name in stage.evaluate if name in roles))
    return kept if terms or not trains else replace(kept, epochs=0, steps=None)


def _virtual(
    after: InnerStepConfig | None, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> InnerStepConfig | None:
    """A virtual step by what is left; None when nothing of it is."""
    if after is None:
        return None
    models = tuple(name for name in after.models if name in roles)
    names = tuple(name for name in after.terms if name in terms)
    return replace(after, models=models, terms=names) if models and names else None


def _term(term: TermConfig, stage: StageConfig, gone: set[str]) -> TermConfig | None:
    """A term without the edges that read a teacher; None when nothing of it is left."""
    if any(leaf.role in gone for operand in term.operands.values() for leaf in operand.feature_operands()):
        return None
    edges = tuple(edge for edge in term.edges if not _taught(edge, stage, gone))
    weigh = None if _reads(term.sample_weight, gone) else term.sample_weight
    route = None if _reads(term.route, gone) or len(edges) < 2 else term.route
    return replace(term, edges=edges, sample_weight=weigh, route=route) if edges else None


def _taught(edge: EdgeConfig, stage: StageConfig, gone: set[str]) -> bool:
    """Whether a teacher stands on an edge: one of the roles that go, or what an earlier stage made of one."""
    teacher = [] if edge.teacher is None else list(edge.teacher.leaves())
    stored = any(
        leaf.kind == "artifact" or (leaf.kind == "field" and stage.data[leaf.role].artifact is not None)
        for leaf in teacher
    )
    features = [*edge.student.feature_operands(), *(leaf for leaf in teacher if leaf.kind == "role")]
    return stored or any(leaf.role in gone for leaf in features)


def _reads(part: PartWithOperands | None, gone: set[str]) -> bool:
    """Whether a weigher, router or selector reads a role that goes."""
    operands = part.operands.values() if part is not None else ()
    return any(leaf.role in gone for operand in operands for leaf in operand.feature_operands())


def _teachers(stage: StageConfig) -> set[str]:
    """The roles that teach another, and those that follow or see one of them."""
    needed = upstream_closure([stage.export], stage.roles, include_source_roles=True)
    gone: set[str] = set()
    for edge in (edge for term in stage.terms.values() for edge in term.edges if edge.teacher is not None):
        own = {leaf.role for leaf in edge.student.feature_operands()}
        gone |= {leaf.role for leaf in edge.teacher.feature_operands()} - own if edge.teacher is not None else set()
    gone -= needed
    changed = True
    while changed:
        changed = False
        for name, role in stage.roles.items():
            if name not in gone | needed and not gone.isdisjoint((role.source_role, *role.upstream_roles)):
                gone.add(name)
                changed = True
    return gone


def _behind_makers(stage: StageConfig) -> set[str]:
    """The roles of which the stage makes something, and those that they follow or see."""
    made = (
        leaf.role
        for make in stage.artifacts.values()
        for op in make.part.operands.values()
        for leaf in op.feature_operands()
    )
    return upstream_closure(made, stage.roles, include_source_roles=True)
