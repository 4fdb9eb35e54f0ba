"""Which student suits a teacher, found without training any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.makers.base import Facts, Maker, Pool
from kdbench.randomness import seeded
from kdbench.registry import MAKERS, MODELS

Score = Literal["diswot", "semantic", "relation"]


@MAKERS.register("search", makes="model", operands=("teacher",), candidates="candidates")
class Search(Maker):
    """The candidate whose untrained network is most like the teacher on one batch: DisWOT.

    Dong, Li and Wei, DisWOT: Student Architecture Search for Distillation WithOut Training, CVPR 2023,
    arXiv:2303.15678. With feature maps A (batch, channels, positions) before the classifier:

        relation: -|| n(F_T F_T') - n(F_S F_S') ||, F = A flattened by sample, a matrix over the batch;
        semantic: -|| n(G_T G_T') - n(G_S G_S') ||, G the Grad-CAM maps (classes, batch x positions) of every class,
            G_c = sum over channels of (mean gradient of logit c) A: a matrix over the classes;
        diswot: their sum. n divides each row by its length; || || is the Frobenius norm.

    The released code holds another measure under this name (predictor/pruners/measures/diswot.py), so this follows
    what is told of the paper, whose formulas were not at hand. There the teacher is untrained too: give the role no
    `weights`; a trained one works as well.

    Exhaustive by default. With `evaluations: N` at most N candidates are scored, by evolution: `population` of them are
    drawn, then again and again one of the best half is changed to a candidate that differs from it in one parameter (in
    any, where there is none) and the worst is dropped.

    teacher: the feature of the teacher, such as teacher:layer3. feature: the module path of it in the candidates.
    candidates: a mapping of names to models. score: see above. batch: how many samples (from the first on).
    max_parameters: larger candidates do not count. draws: how many initial weights the score is averaged over.
    """

    def __init__(
        self,
        candidates: dict,  # type: ignore[type-arg]
        feature: str,
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
        self.feature, self.score, self.batch, self.max_parameters = feature, score, batch, max_parameters
        self.evaluations, self.population, self.draws = evaluations, population, draws

    def check(self, facts: Facts) -> None:
        if len(facts.shapes.get("teacher", (1, 1))) < 2:
            raise ValueError("compares feature maps, but the teacher's operand is one vector per sample")
        sizes = {name: self._size(name, facts) for name in self.candidates}
        if self.max_parameters is not None and min(sizes.values()) > self.max_parameters:
            least = min(sizes, key=lambda name: sizes[name])
            raise ValueError(
                f"allows {self.max_parameters:,} parameters, but the smallest candidate, {least!r}, has "
                f"{sizes[least]:,}"
            )

    def _build(self, name: str, facts: Facts) -> nn.Module:
        params = dict(self.candidates[name])
        return MODELS.build(params.pop("type"), params, f"candidate {name!r}", **facts.injected)

    def _size(self, name: str, facts: Facts) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self._build(name, facts).parameters())

    def __call__(self, pool: Pool) -> dict[str, Any]:
        images = pool.gathered("image")["image"][: self.batch].to(pool.device)
        operand = pool.operands["teacher"]
        teacher = similarities(pool.modules[operand.role], operand.path, images)
        sizes = {name: self._size(name, pool.facts) for name in self.candidates}
        names = [n for n in self.candidates if self.max_parameters is None or sizes[n] <= self.max_parameters]

        def scored(name: str) -> float:
            total = 0.0
            for draw in range(self.draws):
                with seeded(pool.seed, "init", name, draw):
                    model = self._build(name, pool.facts).to(pool.device).eval()
                total += self._score(teacher, similarities(model, self.feature, images))
            return total / self.draws

        scores = self._evolve(names, scored, pool.seed) if self.evaluations else {n: scored(n) for n in names}
        best = max(scores, key=lambda name: scores[name])
        params = dict(self.candidates[best])
        told = {"chosen": best, "score": self.score, "scores": scores, "parameters": sizes[best]}
        return {"type": params.pop("type"), "params": params, "told": told}

    def _score(self, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> float:
        """Minus the distance of the similarity matrices, semantic first."""
        if teacher[0].shape != student[0].shape:
            raise ConfigError(
                f"search: the teacher has {len(teacher[0])} classes and a candidate {len(student[0])}; they must agree"
            )
        semantic, relation = (-float(torch.linalg.vector_norm(t - s)) for t, s in zip(teacher, student, strict=True))
        return {"semantic": semantic, "relation": relation, "diswot": semantic + relation}[self.score]

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
            near = [n for n in fresh if _differences(self.candidates[n], self.candidates[parent]) == 1]
            child = pick(near or fresh)
            scores[child] = scored(child)
            living = sorted([*living, child], key=lambda name: -scores[name])[: self.population]
        return scores


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(one.get(key) != other.get(key) for key in {**one, **other})


def similarities(model: nn.Module, path: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """The row-normalised similarity of a network's class-activation maps, and that of the batch's samples.

    Args:
        path: the module whose output are the feature maps (batch, channels, ...).

    Returns:
        (classes, classes) and (batch, batch).
    """
    kept: list[Tensor] = []
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ConfigError(f"search: {type(model).__name__} has no module {path!r}") from None
    handle = module.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        with torch.enable_grad():
            output = model(images.detach().requires_grad_())
            logits: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
            maps = kept[0]
            gradients = [
                torch.autograd.grad(logits[:, c].sum(), maps, retain_graph=True)[0] for c in range(logits.shape[1])
            ]
    finally:
        handle.remove()
    values = maps.detach().flatten(2).double()  # (batch, channels, positions)
    shares = torch.stack([gradient.flatten(2).double().mean(-1) for gradient in gradients], 1)
    cams = torch.einsum("bnc,bcp->nbp", shares, values).flatten(1)
    flat = values.flatten(1)
    return F.normalize(cams @ cams.T, dim=-1), F.normalize(flat @ flat.T, dim=-1)
