"""Removes the teachers of a recipe for `baseline: true`.

The student, its initialisation, the order of the samples and their augmentations do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kdbench.config.parse.roles import upstream_closure
from kdbench.config.schema import (
    EdgeConfig,
    InnerStepConfig,
    OperandConfig,
    PartWithOperands,
    Recipe,
    RoleConfig,
    StageConfig,
    TermConfig,
    UpdateConfig,
)
from kdbench.errors import ConfigError


def remove_teachers(recipe: Recipe) -> Recipe:
    """Removes every role (network) that teaches another role, and everything that depends on such a role.

    All terms that read a teaching role are removed. The exported role is kept, and so are the roles whose outputs the
    exported role reads. A role is also kept if an artifact is computed from its outputs, because labelling or
    selecting data is not distillation.

    Raises:
        ConfigError: nothing remains to train.
    """
    stages: dict[str, StageConfig] = {}
    removed: list[str] = []
    for stage in recipe.stages:
        prefix = f"stage {stage.name}: " if len(recipe.stages) > 1 else ""
        remover = _TeacherRemover(stage, stages, prefix)
        baseline = remover.remove()
        removed += remover.removed
        if baseline is not None:
            stages[baseline.name] = baseline
    if not stages:
        raise ConfigError(
            f"{recipe.locations.get('baseline', recipe.file)}: the baseline has nothing to train: every term of "
            f"{recipe.name} reads a teacher. Add a term that reads labels, such as cross_entropy."
        )
    return replace(recipe, stages=tuple(stages.values()), baseline_removed=tuple(removed))


class _TeacherRemover:
    """Removes the teachers of one stage.

    Args:
        earlier: name -> earlier stage from which the teachers are already removed.
        prefix: beginning of each description of a removed item, such as "stage hint: ".
    """

    def __init__(self, stage: StageConfig, earlier: Mapping[str, StageConfig], prefix: str) -> None:
        self.stage = stage
        self.earlier = earlier
        self.prefix = prefix
        self.teachers = _teachers(stage)
        self.removed: list[str] = []

    def remove(self) -> StageConfig | None:
        """Returns the stage without teachers, or None if nothing remains to be trained or computed in it."""
        stage = self.stage
        # A teacher that an artifact reads still labels or selects data, but its terms are removed.
        removed_roles = self.teachers - _artifact_roles(stage)
        roles = {name: role for name, role in stage.roles.items() if name not in removed_roles}
        reduced_terms = {name: self._reduce_term(term) for name, term in stage.terms.items()}
        terms = {name: term for name, term in reduced_terms.items() if term is not None}
        trains = bool(stage.epochs or stage.steps)
        if trains and not terms and not stage.artifacts:
            self._note("the stage, since all its terms read a teacher" if self.prefix else "every term")
            return None
        self._note_removed(roles, terms)
        reduced = replace(
            stage,
            roles={name: self._without_removed_weights(role) for name, role in roles.items()},
            terms=terms,
            updates=self._reduce_updates(roles, terms),
            metrics=tuple(metric for metric in stage.metrics if metric.type != "agreement"),
            evaluate=tuple(name for name in stage.evaluate if name in roles),
        )
        return reduced if terms or not trains else replace(reduced, epochs=0, steps=None)

    def _note(self, description: str) -> None:
        self.removed.append(f"{self.prefix}{description}")

    def _note_removed(self, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]) -> None:
        for name in self.stage.roles:
            if name not in roles:
                self._note(f"role {name}")
        for name in self.stage.terms:
            if name not in terms:
                self._note(f"term {name}")
        for name, term in terms.items():
            if term.sample_weight != self.stage.terms[name].sample_weight:
                self._note(f"sample weight of term {name}")
        for name, term in terms.items():
            if term.route != self.stage.terms[name].route:
                self._note(f"router of term {name}")

    def _without_removed_weights(self, role: RoleConfig) -> RoleConfig:
        """Removes the `weights` of a role if they come from a stage or a role that was removed."""
        weights = role.weights
        if weights is None or weights.stage is None:
            return role
        source = self.earlier.get(weights.stage)
        if source is not None and all(name in source.roles for name in weights.role or (role.name,)):
            return role
        self._note(f"weights of role {role.name} from stage {weights.stage}")
        return replace(role, weights=None)

    def _reduce_updates(
        self, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
    ) -> tuple[UpdateConfig, ...]:
        updates: list[UpdateConfig] = []
        for update in self.stage.updates:
            models = tuple(name for name in update.models if name in roles)
            names = tuple(name for name in update.terms if name in terms)
            if not models or not names:
                continue
            select = None if self._reads_teacher(update.select) else update.select
            if select != update.select:
                self._note(f"selection of rows in the update of {', '.join(models)}")
            inner_step = _reduce_inner_step(update.inner_step, roles, terms)
            if inner_step is None and update.inner_step is not None:
                self._note(f"inner step of the update of {', '.join(models)}")
            keep = update.keep if select is not None else None
            updates.append(replace(update, models=models, terms=names, select=select, keep=keep, inner_step=inner_step))
        return tuple(updates)

    def _reduce_term(self, term: TermConfig) -> TermConfig | None:
        """Removes the edges (operand pairs) of a term that read a teacher. Returns None if no edge remains."""
        if any(self._is_teacher(operand) for operand in term.operands.values()):
            return None
        edges = tuple(edge for edge in term.edges if not self._has_teacher(edge))
        sample_weight = None if self._reads_teacher(term.sample_weight) else term.sample_weight
        route = None if self._reads_teacher(term.route) or len(edges) < 2 else term.route
        return replace(term, edges=edges, sample_weight=sample_weight, route=route) if edges else None

    def _has_teacher(self, edge: EdgeConfig) -> bool:
        """Returns whether an edge (operand pair) reads a teacher, or an artifact in place of a teacher."""
        leaves = [] if edge.teacher is None else list(edge.teacher.leaves())
        is_stored = any(
            leaf.kind == "artifact" or (leaf.kind == "field" and self.stage.data[leaf.role].artifact is not None)
            for leaf in leaves
        )
        operands = [edge.student] if edge.teacher is None else [edge.student, edge.teacher]
        return is_stored or any(self._is_teacher(operand) for operand in operands)

    def _reads_teacher(self, part: PartWithOperands | None) -> bool:
        return part is not None and any(self._is_teacher(operand) for operand in part.operands.values())

    def _is_teacher(self, operand: OperandConfig) -> bool:
        return any(leaf.role in self.teachers for leaf in operand.feature_operands())


def _reduce_inner_step(
    inner_step: InnerStepConfig | None, roles: Mapping[str, RoleConfig], terms: Mapping[str, TermConfig]
) -> InnerStepConfig | None:
    """Removes all roles and terms that are not in `roles` and `terms`. Returns None if no role or no term remains."""
    if inner_step is None:
        return None
    models = tuple(name for name in inner_step.models if name in roles)
    names = tuple(name for name in inner_step.terms if name in terms)
    return replace(inner_step, models=models, terms=names) if models and names else None


def _teachers(stage: StageConfig) -> set[str]:
    """Returns the names of all roles that teach another role, are derived from a teaching role, or read its output."""
    needed = upstream_closure([stage.export], stage.roles, include_source_roles=True)
    teachers: set[str] = set()
    for term in stage.terms.values():
        for edge in term.edges:
            if edge.teacher is not None:
                students = {leaf.role for leaf in edge.student.feature_operands()}
                teachers |= {leaf.role for leaf in edge.teacher.feature_operands()} - students
    teachers -= needed
    grows = True
    while grows:
        dependent = {
            name
            for name, role in stage.roles.items()
            if name not in teachers | needed and not teachers.isdisjoint((role.source_role, *role.upstream_roles))
        }
        teachers |= dependent
        grows = bool(dependent)
    return teachers


def _artifact_roles(stage: StageConfig) -> set[str]:
    """Returns the names of all roles that artifacts of the stage read, directly or through other roles."""
    roles = (
        leaf.role
        for artifact in stage.artifacts.values()
        for operand in artifact.part.operands.values()
        for leaf in operand.feature_operands()
    )
    return upstream_closure(roles, stage.roles, include_source_roles=True)
