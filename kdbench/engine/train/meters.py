"""Losses that are summed on the device and read once per log interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdbench.engine.distributed.world import World


@dataclass(frozen=True)
class LossMeans:
    """Mean losses over the steps since the meters were last read.

    Attributes:
        steps: number of these steps.
        losses: term -> mean unweighted loss.
        weighted: term -> mean loss times its weight.
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
    """Sums each term's loss, unweighted and weighted, without waiting for the device.

    Args:
        terms: names of all terms of the stage.
        device: device on which the sums are kept.

    Attributes:
        sums: (2 * terms,) float64: the unweighted losses of all terms, then the weighted losses.
        nonfinite_steps: (2 * terms,) for each sum, the number of steps since it became NaN or infinite. Such a sum
            remains so until it is read, so the count gives the first step with such a loss.
        step_counter: scalar tensor on the device: number of completed steps of the stage.
        steps: number of completed steps since the last reading, counted on the host.
    """

    def __init__(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.terms, self.device = terms, device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2 * len(terms), device=device, dtype=dtype)
        self.nonfinite_steps = torch.zeros(2 * len(terms), device=device, dtype=torch.int64)
        self.step_counter = torch.zeros((), device=device, dtype=torch.int64)
        self.steps = 0

    def indices(self, terms: tuple[str, ...]) -> Tensor:
        """Returns the positions of the given terms in `sums`: first of their losses, then of their weighted losses."""
        numbers = [self.terms.index(name) for name in terms]
        return torch.tensor(numbers + [n + len(self.terms) for n in numbers], device=self.sums.device)

    def add(self, values: Tensor, indices: Tensor) -> None:
        """Adds losses to the sums.

        Args:
            values: vector of losses and weighted losses that `Network.forward` returned for some terms.
            indices: positions of these losses in `sums`, as the method `indices` returns them.
        """
        self.sums.index_add_(0, indices, values.to(self.sums.dtype))

    def end_step(self) -> None:
        """Counts a completed step in `step_counter`, on the device. The runner increments `steps` on the host."""
        self.step_counter += 1
        self.nonfinite_steps += (self.sums - self.sums) != 0  # true for NaN and infinity; fewer kernels than `isfinite`

    def read(self, world: World) -> LossMeans:
        """Returns the mean losses and resets the sums. Waits for the device. Every rank must call this method."""
        means = self.peek(world)
        self.sums.zero_()
        self.steps = 0
        return means

    def peek(self, world: World) -> LossMeans:
        """Returns the mean losses without resetting the sums. Waits for the device.

        Every rank must call this method.
        """
        sums = world.all_reduce_sum_(self.sums.clone()).tolist()
        nonfinite = self.nonfinite_steps.clone()
        if world.size > 1:
            torch.distributed.all_reduce(nonfinite, torch.distributed.ReduceOp.MAX)
        steps = max(self.steps, 1)
        means = [value / steps for value in sums]
        names, count, last = self.terms, len(self.terms), int(self.step_counter)
        durations = zip(names, nonfinite.tolist()[:count], strict=True)
        return LossMeans(
            self.steps,
            losses=dict(zip(names, means[:count], strict=True)),
            weighted=dict(zip(names, means[count:], strict=True)),
            not_finite={name: last - duration + 1 for name, duration in durations if duration},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu(), "step": self.step_counter.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sums"].shape != self.sums.shape:  # `copy_` would broadcast
            raise ValueError(f"sums have shape {tuple(state['sums'].shape)}, expected {tuple(self.sums.shape)}")
        self.sums.copy_(state["sums"])
        self.step_counter.copy_(state["step"])
        self.steps = int(state["steps"])
