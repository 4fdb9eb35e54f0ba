"""One stage: the recipe's top level with the stage's fragment laid over it, read into a StageConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdbench.config.parse.artifacts import read_artifacts
from kdbench.config.parse.data import read_sources
from kdbench.config.parse.keys import (
    AT_LEAST_ONE,
    FRACTION,
    FRACTION_OR_COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    KeyReader,
    ParseContext,
)
from kdbench.config.parse.loops import ONLY_STAGE, UnrolledStage
from kdbench.config.parse.optimizers import read_optimizer, read_scheduler
from kdbench.config.parse.parts import read_part
from kdbench.config.parse.roles import read_roles, resolve_inputs, upstream_closure
from kdbench.config.parse.terms import read_terms
from kdbench.config.parse.updates import read_updates
from kdbench.config.schema import OptimizerConfig, PartConfig, RoleConfig, StageConfig
from kdbench.errors import suggest
from kdbench.registry import METRICS

METRIC_INJECTED = ("num_classes", "device", "teacher")


DEFAULT_METRICS = ("top1", "top5", "nll", "ece")


_PRECISION = "Literal['float32', 'tf32', 'bf16', 'fp16', 'float64']"


def read_stage(context: ParseContext, unrolled: UnrolledStage, base: Path, seen: tuple[str, ...]) -> StageConfig:
    """Reads the keys that a stage may hold; whatever else is there is found fault with.

    Args:
        context: with the places of this stage's keys.
        unrolled: the stage as it runs.
        base, seen: as of `read_roles`.
    """
    top = KeyReader(context, unrolled.data, "", "the recipe")
    eval_batch_size = top.read("eval_batch_size", "int", 512, AT_LEAST_ONE)
    sources = read_sources(context, top, eval_batch_size, unrolled.artifact_names)
    roles = read_roles(context, top, base, seen)
    if sources:
        roles = resolve_inputs(context, roles, sources)
    export = _export(context, top, roles)
    terms = read_terms(context, top, roles, export, sources, unrolled.artifact_names)
    updates = read_updates(context, top, roles, terms, sources)
    epochs, steps = _length(top)
    optimizer = top.get_raw("optimizer")
    stage = StageConfig(
        name=unrolled.name,
        roles=roles,
        data=sources,
        terms=terms,
        updates=updates,
        artifacts=read_artifacts(context, top, roles, sources, export, unrolled),
        export=export or "student",
        evaluate=_evaluated(top, roles, export),
        optimizer=OptimizerConfig() if optimizer is None else read_optimizer(context, optimizer, top.subkey("optimizer")),
        scheduler=read_scheduler(context, top.get_raw("scheduler"), top.subkey("scheduler")),
        epochs=epochs,
        steps=steps,
        clip=top.read("clip", "float", None, POSITIVE),
        accumulate=top.read("accumulate", "int", 1, AT_LEAST_ONE),
        ema=top.read("ema", "float", None, FRACTION),
        validation=_validation(top),
        metrics=_metrics(context, top, terms_with_teacher=any(e.teacher for t in terms.values() for e in t.edges)),
        eval_every=top.read("eval_every", "int", 1, AT_LEAST_ONE),
        eval_batch_size=eval_batch_size,
        checkpoint_every=_checkpoints(context, top),
        log_every=top.read("log_every", "int", 50, AT_LEAST_ONE),
        precision=top.read("precision", _PRECISION, "float32"),
        sync_batchnorm=top.read("sync_batchnorm", "bool", False),
    )
    top.finish()
    _check_training(context, stage, optimizer is not None)
    _check_measured(context, stage)
    return stage


def _export(context: ParseContext, top: KeyReader, roles: Mapping[str, RoleConfig]) -> str | None:
    given = top.read("export", "str")
    if given is not None:
        if given not in roles:
            top.error("export", f"no role {given!r}.{suggest(given, roles)}")
            return None
        return given
    if "student" in roles:
        return "student"
    trainable = [name for name, role in roles.items() if role.mode == "trainable"]
    if len(trainable) == 1:
        return trainable[0]
    if roles:
        said = f"say which role is the result: `export: ROLE`, one of {', '.join(trainable or roles)}."
        context.error("export" if "export" in context.locations else "", said)
    return None


def _evaluated(top: KeyReader, roles: Mapping[str, RoleConfig], export: str | None) -> tuple[str, ...]:
    """The roles that are measured besides the exported one."""
    names = top.read_strings("evaluate")
    for name in names:
        if name not in roles:
            top.error("evaluate", f"no role {name!r}.{suggest(name, roles)}")
    return tuple(name for name in dict.fromkeys(names) if name in roles and name != export)


def _length(top: KeyReader) -> tuple[int | None, int | None]:
    epochs = top.read("epochs", "int", None, NOT_NEGATIVE)
    steps = top.read("steps", "int", None, NOT_NEGATIVE)
    if top.has("epochs") and top.has("steps"):
        top.error("steps", "give `epochs` or `steps`, not both.")
    elif not top.has("epochs") and not top.has("steps"):
        top.error("", "say how long to train: `epochs: N` or `steps: N`.")
    return epochs, steps


def _validation(top: KeyReader) -> float | int | None:
    value = top.read("validation", "float", None, FRACTION_OR_COUNT)
    if value == 1:
        top.error("validation", "must be a share below 1, or a whole number of samples (2 or more), got 1.")
        return None
    return value


def _metrics(context: ParseContext, top: KeyReader, terms_with_teacher: bool) -> tuple[PartConfig, ...]:
    value = top.get_raw("metrics")
    if value is None:
        chosen = [*DEFAULT_METRICS, *(["agreement"] if terms_with_teacher else [])]
        return tuple(PartConfig(type=name) for name in chosen if name in METRICS.entries)
    if not isinstance(value, list) or not value:
        top.error("metrics", f"must be a list of one or more, such as [top1, ece], got {value!r}.")
        return ()
    read = [read_part(context, METRICS, item, top.subkey(f"metrics.{i}"), METRIC_INJECTED) for i, item in enumerate(value)]
    return tuple(metric for metric in read if metric is not None)


def _checkpoints(context: ParseContext, top: KeyReader) -> Mapping[str, float]:
    value = top.get_raw("checkpoint_every")
    if value is None:
        return {}
    fields = KeyReader(context, value, top.subkey("checkpoint_every"), "checkpoint_every")
    steps = fields.read("steps", "int", None, AT_LEAST_ONE)
    minutes = fields.read("minutes", "float", None, POSITIVE)
    if isinstance(value, Mapping) and not (fields.has("steps") or fields.has("minutes")):
        fields.error("", "needs `steps: N` or `minutes: X`.")
    fields.finish()
    return {key: number for key, number in (("steps", steps), ("minutes", minutes)) if number is not None}


def _check_measured(context: ParseContext, stage: StageConfig) -> None:
    """What is evaluated must find its class without being told it."""
    for name in (stage.export, *stage.evaluate):
        for role in sorted(upstream_closure([name], stage.roles)):
            config = stage.roles[role]
            if any(
                ":" not in address and address.endswith(".label") for address in (config.input, *config.extra_inputs)
            ):
                said = f"role {role!r} sees the labels, so {name!r}, which is evaluated, must not see it."
                context.error(f"{config.location.key}.input", said)


def _check_training(context: ParseContext, stage: StageConfig, has_optimizer: bool) -> None:
    """What a stage that trains cannot do without."""
    if not stage.epochs and not stage.steps:
        return
    trainable = [name for name, role in stage.roles.items() if role.mode == "trainable"]
    where = f" in stage {stage.name!r}" if stage.name != ONLY_STAGE else ""
    if stage.roles and not trainable:
        context.error("", f"nothing trains{where}: every role is frozen or follows another.")
    if not stage.terms and not len(context.errors):
        context.error("terms" if "terms" in context.locations else "", f"no term is left to train by{where}.")
    if not has_optimizer and not (stage.updates and all(update.optimizer for update in stage.updates)):
        context.error("", f"no optimizer{where}; write `optimizer: {{type: SGD, lr: 0.1}}`.")
    for update in stage.updates if stage.precision == "fp16" else ():
        if update.inner_step is not None:
            said = "scales losses so that gradients fit, which a gradient through a step would undo; take bf16"
            context.error("precision", f"fp16 {said} beside `inner_step` ({update.inner_step.location}).")
    if stage.validation is not None and stage.data and "train" not in stage.data:
        context.error("validation", "is held out from the source `train`, which this recipe does not have.")
