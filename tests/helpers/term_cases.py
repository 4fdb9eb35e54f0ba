"""The cases that every shared test runs over: a term, its parameters, operands, and ways to get it wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import feature_reference, logit_reference, term_reference
from kdbench.registry import TERMS

BATCH, CLASSES, SAMPLES = 5, 4, 40
REFERENCES = [term_reference, logit_reference, feature_reference]

ELSEWHERE = {
    "vid": "test_variational",
    "crd": "test_contrastive",
    "queue_similarity": "test_queues",
    "weight_distance": "test_weight_terms",
    "ewc": "test_weight_terms",
    "last_batch": "test_self_teaching",
    "temporal_ensemble": "test_self_teaching",
    "taid": "test_progressive",
    "cmi": "test_class_statistics",
    "scar": "test_class_statistics",
    "bn_statistics": "test_generated",
    "reinforce": "test_routing",
}
"""Terms with parameters or a memory, and those without rows: the file that tests each."""


@dataclass(frozen=True)
class Case:
    """more: shapes of further operands with rows, drawn as the teacher is. still: operands without rows, such as class
    means. broken: name -> how to compute the loss with one mechanism switched off, from (case, operands).
    zero: whether the loss vanishes where the student equals the teacher. by_class: whether the order of the classes
    does not matter. simplex: the student operand holds probabilities.
    """

    id: str
    term: str
    params: Mapping[str, Any] = field(default_factory=dict)
    student: tuple[int, ...] = (CLASSES,)
    teacher: tuple[int, ...] | None = (CLASSES,)
    extra: Callable[[], dict[str, Tensor]] = dict
    broken: Mapping[str, Callable[[Case, dict[str, Tensor]], Tensor]] = field(default_factory=dict)
    by_class: bool = True
    simplex: bool = False
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    still: Callable[[], dict[str, Tensor]] = dict
    zero: bool = True

    @property
    def entry(self):
        return TERMS.entry(self.term)

    @property
    def batch_space(self) -> bool:
        return self.entry.facts["space"] == "batch"

    def build(self, **params: Any):
        """A new instance, always with the same parameters and an empty memory."""
        shapes = {"student": self.student, "teacher": self.teacher}
        torch.manual_seed(0)
        return TERMS.build(self.term, {**self.params, **params}, samples=SAMPLES, num_classes=CLASSES, shapes=shapes)

    def loss(self, **operands: Any) -> Tensor:
        """What a new instance says, so that no call sees what an earlier one left in a memory."""
        return self.build()(**operands)

    def operands(self, batch: int = BATCH, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Operands with the student as a leaf that wants a gradient. Extra fields repeat to the size of the batch."""
        generator = torch.Generator().manual_seed(seed)
        found = {"student": torch.randn(batch, *self.student, generator=generator, dtype=torch.float64)}
        if self.teacher is not None:
            found["teacher"] = torch.randn(batch, *self.teacher, generator=generator, dtype=torch.float64)
        for name, shape in self.more.items():
            found[name] = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
        found = {name: (1.5 * value).to(dtype) for name, value in found.items()}
        if self.simplex:
            found["student"] = found["student"].softmax(1)
        found["student"].requires_grad_()
        for name, value in self.extra().items():
            found[name] = value.repeat(-(-batch // len(value)), *[1] * (value.dim() - 1))[:batch]
        return {**found, **{name: value.to(dtype) for name, value in self.still().items()}}

    def rows(self, operands: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        """The operands of some rows of the batch."""
        still = self.still()
        return {name: value if name in still else value[chosen] for name, value in operands.items()}

    def with_equal_sides(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands, the teacher's replaced by the student's."""
        sides = {name: name.replace("teacher", "student") for name in operands if name.startswith("teacher")}
        return {**operands, **{theirs: operands[ours].detach() for theirs, ours in sides.items()}}

    def reference(self, operands: Mapping[str, Any]) -> Any:
        plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in operands.items()}
        for module in REFERENCES:
            if hasattr(module, self.term):
                return getattr(module, self.term)(**plain, **self.params)
        raise AssertionError(f"no reference for the term {self.term!r}")


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


def _turned() -> dict[str, Tensor]:
    return {**_labels(), "kind": torch.tensor([0, 1, 1, 0, 1])}


def _kinds_first(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return case.build()(
        operands["student"].unflatten(1, (2, CLASSES)).mT.flatten(1), operands["kind"], operands["label"]
    )


def _never_turned(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return case.build()(operands["student"], torch.zeros_like(operands["kind"]), operands["label"])


def _mixed() -> dict[str, Tensor]:
    other = torch.tensor([1, 0, 2, 0, 3])
    return {**_labels(), "label_other": other, "mix": torch.tensor([1.0, 0.5, 0.25, 0.0, 0.9]).double()}


def _indexed() -> dict[str, Tensor]:
    return {**_labels(), "index": torch.tensor([7, 3, 11, 39, 0])}


def _old_as_new(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return case.build(old=[0])(**operands)


def _everywhere(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return (operands["student"] - operands["teacher"]).square().mean()


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
    Case(
        "joint_cross_entropy",
        "joint_cross_entropy",
        {"kinds": 2},
        student=(2 * CLASSES,),
        teacher=None,
        extra=_turned,
        by_class=False,
        broken={"kinds first": _kinds_first, "not turned": _never_turned},
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
    Case("label_mse", "label_mse", {}, teacher=None, extra=_labels, broken={"sum": _times(CLASSES)}),
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
    Case(
        "divergence-js",
        "divergence",
        {"temperature": 2.0},
        broken={"no T^2": _times(1 / 4), "KL": _with(kind="reverse_kl")},
    ),
    Case(
        "divergence-forward",
        "divergence",
        {"kind": "forward_kl"},
        broken={"reversed": _swapped, "js": _with(kind="js")},
    ),
    Case("divergence-reverse", "divergence", {"kind": "reverse_kl"}, broken={"reversed": _swapped}),
    Case(
        "divergence-soft",
        "divergence",
        {"kind": "soft_cross_entropy"},
        zero=False,
        broken={"reversed": _swapped, "KL": _with(kind="forward_kl")},
    ),
    Case("probability_mse", "probability_mse", broken={"sum": _times(CLASSES)}),
    Case("standardised_kd", "standardised_kd", {"temperature": 3.0}, broken={"no T^2": _times(1 / 9)}),
    Case("entropy", "entropy", teacher=None, broken={"negative": _times(-1)}),
    Case(
        "entropy-gate",
        "entropy",
        {"of": "probabilities"},
        teacher=None,
        simplex=True,
        broken={"logits": _with(of="logits")},
    ),
    Case("self_target-first", "self_target", teacher=None, extra=_indexed, broken={"half": _times(0.5)}),
    Case(
        "tf_kd",
        "tf_kd",
        teacher=None,
        extra=_labels,
        broken={"sure": _with(correct=0.7), "T 1": _with(temperature=1.0)},
    ),
    Case("ctkd", "ctkd", {"span": 3.0}, broken={"span": _with(span=4.0)}),
    Case("competition", "competition", zero=False, broken={"T 1": _with(temperature=1.0)}),
    Case(
        "binary-1",
        "binary",
        {"target": 1.0},
        student=(1,),
        teacher=None,
        by_class=False,
        broken={"0": _with(target=0.0)},
    ),
    Case(
        "binary-soft",
        "binary",
        {"target": 0.3},
        student=(),
        teacher=None,
        by_class=False,
        broken={"1": _with(target=1.0)},
    ),
    Case("one_hot", "one_hot", teacher=None, broken={"sum": _times(CLASSES)}),
    Case("information_entropy", "information_entropy", teacher=None, broken={"log10": _times(0.4343)}),
    Case("activation", "activation", student=MAP, teacher=None, broken={"sum": _times(12)}),
    Case(
        "total_variation",
        "total_variation",
        student=(2, 3, 4),
        teacher=None,
        by_class=False,
        broken={"2": _with(norm=2)},
    ),
    Case(
        "total_variation-2",
        "total_variation",
        {"norm": 2},
        student=(2, 3, 4),
        teacher=None,
        by_class=False,
        broken={"1": _with(norm=1)},
    ),
    Case("image_norm", "image_norm", student=MAP, teacher=None, by_class=False, broken={"squared": _times(2)}),
    Case("icarl", "icarl", {"old": [0, 2]}, extra=_labels, zero=False, by_class=False, broken={"old": _old_as_new}),
    Case(
        "proxy_contrastive",
        "proxy_contrastive",
        {"temperature": 0.5},
        teacher=None,
        extra=_labels,
        broken={"T 1": _with(temperature=1.0), "sum": _times(BATCH)},
    ),
    Case(
        "proxy_distance",
        "proxy_distance",
        extra=_labels,
        broken={"all classes": _everywhere, "sum": _times(BATCH)},
    ),
    Case("load_balance", "load_balance", teacher=None, simplex=True, broken={"cv": _with(kind="cv")}),
    Case(
        "load_balance-cv", "load_balance", {"kind": "cv"}, teacher=None, simplex=True, broken={"kl": _with(kind="kl")}
    ),
    Case(
        "similarity_distribution",
        "similarity_distribution",
        {"temperature": 0.5},
        student=(4,),
        teacher=(2, 3),
        zero=False,
        broken={"sides": _swapped, "T 1": _with(temperature=1.0)},
    ),
    Case("pkt", "pkt", student=(4,), teacher=(2, 3), broken={"reversed KL": _swapped, "row sums": _times(BATCH)}),
]


def _tokens() -> dict[str, Tensor]:
    return {"tokens": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1], [0, 1, 0, 1]]).bool()}


def _means() -> dict[str, Tensor]:
    return {
        "means": torch.tensor([[1.0, 2, 0, -1, 0, 1], [0, -1, 1, 1, 2, 0], [3, 0, 1, 0, 0, -2], [1, 1, 1, 1, 1, 1]])
    }


def _longer_student(case: Case, operands: dict[str, Tensor]) -> Tensor:
    return case.build()(**{**operands, "teacher": 0 * operands["teacher"]})


TOKENS = (4, 6)
FEATURE_CASES = [
    Case(
        "fsp",
        "fsp",
        student=(3, 2, 2),
        teacher=(3, 4, 2),
        more={"student_from": (2, 4, 4), "teacher_from": (2, 4, 2)},
        broken={
            "channels exchanged": lambda case, o: case.build()(**{**o, "student_from": o["student_from"].flip(1)}),
            "sum": _times(6),
        },
    ),
    Case("ab", "ab", student=MAP, teacher=MAP, zero=False, broken={"mean": _times(1 / 12), "m 0": _with(margin=0.0)}),
    Case("ab-margin", "ab", {"margin": 0.3}, student=(6,), teacher=(6,), zero=False, broken={"m 1": _with(margin=1.0)}),
    Case(
        "ft",
        "ft",
        student=MAP,
        teacher=MAP,
        broken={"sum": _times(12), "plain": lambda case, o: (o["student"] - o["teacher"]).abs().flatten(1).mean(1)},
    ),
    Case("reconstruction", "reconstruction", student=MAP, teacher=MAP, broken={"sum": _times(12)}),
    Case(
        "nd",
        "nd",
        student=(6,),
        teacher=(6,),
        extra=_labels,
        still=_means,
        zero=False,
        broken={
            "cosine": _longer_student,
            "other class": lambda case, o: case.build()(**{**o, "label": 3 - o["label"]}),
        },
    ),
    Case("nst", "nst", student=MAP, teacher=(5, 2, 2), broken={"sum": _times(4)}),
    Case("nst-pooled", "nst", student=(2, 4, 2), teacher=(3, 2, 4), broken={"sum": _times(4)}),
    Case("mmd", "mmd", broken={"mean": _times(1 / 3), "by sample": _times(BATCH)}),
    Case("cc", "cc", student=MAP, teacher=(7,), broken={"order 1": _with(order=1), "gamma 1": _with(gamma=1.0)}),
    Case("cc-order", "cc", {"gamma": 1.0, "order": 4}, student=(3,), teacher=(7,), broken={"order 3": _with(order=3)}),
    Case(
        "hcl",
        "hcl",
        student=(2, 4, 4),
        teacher=(2, 4, 4),
        broken={"one scale": lambda case, o: (o["student"] - o["teacher"]).square().flatten(1).mean(1)},
    ),
    Case("hcl-vectors", "hcl", student=(6,), teacher=(6,), broken={"sum": _times(6)}),
    Case(
        "ofa",
        "ofa",
        {"power": 1.5},
        extra=_labels,
        zero=False,
        broken={"power 1": _with(power=1.0), "swapped": _swapped},
    ),
    Case(
        "ofa-warm",
        "ofa",
        {"power": 1.2, "temperature": 2.0},
        extra=_labels,
        zero=False,
        broken={"T 1": _with(temperature=1.0), "T^2": _times(4)},
    ),
    Case("dhkd", "dhkd", broken={"T 1": _with(temperature=1.0), "no T^2": _times(1 / 4), "mean": _times(1 / CLASSES)}),
    Case(
        "feature_distance",
        "feature_distance",
        student=TOKENS,
        teacher=TOKENS,
        broken={"l1": _with(distance="l1"), "sum": _times(6)},
    ),
    Case(
        "feature_distance-length",
        "feature_distance",
        {"distance": "l1", "scale": "length"},
        student=MAP,
        teacher=MAP,
        broken={"not scaled": _with(scale="none"), "l2": _with(distance="l2")},
    ),
    Case(
        "feature_distance-hidden",
        "feature_distance",
        {"distance": "smooth_l1", "scale": "layer_norm"},
        student=TOKENS,
        teacher=TOKENS,
        extra=_tokens,
        broken={"all tokens": _without("tokens"), "not scaled": _with(scale="none")},
    ),
    Case("feature_distance-vectors", "feature_distance", {"distance": "smooth_l1"}, student=(6,), teacher=(6,)),
    Case("cosine", "cosine", student=(6,), teacher=(6,), broken={"sum": _times(6)}),
    Case("cosine-map", "cosine", student=MAP, teacher=MAP, broken={"sum": _times(4)}),
    Case("cosine-tokens", "cosine", student=TOKENS, teacher=TOKENS, extra=_tokens, broken={"all": _without("tokens")}),
    Case("token_relation", "token_relation", student=TOKENS, teacher=(4, 3), broken={"sum": _times(4)}),
    Case("token_relation-map", "token_relation", student=MAP, teacher=(5, 2, 2), broken={"sum": _times(4)}),
    Case(
        "token_relation-seen",
        "token_relation",
        student=TOKENS,
        teacher=(4, 3),
        extra=_tokens,
        broken={"all tokens": _without("tokens")},
    ),
    Case(
        "attention_relation",
        "attention_relation",
        student=TOKENS,
        teacher=(4, 3),
        broken={"reversed KL": _swapped, "sum": _times(4)},
    ),
    Case(
        "attention_relation-keys",
        "attention_relation",
        {"heads": 2, "part": "key"},
        student=TOKENS,
        teacher=(4, 12),
        broken={"one head": _with(heads=1), "values": _with(part="value")},
    ),
    Case(
        "info_nce",
        "info_nce",
        {"temperature": 0.5},
        student=(6,),
        teacher=(3, 2),
        zero=False,
        broken={"T": _with(temperature=1.0)},
    ),
]
CASES += FEATURE_CASES
CASES += [
    Case(
        "bkd",
        "bkd",
        {"temperature": 3.0, "beta": 0.99},
        still=lambda: {"counts": torch.tensor([200.0, 50.0, 10.0, 1.0], dtype=torch.float64)},
        by_class=False,  # the counts have no rows to be renamed
        zero=False,  # the target is not the teacher's own prediction
        broken={"no T^2": _times(1 / 9), "classes alike": _with(beta=0.0), "1 / count": _with(beta=0.9999)},
    ),
    Case(
        "sinkhorn",
        "sinkhorn",
        {"temperature": 1.5, "epsilon": 0.2, "iterations": 3},
        zero=False,
        broken={"sum": _times(BATCH), "not scaled": _with(iterations=1), "another kernel": _with(epsilon=0.4)},
    ),
]
EQUAL_SIDES = [case for case in CASES if case.teacher is not None]
BATCH_CASES = [case for case in CASES if case.batch_space]
SAMPLE_CASES = [case for case in CASES if not case.batch_space]
LOGIT_CASES = [case for case in CASES if case.by_class and not case.entry.facts.get("features")]


def one_per_term(cases: list[Case]) -> list[Case]:
    return list({case.term: case for case in reversed(cases)}.values())


def case_id(case: Any) -> str:
    return case.id if isinstance(case, Case) else str(case)
