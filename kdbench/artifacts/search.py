"""Training-free search for a student architecture (DisWOT)."""

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
    r"""Training-free search for the student architecture most similar to the teacher on one batch (DisWOT).

    Dong, Li and Wei, DisWOT: Student Architecture Search for Distillation WithOut Training, CVPR 2023,
    arXiv:2303.15678; formulas of the authors' code (README.md, exps/parse_nb201_distill.py and distiller_zoo of
    lilujunai/DisWOT-CVPR2023). F (batch, values) is the feature map before the classifier, and g_c (channels) the
    gradient of the mean cross-entropy of the batch with respect to the classifier's row of class c (the Grad-CAM):

        relation: -(1 / batch^2) || n(F_T F_T') - n(F_S F_S') ||^2, similarity of the samples of the batch
        semantic: -(1 / (classes * channels)) sum_c || n(g_T g_T') - n(g_S g_S') ||^2, similarity of the channels
        diswot: relation + semantic

    where n divides each row by its length and || || is the Frobenius norm. `semantic` and `diswot` need the same
    number of channels in the teacher and the candidates; `relation` does not.

    Differences from the authors' code: networks keep their own initialisation (in the code: standard normal) and are
    in eval mode. The teacher of the code is untrained; a teacher role without `weights` is the same. The file
    predictor/pruners/measures/diswot.py of the code contains a different formula.

    By default all candidates are scored. `evaluations: N` scores at most N candidates by evolution. The first
    population is random. Then, repeatedly, a parent from the better half of the population is mutated in one
    parameter (or, if no unscored candidate differs in one parameter, an unscored candidate is drawn), and the worst
    candidate is removed.

    Operands:
        teacher: feature of the teacher (batch, channels, ...), such as teacher:layer3.

    Args:
        candidates: mapping of names to models.
        feature: module path of the feature in the candidates.
        classifier: module path of the last linear layer, which must be equal in the teacher and the candidates.
        score: relation, semantic or diswot.
        batch: number of samples in the batch, which has the first labelled samples of the source.
        max_parameters: maximum number of parameters of a scored candidate; null: no limit.
        evaluations: maximum number of scored candidates; null: all are scored.
        population: population size of the evolution.
        draws: number of random initialisations over which a score is averaged.

    Example (recipe):
        artifacts:
          student:
            type: search
            teacher: "teacher:layer3"
            feature: layer3
            candidates: {narrow: {type: digits_resnet, width: 8}, wide: {type: digits_resnet, width: 16}}
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
                raise ConfigError(f"search: {name} must be at least 1, got {value}")
        if evaluations is not None and evaluations < 1:
            raise ConfigError(f"search: evaluations must be at least 1, got {evaluations}")
        self.candidates: dict[str, dict[str, Any]] = candidates
        self.feature, self.classifier, self.score = feature, classifier, score
        self.batch, self.max_parameters = batch, max_parameters
        self.evaluations, self.population, self.draws = evaluations, population, draws

    def check(self, context: ArtifactContext) -> None:
        if len(context.shapes.get("teacher", (1, 1))) < 2:
            raise ValueError("compares feature maps, but the teacher's operand is one vector per sample")
        sizes = {name: self._count_parameters(name, context) for name in self.candidates}
        if self.max_parameters is not None and min(sizes.values()) > self.max_parameters:
            smallest = min(sizes, key=lambda name: sizes[name])
            raise ValueError(
                f"allows {self.max_parameters:,} parameters, but the smallest candidate, {smallest!r}, has "
                f"{sizes[smallest]:,}"
            )

    def _build(self, name: str, context: ArtifactContext) -> nn.Module:
        params = dict(self.candidates[name])
        return MODELS.build(params.pop("type"), params, f"candidate {name!r}", **context.injected)

    def _count_parameters(self, name: str, context: ArtifactContext) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self._build(name, context).parameters())

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        values = outputs.gather("image", "label")
        rows = (values["label"] >= 0).nonzero().flatten()[: self.batch]
        if not len(rows):
            raise ConfigError("search: compares networks on labelled samples, but the source has none")
        images, labels = (values[name][rows].to(outputs.device) for name in ("image", "label"))
        operand = outputs.operands["teacher"]
        teacher_model = outputs.modules[operand.role]
        teacher = similarity_matrices(teacher_model, operand.path, self.classifier, images, labels)
        sizes = {name: self._count_parameters(name, outputs.context) for name in self.candidates}
        names = [n for n in self.candidates if self.max_parameters is None or sizes[n] <= self.max_parameters]

        def mean_score(name: str) -> float:
            total = 0.0
            for draw in range(self.draws):
                # The key words seed the random stream; other words would give other initial weights.
                with seeded(outputs.seed, "init", name, draw):
                    model = self._build(name, outputs.context).to(outputs.device).eval()
                student = similarity_matrices(model, self.feature, self.classifier, images, labels)
                total += self._similarity(teacher, student)
            return total / self.draws

        scores = (
            self._evolve(names, mean_score, outputs.seed) if self.evaluations else {n: mean_score(n) for n in names}
        )
        best = max(scores, key=lambda name: scores[name])
        params = dict(self.candidates[best])
        summary = {"selected": best, "score": self.score, "scores": scores, "parameters": sizes[best]}
        return {"type": params.pop("type"), "params": params, "summary": summary}

    def _similarity(self, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> float:
        """Computes the score from the `similarity_matrices` of teacher and candidate. The maximum is 0."""
        relation = -float((teacher[1] - student[1]).square().mean())
        if self.score == "relation":
            return relation
        if teacher[0].shape != student[0].shape:
            raise ConfigError(
                "search: semantic similarity needs the same number of classifier input channels in all networks, but "
                f"the teacher has {list(teacher[0].shape)} (classes, channels) and a candidate "
                f"{list(student[0].shape)}; use candidates with the teacher's channels, or score: relation"
            )
        semantic = -outer_product_distance(teacher[0], student[0])
        return semantic if self.score == "semantic" else semantic + relation

    def _evolve(self, names: list[str], score: Callable[[str], float], seed: int) -> dict[str, float]:
        """Scores at most `evaluations` candidates by evolution and returns candidate name -> score."""
        generator = torch.Generator().manual_seed(seed)

        def pick(pool: list[str]) -> str:
            return pool[int(torch.randint(len(pool), (), generator=generator))]

        assert self.evaluations is not None
        order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        scores = {name: score(name) for name in order[: min(self.population, self.evaluations)]}
        population = list(scores)
        while len(scores) < min(self.evaluations, len(names)):
            population.sort(key=lambda name: -scores[name])
            parent = pick(population[: (len(population) + 1) // 2])
            unscored = [name for name in names if name not in scores]
            mutations = [
                name
                for name in unscored
                if _count_differing_params(self.candidates[name], self.candidates[parent]) == 1
            ]
            child = pick(mutations or unscored)
            scores[child] = score(child)
            population = sorted([*population, child], key=lambda name: -scores[name])[: self.population]
        return scores


def _count_differing_params(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    return sum(first.get(key) != second.get(key) for key in {**first, **second})


def similarity_matrices(
    model: nn.Module, path: str, classifier: str, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the two matrices of a network from which DisWOT's scores are computed.

    Args:
        model: a classifier in eval mode.
        path: module path whose output is the feature (batch, channels, ...).
        classifier: module path of the last linear layer.
        images: (batch, ...).
        labels: int64 (batch,).

    Returns:
        Gradient of the mean cross-entropy with respect to the classifier's weight (classes, channels), and Gram
        matrix of the samples' features with rows normalised to unit length (batch, batch). The dtype is float64.

    Raises:
        ConfigError: a module path does not exist, or the classifier is not linear.
    """
    try:
        feature_module, linear = model.get_submodule(path), model.get_submodule(classifier)
    except AttributeError as error:
        raise ConfigError(f"search: {type(model).__name__}: {error}") from None
    if not isinstance(linear, nn.Linear):
        raise ConfigError(f"search: classifier {classifier!r} of {type(model).__name__} is not an nn.Linear")
    hooked: list[Tensor] = []
    handles = [
        feature_module.register_forward_hook(lambda *call: hooked.append(call[2])),
        linear.register_forward_pre_hook(lambda module, inputs: hooked.append(inputs[0])),
    ]
    try:
        with torch.no_grad():
            output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    logits: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    # The feature module runs before the classifier, so that its output was appended first.
    maps, classifier_input = (values.double().flatten(1) for values in hooked)
    # d mean(CE) / dW = (softmax - onehot)' x / batch: no backward pass is needed for a linear layer
    logit_gradient = logits.double().softmax(1) - F.one_hot(labels, logits.shape[1])
    return logit_gradient.T @ classifier_input / len(images), F.normalize(maps @ maps.T, dim=-1)


def outer_product_distance(first: Tensor, second: Tensor) -> float:
    """Computes sum_c || n(g_c g_c') - n(h_c h_c') ||^2 / (classes * channels), where n normalises matrix rows.

    Each row is divided by its length. Row i of n(g g') is sign(g_i) g / |g|, so no (channels, channels) matrix is
    computed.

    Args:
        first: g, (classes, channels).
        second: h, (classes, channels).
    """
    signs, units = zip(*((g.sign(), F.normalize(g, dim=-1)) for g in (first, second)), strict=True)
    squares = sum(s.square().sum(-1) * u.square().sum(-1) for s, u in zip(signs, units, strict=True))
    product = (signs[0] * signs[1]).sum(-1) * (units[0] * units[1]).sum(-1)
    return float((squares - 2 * product).mean() / first.shape[1])
