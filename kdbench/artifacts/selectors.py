"""Which samples are worth it: scores of one sample at a time, and coverage of the whole pool."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.artifacts.base import Selector, top_rows
from kdbench.registry import SELECTORS

CENTRE_BLOCK = 1024
"""How many chosen rows distances are computed to at once."""


@SELECTORS.register("random")
class RandomSelector(Selector):
    """Rows drawn uniformly: what every other selector is compared with.

    In a step the draw is the step's; over a pool it is a function of the recipe's seed, the stage and the maker.
    """

    def forward(self, count: int, excluded: Tensor | None = None, *, index: Tensor, seed: int | None = None) -> Tensor:  # type: ignore[override]
        drawn = None if seed is None else torch.Generator().manual_seed(seed)
        return top_rows(torch.rand(index.shape, generator=drawn).to(index.device), count, excluded)


@SELECTORS.register("entropy", operands=("student",))
class EntropySelector(Selector):
    """The rows of which the student is least certain: largest entropy of its softmax.

    student: logits (rows, classes).
    """

    def forward(self, count: int, excluded: Tensor | None = None, *, student: Tensor) -> Tensor:  # type: ignore[override]
        return top_rows(torch.special.entr(student.float().softmax(-1)).sum(-1), count, excluded)


@SELECTORS.register("margin", operands=("student",))
class MarginSelector(Selector):
    """The rows near a border: smallest distance between the student's two largest probabilities.

    student: logits (rows, classes).
    """

    def forward(self, count: int, excluded: Tensor | None = None, *, student: Tensor) -> Tensor:  # type: ignore[override]
        best = student.float().softmax(-1).topk(2, -1).values
        return top_rows(best[:, 1] - best[:, 0], count, excluded)


@SELECTORS.register("confidence", operands=("student",))
class ConfidenceSelector(Selector):
    """The rows of which a network is most certain: largest probability (`least: true`: smallest).

    student: logits (rows, classes), of whichever role is asked.
    """

    def __init__(self, least: bool = False) -> None:
        super().__init__()
        self.least = least

    def forward(self, count: int, excluded: Tensor | None = None, *, student: Tensor) -> Tensor:  # type: ignore[override]
        best = student.float().softmax(-1).amax(-1)
        return top_rows(-best if self.least else best, count, excluded)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label.clamp(min=0), reduction="none")


def _unlabelled_last(scores: Tensor, label: Tensor) -> Tensor:
    """Puts rows without a label behind all others that are free."""
    return torch.where(label < 0, torch.finfo(scores.dtype).min, scores)


@SELECTORS.register("low_loss", operands=("student",))
class LowLossSelector(Selector):
    """The rows that look rightly labelled: smallest cross-entropy, as co-teaching keeps them.

    Han et al., Co-teaching, NeurIPS 2018, arXiv:1804.06872. student: logits (rows, classes), of the peer that chooses.
    Rows without a label come last.
    """

    def forward(self, count: int, excluded: Tensor | None = None, *, student: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return top_rows(_unlabelled_last(-_cross_entropy(student, label), label), count, excluded)


@SELECTORS.register("learnability", operands=("student", "reference"))
class LearnabilitySelector(Selector):
    """What the student can still learn from a reference that knows it: CE(student) - CE(reference), the largest.

    Udandarao et al., Active Data Curation Effectively Distills Large-Scale Multimodal Models (ACID), CVPR 2025,
    arXiv:2411.18674, for labels instead of pairs of image and text: the score of a row depends on no other row here,
    while the paper's contrastive losses score a batch jointly. student, reference: logits (rows, classes). Rows without
    a label come last.
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor, reference: Tensor, label: Tensor
    ) -> Tensor:
        return top_rows(_unlabelled_last(_cross_entropy(student, label) - _cross_entropy(reference, label), label), count, excluded)


@SELECTORS.register("k_center", operands=("student",))
class KCenterSelector(Selector):
    """Greedy coverage: again and again the row that is farthest from all that are chosen or taken.

    x* = argmax_x min_{c chosen} d(x, c). Sener and Savarese, Active Learning for Convolutional Neural Networks: A
    Core-Set Approach, ICLR 2018, arXiv:1708.00489. With `space: probabilities` it is PCoreSet (arXiv:2506.00910), which
    measures in the space of predictions, as its released code does (strategies.py: Euclidean distance of softmaxes; its
    mean over two heads is a combined operand with `space: raw`).

    Where nothing is taken yet, the first row is the one farthest from the mean of all; the papers draw it.

    student: what distances are measured in, (rows, ...). space: `raw` takes it as it is, `probabilities` its softmax,
    `directions` its direction (unit length).
    """

    def __init__(self, space: Literal["raw", "probabilities", "directions"] = "raw") -> None:
        super().__init__()
        self.space = space

    def forward(self, count: int, excluded: Tensor | None = None, *, student: Tensor) -> Tensor:  # type: ignore[override]
        points = student.flatten(1).float()
        if self.space == "probabilities":
            points = points.softmax(-1)
        elif self.space == "directions":
            points = F.normalize(points, dim=-1)
        nearest = torch.linalg.vector_norm(points - points.mean(0), dim=-1)
        chosen = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        if excluded is not None:
            chosen = excluded.clone()
            covered = torch.full_like(nearest, torch.inf)
            for own, kept in zip(points.split(CENTRE_BLOCK), excluded.split(CENTRE_BLOCK), strict=True):
                apart = torch.cdist(points, own, compute_mode="donot_use_mm_for_euclid_dist")
                covered = covered.minimum(torch.where(kept, apart, torch.inf).amin(-1))
            nearest = torch.where(excluded.any(), covered, nearest)
        started = excluded.any() if excluded is not None else torch.zeros((), dtype=torch.bool, device=points.device)
        found = []
        for _ in range(count):
            row = torch.where(chosen, -torch.inf, nearest).argmax()
            found.append(row)
            chosen = chosen.index_fill(0, row, True)
            apart = torch.linalg.vector_norm(points - points.index_select(0, row.reshape(1)), dim=-1)
            nearest = torch.where(started, nearest.minimum(apart), apart)
            started = torch.ones_like(started)
        return torch.stack(found).sort().values
