"""How long one forward pass takes, for the summary. Measured, so no part of what makes two runs equal."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


def measure_latency(
    model: nn.Module, example: Tensor, *, batch_sizes: tuple[int, ...] = (1, 64), repeats: int = 30, budget: float = 1.0
) -> dict[str, float]:
    """Returns the time of a forward pass in eval mode, in milliseconds, by batch size: of the fastest of `repeats`.

    The fastest pass is the one that whatever else the machine does disturbed least; a median is not repeatable on a
    busy one.

    Args:
        model: on the device of `example`; every module gets its mode back.
        example: one input (channels, height, width), or whatever one row of a batch is.
        batch_sizes: each gives an entry `batch_<size>`.
        repeats: passes that are timed, after three that warm up.
        budget: seconds after which a batch size is timed no further (at least three passes are).

    Returns:
        Such as `{"batch_1": 0.42, "batch_64": 3.1}`.
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
    times: list[float] = []
    began = time.perf_counter()
    for number in range(repeats + 3):
        _wait(batch.device)
        start = time.perf_counter()
        model(batch)
        _wait(batch.device)
        if number >= 3:
            times.append(time.perf_counter() - start)
        if len(times) >= 3 and time.perf_counter() - began > budget:
            break
    return round(1000 * min(times), 4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
