"""Numbers that move during training: of an optimiser's rate, a term's weight or a term's parameter.

A schedule is called as `schedule(position, length)`. By epoch, the position is the whole epoch (0-based) and lengths
are in epochs; by step, the position is the optimiser step (0-based) and lengths are in steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from kdbench.config.schema import PartConfig
from kdbench.registry import SCHEDULES

By = Literal["epoch", "step"]


class Schedule(Protocol):
    """What `build_schedule` returns."""

    by: By

    def __call__(self, position: float, length: float) -> float: ...


@SCHEDULES.register("constant")
class Constant:
    """The same value throughout.

    Example: `weight: 0.9` is short for `weight: {type: constant, value: 0.9}`.
    """

    def __init__(self, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return float(self.value)


@SCHEDULES.register("linear")
class Linear:
    """A straight line from `start` to `end` over `over` epochs (or steps), then `end`.

    Value at position p: start + (end - start) * min(p / over, 1). Without `over` it takes the whole stage.
    Example: `weight: {type: linear, start: 0, end: 1, over: 20}`.
    """

    def __init__(
        self, start: float = 1.0, end: float = 0.0, over: float | None = None, by: Literal["epoch", "step"] = "epoch"
    ) -> None:
        self.start = start
        self.end = end
        self.over = over
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.start + (self.end - self.start) * _progress(position, self.over or length)


@SCHEDULES.register("cosine")
class Cosine:
    """Half a cosine wave from `start` to `end` over `over` epochs (or steps), then `end`.

    Value at position p: end + (start - end) * (1 + cos(pi * min(p / over, 1))) / 2, one period of SGDR
    (arXiv:1608.03983). Without `over` it takes the whole stage. Example: `scheduler: {type: cosine, warmup: 5}`.
    """

    def __init__(
        self, start: float = 1.0, end: float = 0.0, over: float | None = None, by: Literal["epoch", "step"] = "epoch"
    ) -> None:
        self.start = start
        self.end = end
        self.over = over
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        turn = math.cos(math.pi * _progress(position, self.over or length))
        return self.end + (self.start - self.end) * (1 + turn) / 2


@SCHEDULES.register("step")
class Step:
    """`start`, multiplied by `gamma` at each milestone (an epoch or a step, 0-based).

    Example: `scheduler: {type: step, milestones: [150, 180, 210], gamma: 0.1}`: the epochs 150 to 179 run at 0.1.
    """

    def __init__(
        self, milestones: list[int], gamma: float = 0.1, start: float = 1.0, by: Literal["epoch", "step"] = "epoch"
    ) -> None:
        self.milestones = milestones
        self.gamma = gamma
        self.start = start
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.start * self.gamma ** bisect.bisect_right(self.milestones, position)


@SCHEDULES.register("warmup")
class Warmup:
    """Rises linearly to `value` over the first `over` epochs (or steps), then holds it.

    Value at position p: value * min((p + 1) / over, 1), so that the first epoch is not lost at zero; this is the
    warm-up of the weight in the released code of DKD (arXiv:2203.08679). Example: `weight: {type: warmup, over: 20}`.
    """

    def __init__(self, over: float, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.over = over
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.value * min((position + 1) / self.over, 1.0)


@SCHEDULES.register("ramp_up")
class RampUp:
    """Rises to `value` like half a bell over the first `over` epochs (or steps), then holds it.

    Value at position p: value * exp(-5 (1 - min(p / over, 1))^2), so that it begins at value * 0.0067: the weight of
    what networks say while they know little, as in temporal ensembling (arXiv:1610.02242) and mean teacher
    (arXiv:1703.01780). Example: `weight: {type: ramp_up, over: 20, value: 10}`.
    """

    def __init__(self, over: float, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.over = over
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.value * math.exp(-5.0 * (1.0 - _progress(position, self.over)) ** 2)


@SCHEDULES.register("chain")
class Chain:
    """Schedules one after the other; each part has a `length`, and the last may take what is left.

    Example: `scheduler: {type: chain, parts: [{type: warmup, over: 5, length: 5}, {type: cosine}]}`.
    """

    def __init__(self, parts: list[dict | str], by: Literal["epoch", "step"] = "epoch") -> None:
        self.by: By = by
        self.parts: list[tuple[Schedule, float | None]] = []
        spelled: list[dict[str, Any]] = [{"type": part} if isinstance(part, str) else part for part in parts]
        for part in spelled:
            params = {key: value for key, value in part.items() if key not in ("type", "length")}
            self.parts.append((SCHEDULES.build(part["type"], {**params, "by": by}), part.get("length")))

    def __call__(self, position: float, length: float) -> float:
        begin = 0.0
        for index, (part, given) in enumerate(self.parts):
            own = length - begin if given is None else given
            if position < begin + own or index == len(self.parts) - 1:
                return part(position - begin, own)
            begin += own
        raise AssertionError("a chain has at least one part")


class WithWarmup:
    """Another schedule times a linear rise over the first `warmup` epochs (or steps); milestones stay put."""

    def __init__(self, schedule: Schedule, warmup: float) -> None:
        self.schedule = schedule
        self.rise = Warmup(warmup)
        self.by: By = schedule.by

    def __call__(self, position: float, length: float) -> float:
        return self.schedule(position, length) * self.rise(position, length)


def _progress(position: float, over: float) -> float:
    return min(max(position / over, 0.0), 1.0) if over > 0 else 1.0


def build_schedule(value: float | PartConfig | Mapping[str, Any] | None) -> Schedule:
    """Builds the schedule of a rate, a weight or a parameter.

    A number is constant, None is constant 1; a `warmup` beside an optimiser's schedule multiplies it (`Warmed`).
    """
    if value is None or isinstance(value, int | float):
        return Constant(1.0 if value is None else value)
    kind, params = (value.type, value.params) if isinstance(value, PartConfig) else (value["type"], value)
    schedule: Schedule = SCHEDULES.build(kind, {k: v for k, v in params.items() if k not in ("type", "warmup")})
    return WithWarmup(schedule, params["warmup"]) if params.get("warmup") else schedule
