"""Schedules, which change a learning rate, the weight of a term or a parameter of a term during training.

A schedule is called as `schedule(position, length)`. With `by: epoch` the position is the 0-based epoch and lengths
are in epochs; with `by: step` the position is the 0-based optimizer step and lengths are in steps.
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
    """A function from a position in a stage (an epoch or a step) and the length of the stage to a value."""

    by: By

    def __call__(self, position: float, length: float) -> float: ...


@SCHEDULES.register("constant")
class Constant:
    """Constant value.

    Example (recipe):
        weight: {type: constant, value: 0.9}    # the same as weight: 0.9
    """

    def __init__(self, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return float(self.value)


@SCHEDULES.register("linear")
class Linear:
    r"""Linear interpolation from `start` to `end`, then constant.

    .. math:: v(p) = start + (end - start) \min(p / over, 1)

    Args:
        over: number of epochs or steps; null: the length of the stage.

    Example (recipe):
        weight: {type: linear, start: 0, end: 1, over: 20}
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
    r"""Cosine annealing from `start` to `end`, then constant: one period of SGDR (arXiv:1608.03983).

    .. math:: v(p) = end + (start - end) (1 + \cos(\pi \min(p / over, 1))) / 2

    Args:
        over: number of epochs or steps; null: the length of the stage.

    Example (recipe):
        scheduler: {type: cosine, warmup: 5}
    """

    def __init__(
        self, start: float = 1.0, end: float = 0.0, over: float | None = None, by: Literal["epoch", "step"] = "epoch"
    ) -> None:
        self.start = start
        self.end = end
        self.over = over
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        cosine = math.cos(math.pi * _progress(position, self.over or length))
        return self.end + (self.start - self.end) * (1 + cosine) / 2


@SCHEDULES.register("step")
class Step:
    r"""Step decay: the value begins with `start` and is multiplied by `gamma` at each milestone.

    .. math:: v(p) = start \cdot gamma^{|\{m : m \le p\}|}

    Args:
        milestones: 0-based epochs or steps, in ascending order.

    Example (recipe):
        scheduler: {type: step, milestones: [150, 180, 210], gamma: 0.1}    # 0.1 in the epochs 150 to 179
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
    r"""Linear warm-up to `value`, then constant, as for the loss weight in the released code of DKD (arXiv:2203.08679).

    .. math:: v(p) = value \min((p + 1) / over, 1)

    The value at the first position is above 0, so that the first epoch has an effect.

    Args:
        over: number of epochs or steps.

    Example (recipe):
        weight: {type: warmup, over: 20}
    """

    def __init__(self, over: float, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.over = over
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.value * min((position + 1) / self.over, 1.0)


@SCHEDULES.register("ramp_up")
class RampUp:
    r"""Gaussian ramp-up to `value`, then constant.

    .. math:: v(p) = value \exp(-5 (1 - \min(p / over, 1))^2)

    The first value is 0.0067 times `value`. This is the weight of consistency losses in temporal ensembling
    (arXiv:1610.02242) and mean teacher (arXiv:1703.01780).

    Args:
        over: number of epochs or steps.

    Example (recipe):
        weight: {type: ramp_up, over: 20, value: 10}
    """

    def __init__(self, over: float, value: float = 1.0, by: Literal["epoch", "step"] = "epoch") -> None:
        self.over = over
        self.value = value
        self.by: By = by

    def __call__(self, position: float, length: float) -> float:
        return self.value * math.exp(-5.0 * (1.0 - _progress(position, self.over)) ** 2)


@SCHEDULES.register("chain")
class Chain:
    """Sequence of schedules, each with its own `length`.

    Args:
        parts: schedules, each with an additional key `length`. The last schedule may omit `length` and then takes all
            remaining epochs or steps.

    Example (recipe):
        scheduler: {type: chain, parts: [{type: warmup, over: 5, length: 5}, {type: cosine}]}
    """

    def __init__(self, parts: list[dict | str], by: Literal["epoch", "step"] = "epoch") -> None:
        self.by: By = by
        self.parts: list[tuple[Schedule, float | None]] = []
        configs: list[dict[str, Any]] = [{"type": part} if isinstance(part, str) else part for part in parts]
        for part in configs:
            params = {key: value for key, value in part.items() if key not in ("type", "length")}
            self.parts.append((SCHEDULES.build(part["type"], {**params, "by": by}), part.get("length")))

    def __call__(self, position: float, length: float) -> float:
        begin = 0.0
        for index, (part, fixed_length) in enumerate(self.parts):
            part_length = length - begin if fixed_length is None else fixed_length
            if position < begin + part_length or index == len(self.parts) - 1:
                return part(position - begin, part_length)
            begin += part_length
        raise AssertionError("a chain has at least one part")


class WithWarmup:
    """Product of a schedule and a linear warm-up. The warm-up does not delay the schedule."""

    def __init__(self, schedule: Schedule, warmup: float) -> None:
        self.schedule = schedule
        self.warmup = Warmup(warmup)
        self.by: By = schedule.by

    def __call__(self, position: float, length: float) -> float:
        return self.schedule(position, length) * self.warmup(position, length)


def _progress(position: float, over: float) -> float:
    return min(max(position / over, 0.0), 1.0) if over > 0 else 1.0


def build_schedule(value: float | PartConfig | Mapping[str, Any] | None) -> Schedule:
    """Builds the schedule of a learning rate, of a term's weight, or of a term's parameter.

    Args:
        value: a number (constant schedule), None (constant 1), or the config of a schedule. An additional key
            `warmup` multiplies the schedule by a linear warm-up.
    """
    if value is None or isinstance(value, int | float):
        return Constant(1.0 if value is None else value)
    kind, params = (value.type, value.params) if isinstance(value, PartConfig) else (value["type"], value)
    schedule: Schedule = SCHEDULES.build(kind, {k: v for k, v in params.items() if k not in ("type", "warmup")})
    return WithWarmup(schedule, params["warmup"]) if params.get("warmup") else schedule
