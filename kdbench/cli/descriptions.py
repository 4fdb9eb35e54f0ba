"""A stage in sentences: its data, who sees what and how it lives, who learns from whom, who moves when, how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdbench.cli.diagram import active_roles, is_never_updated, updated_models, weights_text
from kdbench.config.schema import (
    InnerStepConfig,
    OperandConfig,
    PartConfig,
    PartWithOperands,
    SourceConfig,
    StageConfig,
    TermConfig,
)
from kdbench.registry import TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.plan import RolePlan, StagePlan


def describe_stage(plan: StagePlan) -> list[str]:
    """Says in sentences what a stage does."""
    from kdbench.speed.teacher_cache.frozen_forward import describe_frozen_roles as frozen_words

    stage, run = plan.stage, active_roles(plan)
    lines = [_describe_source(name, plan) for name in plan.specs]
    if stage.validation is not None:
        lines.append(f"{stage.validation} of train is held out as validation and chooses the best epoch.")
    lines += [_describe_role(name, plan.roles[name], plan) for name in run]
    idle = [name for name in plan.roles if name not in run]
    if idle:
        lines.append(f"{join_names(idle)} {'does' if len(idle) == 1 else 'do'} not run: nothing here reads them.")
    lines += [describe_term(stage.terms[name]) for name in plan.resolved_stage.terms]
    for number, update in enumerate(plan.updates, 1):
        label = f"update {number} of each step" if len(plan.updates) > 1 else "each step"
        owned = sum(plan.term_parameters[name] for name in update.config.terms)
        extra = f" and {owned:,} parameters of terms and adapters" if owned else ""
        times = f", {update.config.repeat} times" if update.config.repeat > 1 else ""
        select, keep = update.config.select, update.config.keep
        if select is not None and keep is not None:
            rows = f"{keep:g} of the rows" if keep < 1 else f"{keep:g} rows"
            times += f", on {rows} of each batch, chosen by {part_text(select)}"
            times += _operands_text("which reads", select.operands)
        if update.config.inner_step is not None:
            times += _inner_step_text(update.config.inner_step)
        optimizer = _optimizer_text(update.config.optimizer or stage.optimizer)
        lines.append(
            f"{label} moves {updated_models(update)}{extra} by {', '.join(update.config.terms)} with {optimizer}{times}."
        )
        left = [name for name in update.unreached_parameters if name.split(".", 1)[0] in (*run, "terms")]
        if left:
            shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            one = "1 parameter tensor gets no gradient and stays" if len(left) == 1 else ""
            lines.append(f"{one or f'{len(left)} parameter tensors get no gradient and stay'} out of it: {shown}.")
    return [*lines, *frozen_words(plan), *_describe_length(plan), *plan.notes]


def _describe_source(name: str, plan: StagePlan) -> str:
    config, spec = plan.stage.data[name], plan.specs[name]
    fields = ", ".join(f"{field} {shape_text(shape)}" for field, (shape, _) in spec.fields.items() if shape)
    samples = f"{spec.samples:,} samples" if spec.samples is not None else "samples not counted yet"
    classes = f", {spec.classes} classes" if spec.classes else ""
    hidden = f"; labels kept: {config.label_fraction}" if config.label_fraction is not None else ""
    changed = f"; labels changed by {part_text(config.relabel)}" if config.relabel is not None else ""
    size = f", batches of {config.batch_size}" if name in plan.resolved_stage.step_sources(plan.stage) else ""
    size += ", of which half were in the batch before" if config.overlap else ""
    what = config.artifact if config.artifact is not None else config.dataset.type
    what += f" {config.split}" if spec.classes and config.artifact is None else ""
    return f"source {name}: {what}{_subset_text(config)}, {samples}{classes}, {fields}{size}{hidden}{changed}."


def _subset_text(config: SourceConfig) -> str:
    """` (random: amount 0.2, rest true; then shard: of 3, number 0)`."""
    subset = config.subset
    steps = subset if isinstance(subset, tuple) else () if subset is None else (subset,)
    told = [
        part_text(step)
        if isinstance(step, PartConfig)
        else f"chosen by {step}"
        if isinstance(step, str)
        else f"{step:g}"
        for step in steps
    ]
    return f" ({', then '.join(told)})" if told else ""


def _describe_role(name: str, role: RolePlan, plan: StagePlan) -> str:
    config = role.config
    life = {
        "frozen": "is frozen (eval mode, no gradient to its parameters)" if role.parameters else "has no parameters",
        "trainable": "runs in train mode (its BatchNorms by the batch's own statistics), but no update moves it"
        if is_never_updated(config, plan.stage)
        else "learns",
        "ema": f"is the moving average of {config.source_role} (decay {config.decay})",
        "snapshot": f"is a copy of {config.source_role}{_renewal_text(config.every_epochs, config.every_steps)}",
        "reuse": f"is the very network of {config.source_role}"
        + (f", its {config.module_path}" if config.module_path else ""),
    }[config.mode]
    where = weights_text(config)
    seen = join_names([config.input, *config.extra_inputs])
    stops = f", and runs only as far as {role.stop_module}" if role.stop_module else ""
    exported = "; it is what the recipe is for (exported)" if name == plan.stage.export else ""
    frozen = f"; {', '.join(config.freeze)} stay as they are" if config.freeze else ""
    through = f", its weights through {join_names([part_text(t) for t in config.transforms])}" if config.transforms else ""
    return (
        f"{name} ({role.model}{f', {where}' if where else ''}) sees {seen}, {life}{through}{stops}{frozen}{exported}."
    )


def _renewal_text(epochs: int, steps: int) -> str:
    if steps:
        return f", renewed every {count_text(steps, 'step')}"
    return f", renewed every {count_text(epochs, 'epoch')}" if epochs else " as it is when the stage begins"


def describe_term(config: TermConfig) -> str:
    """Who learns from whom by a term, and what else it reads.

    A negative weight drives the operands apart; a term without a teacher and labels says something of one operand.
    """
    away = isinstance(config.weight, int | float) and config.weight < 0
    label = "label" in TERMS.entry(config.type).inputs
    pairs = [
        (operand_text(e.student), "" if e.teacher is None and not label else _teacher_text(e.teacher))
        for e in config.edges
    ]
    told = [_pair_text(students, sources, away) for students, sources in _group_pairs(pairs)]
    how = [", the teacher gets gradient too"] if config.teacher_grad else []
    how += [f", where {config.mask}"] if config.mask else []
    how += [_operands_text("with", config.operands)] if config.operands else []
    for word, part in (("routed", config.route), ("weighed", config.sample_weight)):
        if part is not None:
            how.append(f", {word} by {part_text(part)}{_operands_text('which reads', part.operands)}")
    times = "" if config.weight == 1 else f", times {value_text(config.weight)}"
    return f"{config.name}: {'; '.join(told)}{''.join(how)}{times}."


def _teacher_text(teacher: OperandConfig | None) -> str:
    return "the labels" if teacher is None else operand_text(teacher)


def _group_pairs(pairs: list[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """Pairs of student and source: all sources of one student together, or all students of one source."""
    students, sources = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    if len(students) == 1 or len(sources) == 1:
        return [(students, sources)]
    return [([student], [source for other, source in pairs if other == student]) for student in students]


def _pair_text(students: list[str], sources: list[str], away: bool) -> str:
    one = len(students) == 1
    if sources == [""]:
        return f"is taken of {join_names(students)} alone"
    if away:
        return f"{join_names(students)} {'is' if one else 'are'} driven away from {join_names(sources)}"
    return f"{join_names(students)} {'learns' if one else 'learn'} from {join_names(sources)}"


def operand_text(operand: OperandConfig) -> str:
    """An operand as a sentence says it."""
    if operand.combiner is None:
        return str(operand)
    read = _operands_text("with", operand.combiner.operands).removeprefix(", ")
    told = f"the {operand.combiner.type} of {join_names([operand_text(part) for part in operand.parts])}"
    return f"{told} ({read})" if read else told


def _operands_text(word: str, operands: Mapping[str, OperandConfig]) -> str:
    """`, with reward term:kd.loss`, and `, which reads student:logits` where the operand has no other name."""
    told = [f"{'' if name == 'read' else f'{name} '}{operand_text(operand)}" for name, operand in operands.items()]
    return f", {word} {join_names(told)}" if told else ""


def _inner_step_text(after: InnerStepConfig) -> str:
    """`, as they stand after a virtual step of student by soft and hard at its own rate, and through that step`."""
    rate = "its own rate" if after.lr is None else f"rate {value_text(after.lr)}"
    step = f"a virtual step of {join_names(list(after.models))} by {join_names(list(after.terms))} at {rate}"
    return f", at the weights to which {step} would lead, with the gradient through that step"


def _describe_length(plan: StagePlan) -> list[str]:
    stage = plan.stage
    spec, source = plan.specs[plan.train_source], stage.data[plan.train_source]
    new = source.batch_size // 2 if source.overlap else source.batch_size
    steps = f" of {count_text(-(-spec.samples // (new * stage.accumulate)), 'step')}" if spec.samples else ""
    length = count_text(stage.steps, "step") if stage.steps is not None else count_text(stage.epochs or 0, "epoch") + steps
    if stage.epochs == 0 or stage.steps == 0:
        lines = ["nothing is trained."]
    else:
        scheduler = value_text(stage.scheduler) if stage.scheduler else "constant"
        lines = [f"{length}; learning rate: {scheduler}; precision {stage.precision}; evaluated {_evaluation_text(stage)}."]
    if stage.ema is not None:
        lines.append(f"a moving average of {stage.export} (decay {stage.ema}) is kept and evaluated beside it.")
    size = plan.memory_bytes / 2**20
    memory = "less than 1 MiB" if size < 1 else f"{size:,.0f} MiB"
    lines.append(
        f"estimated memory: {memory} (weights, gradients, momentum and the activations of a batch; without the data)."
    )
    return lines


def _evaluation_text(stage: StageConfig) -> str:
    if stage.epochs is not None and stage.eval_every >= stage.epochs:
        return "at the end"
    return "every epoch" if stage.eval_every == 1 else f"every {stage.eval_every} epochs"


def _optimizer_text(optimizer: Any) -> str:
    params = ", ".join(f"{key} {value}" for key, value in optimizer.params.items())
    groups = f", {len(optimizer.groups)} groups apart" if optimizer.groups else ""
    return f"{optimizer.type}({params}{groups})"


def part_text(part: PartConfig | PartWithOperands) -> str:
    """A part with its parameters: `top_k(k 2)`."""
    inner = ", ".join(f"{key} {value_text(item)}" for key, item in part.params.items())
    return f"{part.type}({inner})" if inner else part.type


def value_text(value: Any) -> str:
    """A number, or a schedule in words."""
    if isinstance(value, PartConfig):
        return part_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def count_text(number: int, what: str) -> str:
    """`1 epoch`, `40 epochs`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def join_names(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
