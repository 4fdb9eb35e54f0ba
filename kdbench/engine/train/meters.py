"""Losses summed on the device and read once per log interval; the first step that is not finite is remembered there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.distributed.world import World


@dataclass(frozen=True)
class LossMeans:
    """Means over the steps since the last reading.

    not_finite: term -> the first step of the stage (from 1) at which its loss was NaN or infinite.
    """

    steps: int
    losses: dict[str, float]
    weighted: dict[str, float]
    not_finite: dict[str, int]

    @property
    def total(self) -> float:
        return sum(self.weighted.values())


class LossMeters:
    """Adds up each term's loss, unweighted and weighted, without waiting for the device.

    Args:
        terms: names, in the order in which the runner numbers them.
        device: where the sums live.
    """

    def __init__(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.terms, self.device = terms, device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2 * len(terms), device=device, dtype=dtype)
        self.nonfinite_steps = torch.zeros(2 * len(terms), device=device, dtype=torch.int64)
        """For how many steps a sum has not been finite: once a loss was not, its sum is not until the next reading."""
        self.step = torch.zeros((), device=device, dtype=torch.int64)
        self.steps = 0  # since the last reading

    def indices(self, terms: tuple[str, ...]) -> Tensor:
        """Where the values of an update's terms are added."""
        numbers = [self.terms.index(name) for name in terms]
        return torch.tensor(numbers + [n + len(self.terms) for n in numbers], device=self.sums.device)

    def add(self, values: Tensor, positions: Tensor) -> None:
        """Adds the vector that `Network.forward` gave for the terms at `positions`."""
        self.sums.index_add_(0, positions, values.to(self.sums.dtype))

    def end_step(self) -> None:
        """Counts a step on the device; `steps`, on the host, is counted by whoever drives the steps."""
        self.step += 1
        self.nonfinite_steps += (self.sums - self.sums) != 0  # NaN where a sum is not finite; fewer kernels than `isfinite`

    def read(self, world: World) -> LossMeans:
        """Waits for the device, returns the means and starts anew. Every rank must call it."""
        reading = self.peek(world)
        self.sums.zero_()
        self.steps = 0
        return reading

    def peek(self, world: World) -> LossMeans:
        """Waits for the device and returns the means so far. Every rank must call it."""
        sums = world.all_reduce_sum_(self.sums.clone()).tolist()
        bad = self.nonfinite_steps.clone()
        if world.size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        count = max(self.steps, 1)
        means = [value / count for value in sums]
        names, n, step = self.terms, len(self.terms), int(self.step)
        not_finite = {name: step - since + 1 for name, since in zip(names, bad.tolist()[:n], strict=True) if since}
        return LossMeans(
            self.steps, dict(zip(names, means[:n], strict=True)), dict(zip(names, means[n:], strict=True)), not_finite
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu(), "step": self.step.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.step.copy_(state["step"])
        self.steps = int(state["steps"])
