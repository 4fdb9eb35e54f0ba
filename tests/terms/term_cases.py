"""The cases that every shared test runs over: a term, its parameters, operands, and ways to get it wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import term_reference as reference
import torch
from torch import Tensor

from kdbench.registry import TERMS

BATCH, CLASSES = 5, 4


@dataclass(frozen=True)
class Case:
    """broken: name -> how to compute the loss with one mechanism switched off, from (case, operands)."""

    id: str
    term: str
    params: Mapping[str, Any] = field(default_factory=dict)
    student: tuple[int, ...] = (CLASSES,)
    teacher: tuple[int, ...] | None = (CLASSES,)
    extra: Callable[[], dict[str, Tensor]] = dict
    broken: Mapping[str, Callable[[Case, dict[str, Tensor]], Tensor]] = field(default_factory=dict)

    @property
    def entry(self):
        return TERMS.entry(self.term)

    @property
    def batch_space(self) -> bool:
        return self.entry.facts["space"] == "batch"

    def build(self, **params: Any):
        return TERMS.build(self.term, {**self.params, **params})

    def operands(self, batch: int = BATCH, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Operands with the student as a leaf that wants a gradient. Extra fields repeat to the size of the batch."""
        generator = torch.Generator().manual_seed(seed)
        found = {"student": torch.randn(batch, *self.student, generator=generator, dtype=torch.float64)}
        if self.teacher is not None:
            found["teacher"] = torch.randn(batch, *self.teacher, generator=generator, dtype=torch.float64)
        found = {name: (1.5 * value).to(dtype) for name, value in found.items()}
        found["student"].requires_grad_()
        for name, value in self.extra().items():
            found[name] = value.repeat(-(-batch // len(value)))[:batch]
        return found

    def reference(self, operands: Mapping[str, Any]) -> Any:
        plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in operands.items()}
        return getattr(reference, self.term)(**plain, **self.params)


def _with(**params: Any):
    return lambda case, operands: case.build(**params)(**operands)


def _times(factor: float):
    return lambda case, operands: factor * case.build()(**operands)


def _swapped(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return case.build()(**{**operands, "student": operands["teacher"], "teacher": operands["student"]})


def _without(*names: str):
    return lambda case, operands: case.build()(**{k: v for k, v in operands.items() if k not in names})


def _plain_gram(case: Case, operands: dict[str, Tensor]) -> Tensor:
    s, t = operands["student"].flatten(1), operands["teacher"].flatten(1)
    return (s @ s.t() - t @ t.t()).square().mean()


def _labels() -> dict[str, Tensor]:
    return {"label": torch.tensor([3, 0, 1, 3, 2])}


def _mixed() -> dict[str, Tensor]:
    other = torch.tensor([1, 0, 2, 0, 3])
    return {**_labels(), "label_other": other, "mix": torch.tensor([1.0, 0.5, 0.25, 0.0, 0.9]).double()}


MAP = (3, 2, 2)

CASES = [
    Case("cross_entropy", "cross_entropy", {}, teacher=None, extra=_labels, broken={"batch mean": _times(1 / BATCH)}),
    Case(
        "cross_entropy-smooth",
        "cross_entropy",
        {"label_smoothing": 0.1},
        teacher=None,
        extra=_labels,
        broken={"no smoothing": _with(label_smoothing=0.0)},
    ),
    Case(
        "cross_entropy-mixup",
        "cross_entropy",
        {"label_smoothing": 0.1},
        teacher=None,
        extra=_mixed,
        broken={"not mixed": _without("label_other", "mix")},
    ),
    Case("kd", "kd", {"temperature": 3.0}, broken={"no T^2": _times(1 / 9), "reversed KL": _swapped}),
    Case("kd-cold", "kd", {"temperature": 1.0}, broken={"T left at 4": _with(temperature=4.0)}),
    Case(
        "dkd",
        "dkd",
        {"alpha": 1.0, "beta": 6.0, "temperature": 2.0},
        extra=_labels,
        broken={"no T^2": _times(1 / 4), "parts exchanged": _with(alpha=6.0, beta=1.0), "no TCKD": _with(alpha=0.0)},
    ),
    Case("logit_mse", "logit_mse", {}, broken={"sum": _times(CLASSES), "centred": _with(centre=True)}),
    Case("logit_mse-centred", "logit_mse", {"centre": True}, broken={"not centred": _with(centre=False)}),
    Case(
        "dist",
        "dist",
        {"beta": 2.0, "gamma": 3.0, "temperature": 2.0},
        broken={"no T^2": _times(1 / 4), "no intra": _with(gamma=0.0), "no inter": _with(beta=0.0)},
    ),
    Case("hint", "hint", student=MAP, teacher=MAP, broken={"sum": _times(12)}),
    Case("hint-vectors", "hint", student=(6,), teacher=(6,), broken={"sum": _times(6)}),
    Case("at", "at", student=MAP, teacher=(5, 2, 2), broken={"p 1": _with(p=1.0), "sum": _times(4)}),
    Case("at-pooled", "at", {"p": 3.0}, student=(2, 4, 2), teacher=(3, 2, 4), broken={"p 2": _with(p=2.0)}),
    Case("sp", "sp", student=MAP, teacher=(7,), broken={"rows not normalised": _plain_gram, "mean": _times(BATCH)}),
    Case(
        "rkd",
        "rkd",
        student=(3,),
        teacher=(2, 3),
        broken={"no angles": _with(weight_angle=0.0), "no distances": _with(weight_distance=0.0)},
    ),
    Case("rkd-distance", "rkd", {"weight_angle": 0.0}, student=(3,), teacher=(2, 3), broken={"off": _times(0)}),
    Case("rkd-angle", "rkd", {"weight_distance": 0.0}, student=(3,), teacher=(2, 3), broken={"off": _times(0)}),
    Case("pkt", "pkt", student=(4,), teacher=(2, 3), broken={"reversed KL": _swapped, "row sums": _times(BATCH)}),
]
EQUAL_SIDES = [case for case in CASES if case.teacher is not None]
BATCH_CASES = [case for case in CASES if case.batch_space]
SAMPLE_CASES = [case for case in CASES if not case.batch_space]
LOGIT_CASES = [case for case in CASES if not case.entry.facts.get("features")]


def one_per_term(cases: list[Case]) -> list[Case]:
    return list({case.term: case for case in reversed(cases)}.values())


def case_id(case: Any) -> str:
    return case.id if isinstance(case, Case) else str(case)
