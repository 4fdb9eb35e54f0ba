"""Measuring a role on a split: whole forward, eval mode, large batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.data.loading.source import Source
from kdbench.engine.distributed.world import World
from kdbench.engine.evaluation.metrics import MetricSet
from kdbench.engine.network.features import model_output


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into eval mode for a while, and each back into the mode that it had."""
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
    """Returns the metrics of a model over a source, each sample once, without augmentation.

    Args:
        field: what the model sees; a view that evaluation does not offer is read as `image`.
        teacher: its logits go to the metrics that compare with a teacher.
        world: the samples are shared out over the ranks, and the sums added up.
    """
    metrics.reset()
    with eval_mode(model), eval_mode(teacher) if teacher is not None else contextlib.nullcontext():
        for batch in source.evaluation_batches(batch_size):
            with autocast():
                logits = _logits(model, batch, field)
                reference = None
                if teacher is not None and metrics.needs_teacher:
                    reference = _logits(teacher, batch, teacher_field)
            metrics.update(logits, batch["label"], reference, batch.get("valid"))
    metrics.reduce(world.all_reduce_sum_)
    return metrics.compute()


def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of a few images, in eval mode."""
    with eval_mode(model):
        return model_output(model(images)).float()


def _logits(model: nn.Module, batch: dict[str, Tensor], field: str) -> Tensor:
    return model_output(model(batch[field] if field in batch else batch["image"]))
