"""Latency of one forward, for the summary of a run. Latency varies, so the comparison of two runs excludes it."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

WARM_UP_FORWARDS = 3


MIN_TIMED_FORWARDS = 3
"""Minimum number of timed forwards, even if they take longer than the budget."""


def measure_latency(
    model: nn.Module, example: Tensor, *, batch_sizes: tuple[int, ...] = (1, 64), repeats: int = 30, budget: float = 1.0
) -> dict[str, float]:
    """Measures the time of a forward in eval mode, as the minimum over several forwards.

    The minimum is the time of the forward that other work on the machine disturbed least. A median is not repeatable
    on a busy machine.

    Args:
        model: model on the device of `example`. The mode of every module is restored after the measurement.
        example: one input without batch dimension, such as (channels, height, width).
        batch_sizes: batch sizes to measure.
        repeats: maximum number of timed forwards for each batch size. Three untimed forwards precede them.
        budget: time limit in seconds for each batch size. At least three forwards are timed, even beyond the limit.

    Returns:
        Batch size -> milliseconds, such as `{"batch_1": 0.42, "batch_64": 3.1}`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return {f"batch_{size}": _fastest(model, example, size, repeats, budget) for size in batch_sizes}
    finally:
        for module, mode in modes:
            module.training = mode


def _fastest(model: nn.Module, example: Tensor, size: int, repeats: int, budget: float) -> float:
    batch = example.detach()[None].repeat(size, *[1] * example.dim())
    seconds: list[float] = []
    first_start = time.perf_counter()
    for number in range(WARM_UP_FORWARDS + repeats):
        _wait(batch.device)
        start = time.perf_counter()
        model(batch)
        _wait(batch.device)
        if number >= WARM_UP_FORWARDS:
            seconds.append(time.perf_counter() - start)
        if len(seconds) >= MIN_TIMED_FORWARDS and time.perf_counter() - first_start > budget:
            break
    return round(1000 * min(seconds), 4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
