"""Evaluation of one model on one source of samples, in eval mode and with large batches."""

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
    """Sets a model to eval mode without gradients inside the block; restores the mode of every module afterwards."""
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
    """Computes metrics of a model on a source of samples. Each sample is evaluated once, without augmentation.

    This is a collective: every rank evaluates a part of the samples, and the states of the metrics are summed over
    ranks.

    Args:
        model: the model.
        source: the samples.
        metrics: the metrics to compute. They are reset before the first batch.
        field: batch field that the model reads. If evaluation batches do not have the field, the model reads `image`.
        teacher: model for metrics that compare student and teacher. None: these metrics are skipped.
        teacher_field: batch field that the teacher reads.
        batch_size: number of rows in a batch on each rank.
        autocast: function that returns the autocast context of a forward.
        world: the process group.

    Returns:
        Metric -> value.
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
    """Returns a model's float32 logits for some images, computed in eval mode.

    Shape:
        images: (n, channels, height, width). Returns (n, classes).
    """
    with eval_mode(model):
        return model_output(model(images)).float()


def _logits(model: nn.Module, batch: Batch, field: str) -> Tensor:
    return model_output(model(batch.fields[field] if field in batch.fields else batch.fields["image"]))
