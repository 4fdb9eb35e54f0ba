"""Evaluation of one model on one source: full forward, eval mode, large batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.loading.batch import Batch
from kdbench.data.loading.source import Source
from kdbench.engine.distributed.world import World
from kdbench.engine.evaluation.metrics import MetricSet
from kdbench.engine.network.features import model_output


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets every module to eval mode and disables gradients inside the block; restores each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    source: Source,
    metrics: MetricSet,
    *,
    field: str = "image",
    teacher: nn.Module | None = None,
    teacher_field: str = "image",
    batch_size: int = 512,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    world: World = World(),  # noqa: B008
) -> dict[str, float]:
    """Computes the metrics of a model over a source: each sample once, without augmentation.

    A collective: every rank evaluates its part of the samples, and the metrics' states are summed over ranks.

    Args:
        model: the model.
        source: the samples.
        metrics: reset before the first batch.
        field: the model's input; `image` is used if evaluation batches have no such field.
        teacher: supplies the logits of metrics that compare with a teacher; without it they are skipped.
        teacher_field: the teacher's input.
        batch_size: rows of a batch on each rank.
        autocast: returns the context of the forwards.
        world: the process group.
    """
    metrics.reset()
    with eval_mode(model), eval_mode(teacher) if teacher is not None else contextlib.nullcontext():
        for batch in source.evaluation_batches(batch_size):
            with autocast():
                logits = _logits(model, batch, field)
                teacher_logits = None
                if teacher is not None and metrics.needs_teacher:
                    teacher_logits = _logits(teacher, batch, teacher_field)
            metrics.update(logits, batch.fields["label"], teacher_logits, batch.fields.get("valid"))
    metrics.reduce(world.all_reduce_sum_)
    return metrics.compute()


def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of some images in eval mode, in float32.

    Shape:
        images: (n, channels, height, width). Returns (n, classes).
    """
    with eval_mode(model):
        return model_output(model(images)).float()


def _logits(model: nn.Module, batch: Batch, field: str) -> Tensor:
    return model_output(model(batch.fields[field] if field in batch.fields else batch.fields["image"]))
