"""Describes a stage in sentences for `kdbench check`.

The sentences contain the facts that are missing in the stage's diagram and tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdbench.cli.diagram import active_roles, is_never_updated, is_trained, updated_models
from kdbench.config.schema import (
    InnerStepConfig,
    OperandConfig,
    OptimizerConfig,
    PartConfig,
    PartWithOperands,
    RoleConfig,
    SourceConfig,
    StageConfig,
    TermConfig,
)
from kdbench.registry import TERMS

if TYPE_CHECKING:
    from kdbench.engine.plan.dry_run import UpdatePlan
    from kdbench.engine.plan.plan import StagePlan


def describe_stage(plan: StagePlan) -> list[str]:
    """Returns sentences about a stage, with the facts that are missing in its diagram and in its tables."""
    # Imported here because it imports torch, which `kdbench --help` and `kdbench list` must not.
    from kdbench.speed.teacher_cache.frozen_forward import describe_frozen_roles

    stage = plan.stage
    active = active_roles(plan)
    lines = []
    if stage.validation is not None:
        fraction = f"{100 * stage.validation:g} % of source train"
        lines.append(f"validation: {fraction}, held out of training; the best epoch is selected on it.")
    for name in active:
        lines += _describe_role(stage.roles[name], stage)
    idle = [name for name in plan.roles if name not in active]
    if idle:
        owner = "its" if len(idle) == 1 else "their"
        lines.append(f"not run: {join_names(idle)} (nothing in this stage reads {owner} output).")
    terms = [stage.terms[name] for name in plan.resolved_stage.terms]
    lines += [f"{term.name}: {describe_term(term)}." for term in terms if _needs_description(term)]
    for number, update in enumerate(plan.updates, 1):
        lines += _describe_update(plan, update, number if len(plan.updates) > 1 else None)
    return [*lines, *describe_frozen_roles(plan), *_describe_length(plan), *plan.notes]


def _describe_role(role: RoleConfig, stage: StageConfig) -> Iterator[str]:
    """Yields sentences about a role (a network), with the facts that are missing in the table of roles."""
    if is_never_updated(role, stage):
        yield f"{role.name}: train mode (BatchNorm uses batch statistics), but no update changes its weights."
    if role.transforms:
        yield f"{role.name}: weights transformed by {join_names([part_text(part) for part in role.transforms])}."
    if role.freeze:
        yield f"{role.name}: modules {join_names(role.freeze)} are frozen."


def _needs_description(term: TermConfig) -> bool:
    """Returns whether a term (one loss) needs a sentence, because the diagram and the tables omit some options."""
    operands = [operand for edge in term.edges for operand in (edge.student, edge.teacher) if operand is not None]
    combiners = [operand.combiner for operand in (*operands, *term.operands.values()) if operand.combiner is not None]
    has_details = any(combiner.operands or combiner.params for combiner in combiners)
    return has_details or term.route is not None or term.sample_weight is not None


def describe_term(config: TermConfig) -> str:
    """Describes a term (one loss) as text: type, operands, and options such as mask, router and sample weights."""
    target = "labels" if "label" in TERMS.entry(config.type).inputs else ""
    pairs = [
        (operand_text(edge.student), target if edge.teacher is None else operand_text(edge.teacher))
        for edge in config.edges
    ]
    options = ["maximized"] if isinstance(config.weight, int | float) and config.weight < 0 else []
    if config.teacher_grad:
        options.append("gradient to the teacher too")
    if config.mask:
        options.append(f"only rows with {config.mask}")
    if config.operands:
        options.append(f"with {_operands_text(config.operands)}")
    if config.route is not None:
        options.append(f"edge weights: {_reader_text(config.route)}")
    if config.sample_weight is not None:
        options.append(f"sample weights: {_reader_text(config.sample_weight)}")
    verb = "is computed on" if all(teacher == "" for _, teacher in pairs) else "compares"
    edges = "; ".join(_pair_text(students, teachers) for students, teachers in _group_pairs(pairs))
    return "; ".join([f"{config.type} {verb} {edges}", *options])


def _group_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """Groups pairs (student operand, teacher operand) of a term.

    Returns:
        Pairs (list of students, list of teachers). If all pairs have the same student or the same teacher, there is one
        group; otherwise there is one group per student.
    """
    students, teachers = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    if len(students) == 1 or len(teachers) == 1:
        return [(students, teachers)]
    return [([student], [teacher for name, teacher in pairs if name == student]) for student in students]


def _pair_text(students: list[str], teachers: list[str]) -> str:
    sides = [students] if teachers == [""] else [students, teachers]
    return " with ".join(f"each of [{', '.join(side)}]" if len(side) > 1 else side[0] for side in sides)


def operand_text(operand: OperandConfig) -> str:
    """Returns an operand as text, such as `student logits` or `the output of mean_logits (inputs: a:fc, b:fc)`."""
    if operand.combiner is None:
        return re.sub(r":logits$", " logits", str(operand))
    arguments = [operand_text(part) for part in operand.parts]
    arguments += [f"{key} {value_text(value)}" for key, value in operand.combiner.params.items()]
    if operand.combiner.operands:
        arguments.append(_operands_text(operand.combiner.operands))
    return f"the output of {operand.combiner.type} (inputs: {', '.join(arguments)})"


def _operands_text(operands: Mapping[str, OperandConfig]) -> str:
    """Returns named operands as text, such as `reward = term:kd.loss, state = gate logits`.

    The default name `read` is omitted.
    """
    return ", ".join(
        operand_text(operand) if name == "read" else f"{name} = {operand_text(operand)}"
        for name, operand in operands.items()
    )


def _reader_text(part: PartWithOperands) -> str:
    """Returns a router or a sample weight as text, such as `learnt(complement) of gate logits`."""
    if not part.operands:
        return part_text(part)
    if len(part.operands) == 1:
        (operand,) = part.operands.values()
        return f"{part_text(part)} of {operand_text(operand)}"
    return f"{part_text(part)} of {_operands_text(part.operands)}"


def _describe_update(plan: StagePlan, update: UpdatePlan, number: int | None) -> Iterator[str]:
    """Yields sentences about an update (optimizer step) of a stage.

    The sentences describe the optimizer, the selection of rows, the inner step, and parameters without gradient.
    """
    config = update.config
    label = "optimizer" if number is None else f"update {number} ({updated_models(update)})"
    parts = [_optimizer_text(config.optimizer or plan.stage.optimizer)]
    term_parameters = sum(plan.term_parameters[name] for name in config.terms)
    if term_parameters:
        parts.append(f"it also trains {count_text(term_parameters, 'parameter')} of terms and adapters")
    if config.repeat > 1:
        parts.append(f"{config.repeat} updates per step")
    if config.select is not None and config.keep is not None:
        rows = f"{config.keep:g} of the rows" if config.keep < 1 else f"{config.keep:g} rows"
        parts.append(f"{rows} of each batch, selected by {_reader_text(config.select)}")
    if config.inner_step is not None:
        parts.append(_inner_step_text(config.inner_step))
    yield f"{label}: {'; '.join(parts)}."
    active = {*active_roles(plan), "terms"}
    names = [name for name in update.unreached_parameters if name.split(".", 1)[0] in active]
    if names:
        examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield f"without gradient: {count_text(len(names), 'parameter tensor')} ({examples})."


def _inner_step_text(inner_step: InnerStepConfig) -> str:
    models, terms = join_names(inner_step.models), join_names(inner_step.terms)
    rate = f"that of the update of {models}" if inner_step.lr is None else value_text(inner_step.lr)
    step = f"an inner step of {models} on {terms} (learning rate: {rate})"
    return f"the loss is computed after {step}, and the gradient flows through this inner step"


def _describe_length(plan: StagePlan) -> Iterator[str]:
    """Yields sentences about the length of a stage, its learning rate, its moving average, and its estimated memory."""
    stage = plan.stage
    spec, source = plan.specs[plan.train_source], stage.data[plan.train_source]
    new_rows = source.batch_size // 2 if source.overlap else source.batch_size
    steps = f" of {count_text(-(-spec.samples // (new_rows * stage.accumulate)), 'step')}" if spec.samples else ""
    if not is_trained(stage):
        yield "training: none (0 epochs or steps)."
    else:
        length = count_text(stage.epochs or 0, "epoch") + steps
        if stage.steps is not None:
            length = count_text(stage.steps, "step")
        rate = value_text(stage.scheduler) if stage.scheduler else "constant"
        yield f"training: {length}; learning rate {rate}; {stage.precision}; evaluated {_evaluation_text(stage)}."
    if stage.ema is not None:
        yield f"EMA: weights of {stage.export} are averaged (decay {stage.ema}); the average is evaluated too."
    size = plan.memory_bytes / 2**20
    memory = "less than 1 MiB" if size < 1 else f"about {size:,.0f} MiB"
    yield f"memory: {memory} (weights, gradients, optimizer state, activations of one batch; without the data)."


def _evaluation_text(stage: StageConfig) -> str:
    if stage.epochs is not None and stage.eval_every >= stage.epochs:
        return "at the end"
    return "every epoch" if stage.eval_every == 1 else f"every {stage.eval_every} epochs"


def mode_text(role: RoleConfig) -> str:
    """Returns the mode of a role (a network) as text, such as `trainable` or `ema of student (decay 0.98)`."""
    if role.source_role is None:
        return role.mode
    details = {"ema": f" (decay {role.decay})", "snapshot": f" ({_refresh_text(role)})", "reuse": ""}
    module = f":{role.module_path}" if role.module_path else ""
    return f"{role.mode} of {role.source_role}{module}{details.get(role.mode, '')}"


def _refresh_text(role: RoleConfig) -> str:
    count, unit = (role.every_steps, "step") if role.every_steps else (role.every_epochs, "epoch")
    if not count:
        return "at the start of the stage"
    return f"every {unit}" if count == 1 else f"every {count_text(count, unit)}"


def dataset_text(config: SourceConfig, *, has_split: bool) -> str:
    """Returns the dataset and split of a source (such as `digits train`), or the artifact that it reads."""
    if config.artifact is not None:
        return config.artifact
    return f"{config.dataset.type} {config.split}" if has_split else config.dataset.type


def source_options_text(config: SourceConfig) -> str:
    """Returns a source's options as text, such as `subset random(amount 0.2); labels of 50 samples`."""
    options = []
    if config.subset is not None:
        steps = config.subset if isinstance(config.subset, tuple) else (config.subset,)
        options.append("subset " + ", then ".join(value_text(step) for step in steps))
    if config.label_fraction is not None:
        options.append(_labels_text(config.label_fraction))
    if config.relabel is not None:
        options.append(f"labels changed by {part_text(config.relabel)}")
    if config.overlap:
        options.append("half of each batch is repeated from the previous batch")
    return "; ".join(options)


def _labels_text(amount: float | int | str) -> str:
    if isinstance(amount, str):
        return f"labels from {amount}"
    return f"labels of {100 * amount:g} % of the samples" if amount <= 1 else f"labels of {amount:,} samples"


def _optimizer_text(optimizer: OptimizerConfig) -> str:
    params = ", ".join(f"{key} {value}" for key, value in optimizer.params.items())
    groups = f", {count_text(len(optimizer.groups), 'parameter group')}" if optimizer.groups else ""
    return f"{optimizer.type}({params}{groups})"


def part_text(part: PartConfig | PartWithOperands) -> str:
    """Returns a part (router, subset, ...) with its parameters as text, such as `top_k(k 2)`."""
    params = ", ".join(key if item is True else f"{key} {value_text(item)}" for key, item in part.params.items())
    return f"{part.type}({params})" if params else part.type


def model_text(model: Any) -> str:
    """Returns a model of a recipe, which is a name or a mapping with `type`, as text, such as `resnet(blocks 3)`."""
    if isinstance(model, Mapping):
        return part_text(PartConfig(type=model["type"], params={k: v for k, v in model.items() if k != "type"}))
    return value_text(model)


def value_text(value: Any) -> str:
    """Returns a value of a recipe (a number, a part or a schedule) as text."""
    if isinstance(value, PartConfig):
        return part_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def shape_text(shape: Sequence[int]) -> str:
    """Returns a shape as text, such as `3 x 32 x 32`."""
    return " x ".join(str(size) for size in shape)


def count_text(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural if necessary: `1 epoch`, `40 epochs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def join_names(names: Sequence[str]) -> str:
    """Returns names as an enumeration: `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
