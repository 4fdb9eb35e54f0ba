"""Which student suits a teacher, found without training any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.errors import ConfigError
from kdbench.randomness import seeded
from kdbench.registry import ARTIFACTS, MODELS

SimilarityScore = Literal["diswot", "semantic", "relation"]


@ARTIFACTS.register("search", produces="model", operands=("teacher",), candidates="candidates")
class StudentSearch(ArtifactBuilder):
    """The candidate whose untrained network is most like the teacher on one batch: DisWOT.

    Dong, Li and Wei, DisWOT: Student Architecture Search for Distillation WithOut Training, CVPR 2023,
    arXiv:2303.15678. The measure is that of the authors' code (README.md, exps/parse_nb201_distill.py and
    distiller_zoo of lilujunai/DisWOT-CVPR2023). With feature maps F (batch, values) before the classifier, and the
    gradient g_c (channels) of the batch's mean cross-entropy in the classifier's row of class c, their Grad-CAM:

        relation: -(1 / batch^2) || n(F_T F_T') - n(F_S F_S') ||^2, over the samples of the batch;
        semantic: -(1 / (classes * channels)) sum over c of || n(g_T g_T') - n(g_S g_S') ||^2, over the channels;
        diswot: their sum. n divides each row by its length; || || is the Frobenius norm.

    The channels of teacher and candidates have to agree for `semantic` and `diswot`; `relation` takes any. Two things
    differ from the code: networks keep their own initialisation (there: standard normal) and are in eval mode. There
    the teacher is untrained too: give the role no `weights`; a trained one works as well.
    The file predictor/pruners/measures/diswot.py of that code holds another measure.

    Exhaustive by default. With `evaluations: N` at most N candidates are scored, by evolution: `population` of them are
    drawn, then again and again one of the best half is changed to a candidate that differs from it in one parameter (in
    any, where there is none) and the worst is dropped.

    teacher: the feature of the teacher, such as teacher:layer3. feature: the module path of it in the candidates.
    classifier: the module path of the last linear layer, the same in teacher and candidates.
    candidates: a mapping of names to models. score: see above. batch: how many samples (the first that have a label).
    max_parameters: larger candidates do not count. draws: how many initial weights the score is averaged over.
    """

    def __init__(
        self,
        candidates: dict,  # type: ignore[type-arg]
        feature: str,
        classifier: str = "fc",
        score: Literal["diswot", "semantic", "relation"] = "diswot",
        batch: int = 64,
        max_parameters: int | None = None,
        evaluations: int | None = None,
        population: int = 8,
        draws: int = 1,
    ) -> None:
        for name, value in (("batch", batch), ("population", population), ("draws", draws)):
            if value < 1:
                raise ConfigError(f"search: {name} must be 1 or more, got {value}")
        if evaluations is not None and evaluations < 1:
            raise ConfigError(f"search: evaluations must be 1 or more, got {evaluations}")
        self.candidates: dict[str, dict[str, Any]] = candidates
        self.feature, self.classifier, self.score = feature, classifier, score
        self.batch, self.max_parameters = batch, max_parameters
        self.evaluations, self.population, self.draws = evaluations, population, draws

    def check(self, facts: ArtifactContext) -> None:
        if len(facts.shapes.get("teacher", (1, 1))) < 2:
            raise ValueError("compares feature maps, but the teacher's operand is one vector per sample")
        sizes = {name: self._count_parameters(name, facts) for name in self.candidates}
        if self.max_parameters is not None and min(sizes.values()) > self.max_parameters:
            least = min(sizes, key=lambda name: sizes[name])
            raise ValueError(
                f"allows {self.max_parameters:,} parameters, but the smallest candidate, {least!r}, has "
                f"{sizes[least]:,}"
            )

    def _build(self, name: str, facts: ArtifactContext) -> nn.Module:
        params = dict(self.candidates[name])
        return MODELS.build(params.pop("type"), params, f"candidate {name!r}", **facts.injected)

    def _count_parameters(self, name: str, facts: ArtifactContext) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self._build(name, facts).parameters())

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        rows = pool.gather("image", "label")
        known = (rows["label"] >= 0).nonzero().flatten()[: self.batch]
        if not len(known):
            raise ConfigError("search: compares networks on labelled samples, but the source has none")
        shown = rows["image"][known].to(pool.device), rows["label"][known].to(pool.device)
        operand = pool.operands["teacher"]
        teacher = similarity_matrices(pool.modules[operand.role], operand.path, self.classifier, *shown)
        sizes = {name: self._count_parameters(name, pool.context) for name in self.candidates}
        names = [n for n in self.candidates if self.max_parameters is None or sizes[n] <= self.max_parameters]

        def scored(name: str) -> float:
            total = 0.0
            for draw in range(self.draws):
                with seeded(pool.seed, "init", name, draw):
                    model = self._build(name, pool.context).to(pool.device).eval()
                total += self._similarity(teacher, similarity_matrices(model, self.feature, self.classifier, *shown))
            return total / self.draws

        scores = self._evolve(names, scored, pool.seed) if self.evaluations else {n: scored(n) for n in names}
        best = max(scores, key=lambda name: scores[name])
        params = dict(self.candidates[best])
        told = {"chosen": best, "score": self.score, "scores": scores, "parameters": sizes[best]}
        return {"type": params.pop("type"), "params": params, "summary": told}

    def _similarity(self, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> float:
        """Minus how far two networks are apart, by what `looks` says of each."""
        relation = -float((teacher[1] - student[1]).square().mean())
        if self.score == "relation":
            return relation
        if teacher[0].shape != student[0].shape:
            raise ConfigError(
                "search: semantic similarity compares the channels that the classifier reads, class by class, but the "
                f"teacher has {list(teacher[0].shape)} (classes, channels) and a candidate {list(student[0].shape)}; "
                "give all of them equal channels there, or write score: relation"
            )
        semantic = -outer_product_distance(teacher[0], student[0])
        return semantic if self.score == "semantic" else semantic + relation

    def _evolve(self, names: list[str], scored: Callable[[str], float], seed: int) -> dict[str, float]:
        """Scores at most `evaluations` candidates; returns all scores that were taken."""
        drawn = torch.Generator().manual_seed(seed)

        def pick(among: list[str]) -> str:
            return among[int(torch.randint(len(among), (), generator=drawn))]

        assert self.evaluations is not None
        order = [names[i] for i in torch.randperm(len(names), generator=drawn).tolist()]
        scores = {name: scored(name) for name in order[: min(self.population, self.evaluations)]}
        living = list(scores)
        while len(scores) < min(self.evaluations, len(names)):
            living.sort(key=lambda name: -scores[name])
            parent = pick(living[: (len(living) + 1) // 2])
            fresh = [name for name in names if name not in scores]
            near = [n for n in fresh if _count_differing_params(self.candidates[n], self.candidates[parent]) == 1]
            child = pick(near or fresh)
            scores[child] = scored(child)
            living = sorted([*living, child], key=lambda name: -scores[name])[: self.population]
        return scores


def _count_differing_params(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    return sum(first.get(key) != second.get(key) for key in {**first, **second})


def similarity_matrices(model: nn.Module, path: str, classifier: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What two networks are compared by: the Grad-CAM of each class, and how alike the samples of the batch are.

    Args:
        path: the module whose output is the feature (batch, channels, ...).
        classifier: the module path of the last linear layer.

    Returns:
        The gradient of the mean cross-entropy in the classifier's weight (classes, channels), and the row-normalised
        Gram matrix of the samples' features (batch, batch).
    """
    kept: list[Tensor] = []
    try:
        module, last = model.get_submodule(path), model.get_submodule(classifier)
    except AttributeError as error:
        raise ConfigError(f"search: {type(model).__name__}: {error}") from None
    if not isinstance(last, nn.Linear):
        raise ConfigError(f"search: classifier {classifier!r} of {type(model).__name__} is no linear layer")
    handles = [
        module.register_forward_hook(lambda *call: kept.append(call[2])),
        last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0])),
    ]
    try:
        with torch.no_grad():
            output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    logits: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    maps, read = (values.double().flatten(1) for values in kept)
    # d mean(CE) / dW = (softmax - onehot)' x / batch: no backward pass is needed behind a linear layer
    wrong = logits.double().softmax(1) - F.one_hot(labels, logits.shape[1])
    return wrong.T @ read / len(images), F.normalize(maps @ maps.T, dim=-1)


def outer_product_distance(first: Tensor, second: Tensor) -> float:
    """sum over classes of || n(g g') - n(h h') ||^2 / (classes * channels), n dividing each row by its length.

    The rows of n(g g') are sign(g_i) g / |g|, so that no matrix over the channels is formed.

    Args:
        one, other: g and h, (classes, channels).
    """
    signs, lines = zip(*((g.sign(), F.normalize(g, dim=-1)) for g in (first, second)), strict=True)
    own = sum(s.square().sum(-1) * u.square().sum(-1) for s, u in zip(signs, lines, strict=True))
    both = (signs[0] * signs[1]).sum(-1) * (lines[0] * lines[1]).sum(-1)
    return float((own - 2 * both).mean() / first.shape[1])
