"""Parses one stage of a recipe. The keys of the stage are already merged over those of the top level."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdbench.config.parse.artifacts import read_artifacts
from kdbench.config.parse.data import read_sources
from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.loops import ONLY_STAGE, UnrolledStage
from kdbench.config.parse.optimizers import read_optimizer, read_scheduler
from kdbench.config.parse.parts import read_part
from kdbench.config.parse.roles import read_roles, resolve_inputs, upstream_closure
from kdbench.config.parse.terms import read_terms
from kdbench.config.parse.updates import read_updates
from kdbench.config.schema import PartConfig, Recipe, RoleConfig, StageConfig, TermConfig, declared_keys
from kdbench.config.schema.stage import CHECKPOINT_KEYS
from kdbench.errors import suggest
from kdbench.registry import METRICS

METRIC_INJECTED = ("num_classes", "device", "teacher")


DEFAULT_METRICS = ("top1", "top5", "nll", "ece")


TOP_LEVEL_KEYS = {**declared_keys(Recipe), **declared_keys(StageConfig)}
"""The keys at the top level of a recipe."""


def read_stage(context: ParseContext, unrolled: UnrolledStage, folder: Path, ancestors: tuple[str, ...]) -> StageConfig:
    """Parses all keys of a stage.

    Args:
        context: locations of the stage's keys, and the list of errors.
        unrolled: the stage with its unparsed keys.
        folder, ancestors: see `read_roles`.
    """
    top = KeyReader(context, unrolled.data, "", "the recipe", TOP_LEVEL_KEYS)
    fields = top.read_plain_fields(StageConfig)
    sources = read_sources(context, top, fields["eval_batch_size"], unrolled.artifact_names)
    roles = read_roles(context, top, folder, ancestors)
    if sources:
        roles = resolve_inputs(context, roles, sources)
    export = _read_export(top, roles)
    terms = read_terms(context, top, roles, export, sources, unrolled.artifact_names)
    fields |= {
        "name": unrolled.name,
        "roles": roles,
        "data": sources,
        "terms": terms,
        "updates": read_updates(context, top, roles, terms, sources),
        "artifacts": read_artifacts(context, top, roles, sources, export, unrolled),
        "export": export or "student",
        "evaluate": _check_evaluated(top, fields["evaluate"], roles, export),
        "scheduler": read_scheduler(context, top.get_raw("scheduler"), top.subkey("scheduler")),
        "metrics": _read_metrics(top, terms),
        "checkpoint_every": _read_checkpoint_interval(top),
    }
    if top.has("optimizer"):
        fields["optimizer"] = read_optimizer(context, top.get_raw("optimizer"), top.subkey("optimizer"))
    stage = StageConfig(**fields)
    _check_length(top)
    _check_training(context, stage, top.has("optimizer"))
    _check_evaluated_inputs(context, stage)
    return stage


def _read_export(top: KeyReader, roles: Mapping[str, RoleConfig]) -> str | None:
    """Returns the name of the exported role, or None if there is no such role."""
    if top.has("export"):
        export = top.read("export")
        if export not in roles:
            top.error("export", f"no role {export!r}.{suggest(str(export), roles)}")
            return None
        return export
    if "student" in roles:
        return "student"
    trainable = [name for name, role in roles.items() if role.mode == "trainable"]
    if len(trainable) == 1:
        return trainable[0]
    if roles:
        candidates = ", ".join(trainable or roles)
        top.error("", f"the role that is the result is ambiguous; write `export: ROLE`, one of {candidates}.")
    return None


def _check_evaluated(
    top: KeyReader, names: tuple[str, ...], roles: Mapping[str, RoleConfig], export: str | None
) -> tuple[str, ...]:
    """Returns the names in `evaluate`, without duplicates and without the exported role. Reports unknown roles."""
    for name in names:
        if name not in roles:
            top.error("evaluate", f"no role {name!r}.{suggest(name, roles)}")
    return tuple(name for name in dict.fromkeys(names) if name in roles and name != export)


def _check_length(top: KeyReader) -> None:
    if top.has("epochs") and top.has("steps"):
        top.error("steps", "`epochs` and `steps` exclude each other; keep one of them.")
    elif not top.has("epochs") and not top.has("steps"):
        top.error("", "the length of the training is missing; write `epochs: N` or `steps: N`.")


def _read_metrics(top: KeyReader, terms: Mapping[str, TermConfig]) -> tuple[PartConfig, ...]:
    value = top.get_raw("metrics")
    if value is None:
        has_teacher = any(edge.teacher for term in terms.values() for edge in term.edges)
        names = [*DEFAULT_METRICS, *(["agreement"] if has_teacher else [])]
        return tuple(PartConfig(type=name) for name in names if name in METRICS.entries)
    if not isinstance(value, list) or not value:
        top.error("metrics", f"must be a list of one or more metrics, such as [top1, ece], got {value!r}.")
        return ()
    parts = [
        read_part(top.context, METRICS, item, top.subkey(f"metrics.{index}"), METRIC_INJECTED)
        for index, item in enumerate(value)
    ]
    return tuple(part for part in parts if part is not None)


def _read_checkpoint_interval(top: KeyReader) -> Mapping[str, float]:
    value = top.get_raw("checkpoint_every")
    if value is None:
        return {}
    reader = KeyReader(top.context, value, top.subkey("checkpoint_every"), "checkpoint_every", CHECKPOINT_KEYS)
    interval: dict[str, Any] = {name: reader.read(name) for name in CHECKPOINT_KEYS}
    if isinstance(value, Mapping) and not any(reader.has(name) for name in CHECKPOINT_KEYS):
        reader.error("", "one of the keys `steps` and `minutes` is required.")
    return {name: number for name, number in interval.items() if number is not None}


def _check_evaluated_inputs(context: ParseContext, stage: StageConfig) -> None:
    """Reports an evaluated role whose output depends on labels, because its accuracy would be meaningless."""
    for name in (stage.export, *stage.evaluate):
        for upstream in sorted(upstream_closure([name], stage.roles)):
            role = stage.roles[upstream]
            if any(":" not in text and text.endswith(".label") for text in (role.input, *role.extra_inputs)):
                message = (
                    f"role {upstream!r} reads labels, but role {name!r} is evaluated and must not depend on labels."
                )
                context.error(f"{role.location.key}.input", message)


def _check_training(context: ParseContext, stage: StageConfig, has_optimizer: bool) -> None:
    """Reports missing keys (such as `optimizer`) of a stage that trains."""
    if not stage.epochs and not stage.steps:
        return
    suffix = f" in stage {stage.name!r}" if stage.name != ONLY_STAGE else ""
    if stage.roles and not any(role.mode == "trainable" for role in stage.roles.values()):
        context.error("", f"there is nothing to train{suffix}: no role is trainable.")
    if not stage.terms and not len(context.errors):
        context.error(
            "terms" if "terms" in context.locations else "",
            f"there is no term to minimize{suffix}; add one to `terms`.",
        )
    if not has_optimizer and not (stage.updates and all(update.optimizer for update in stage.updates)):
        context.error(
            "", f"the key `optimizer` is missing{suffix}; write, for example, `optimizer: {{type: SGD, lr: 0.1}}`."
        )
    for update in stage.updates if stage.precision == "fp16" else ():
        if update.inner_step is not None:
            # The scale of fp16 losses would become part of the differentiated step.
            message = f"fp16 cannot be combined with `inner_step` ({update.inner_step.location}); use bf16."
            context.error("precision", message)
    if stage.validation is not None and stage.data and "train" not in stage.data:
        context.error(
            "validation", "`validation` holds out samples of the source `train`, but this recipe has no such source."
        )
