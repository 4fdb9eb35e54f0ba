"""Selectors of rows: by a score of each row, or by coverage of the whole source."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.artifacts.base import Selector, top_rows
from kdbench.registry import SELECTORS

CENTER_BLOCK = 1024
"""Number of centers per block of distances; bounds the memory of `k_center`."""


@SELECTORS.register("random")
class RandomSelector(Selector):
    """Uniformly random rows: the baseline of all selectors.

    In a training step the rows depend on the random state of the step. In an artifact builder they depend only on the
    recipe's seed and the names of the stage and the artifact.

    Example (recipe):
        artifacts: {labels: {type: choose, by: random, budget: 100}}
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, index: Tensor, seed: int | None = None
    ) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return top_rows(torch.rand(index.shape, generator=generator).to(index.device), count, excluded)


@SELECTORS.register("entropy", operands=("student",))
class EntropySelector(Selector):
    """Rows with the highest entropy of the student's softmax, that is, the least certain rows.

    Operands:
        student: logits (rows, classes).

    Example (recipe):
        artifacts: {labels: {type: choose, by: {type: entropy, student: student}, budget: 100}}
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor
    ) -> Tensor:
        return top_rows(torch.special.entr(student.float().softmax(-1)).sum(-1), count, excluded)


@SELECTORS.register("margin", operands=("student",))
class MarginSelector(Selector):
    """Rows with the smallest difference between the student's two largest probabilities.

    Operands:
        student: logits (rows, classes).

    Example (recipe):
        artifacts: {labels: {type: choose, by: {type: margin, student: student}, budget: 100}}
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor
    ) -> Tensor:
        largest = student.float().softmax(-1).topk(2, -1).values
        return top_rows(largest[:, 1] - largest[:, 0], count, excluded)


@SELECTORS.register("confidence", operands=("student",))
class ConfidenceSelector(Selector):
    """Rows with the highest maximum probability, that is, the most certain rows.

    Operands:
        student: logits (rows, classes) of any role.

    Args:
        least: whether to select the rows with the lowest maximum probability instead.

    Example (recipe):
        artifacts: {labels: {type: choose, by: {type: confidence, student: student}, budget: 100}}
    """

    def __init__(self, least: bool = False) -> None:
        super().__init__()
        self.least = least

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor
    ) -> Tensor:
        confidence = student.float().softmax(-1).amax(-1)
        return top_rows(-confidence if self.least else confidence, count, excluded)


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label.clamp(min=0), reduction="none")


def _unlabelled_last(scores: Tensor, label: Tensor) -> Tensor:
    """Lowers the score of rows without a label, so that they rank after labelled rows and before excluded rows."""
    return torch.where(label < 0, torch.finfo(scores.dtype).min, scores)


@SELECTORS.register("low_loss", operands=("student",))
class LowLossSelector(Selector):
    """Rows with the smallest cross-entropy, whose labels are probably correct (co-teaching).

    Han et al., Co-teaching, NeurIPS 2018, arXiv:1804.06872. Rows without a label rank last.

    Operands:
        student: logits (rows, classes) of the network that selects.

    Example (recipe):
        updates: [{models: [student], terms: [ce], select: {type: low_loss, keep: 0.8, student: student}}]
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor, label: Tensor
    ) -> Tensor:
        return top_rows(_unlabelled_last(-_cross_entropy(student, label), label), count, excluded)


@SELECTORS.register("learnability", operands=("student", "reference"))
class LearnabilitySelector(Selector):
    """Rows with the largest CE(student) - CE(reference): rows that only the reference predicts well.

    Udandarao et al., Active Data Curation Effectively Distills Large-Scale Multimodal Models (ACID), CVPR 2025,
    arXiv:2411.18674, applied to labels instead of image-text pairs. The score of a row does not depend on other rows,
    while the paper's contrastive losses score a batch jointly. Rows without a label rank last.

    Operands:
        student: logits (rows, classes).
        reference: logits (rows, classes).

    Example (recipe):
        updates:
          - {models: [student], terms: [ce],
             select: {type: learnability, keep: 0.25, student: student, reference: teacher}}
    """

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor, reference: Tensor, label: Tensor
    ) -> Tensor:
        score = _cross_entropy(student, label) - _cross_entropy(reference, label)
        return top_rows(_unlabelled_last(score, label), count, excluded)


@SELECTORS.register("k_center", operands=("student",))
class KCenterSelector(Selector):
    r"""Greedy k-center: repeatedly selects the row with the largest distance to its nearest center.

    .. math:: x^* = \arg\max_x \min_{c \in C} d(x, c)

    where the centers C are the excluded and the already selected rows. Sener and Savarese, Active Learning for
    Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, arXiv:1708.00489. With `space: probabilities` this
    selector is PCoreSet (arXiv:2506.00910), which uses the Euclidean distance between softmaxes, as strategies.py of
    its released code does. That code averages the softmax over two heads; a recipe reaches the same with an operand
    that averages the two softmaxes, and `space: raw`.

    Without excluded rows the first center is the row farthest from the mean of all rows. In the papers it is random.

    Operands:
        student: points (rows, ...).

    Args:
        space: what is compared: the operand (`raw`), its softmax (`probabilities`), or the operand scaled to unit
            length (`directions`).

    Example (recipe):
        artifacts: {labels: {type: choose, by: {type: k_center, space: probabilities, student: student}, budget: 100}}
    """

    def __init__(self, space: Literal["raw", "probabilities", "directions"] = "raw") -> None:
        super().__init__()
        self.space = space

    def forward(  # type: ignore[override]
        self, count: int, excluded: Tensor | None = None, *, student: Tensor
    ) -> Tensor:
        points = student.flatten(1).float()
        if self.space == "probabilities":
            points = points.softmax(-1)
        elif self.space == "directions":
            points = F.normalize(points, dim=-1)
        # Distance of each row to its nearest center; to the mean of all rows while there is no center.
        distances = torch.linalg.vector_norm(points - points.mean(0), dim=-1)
        selected = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        has_center = torch.zeros((), dtype=torch.bool, device=points.device)
        if excluded is not None:
            selected, has_center = excluded.clone(), excluded.any()
            distances = torch.where(has_center, _distances_to_centers(points, excluded), distances)
        rows = []
        for _ in range(count):
            # Everything stays on the device: `has_center` is a tensor, so that no step waits for a value.
            row = torch.where(selected, -torch.inf, distances).argmax()
            rows.append(row)
            selected = selected.index_fill(0, row, True)
            to_row = torch.linalg.vector_norm(points - points.index_select(0, row.reshape(1)), dim=-1)
            distances = torch.where(has_center, distances.minimum(to_row), to_row)
            has_center = torch.ones_like(has_center)
        return torch.stack(rows).sort().values


def _distances_to_centers(points: Tensor, is_center: Tensor) -> Tensor:
    """Computes the distance of each point (rows, values) to its nearest center. Returns (rows,).

    The distance is infinite if there are no centers.
    """
    nearest = torch.full_like(points[:, 0], torch.inf)
    for block, center_block in zip(points.split(CENTER_BLOCK), is_center.split(CENTER_BLOCK), strict=True):
        # The matrix-multiplication form of cdist would lose precision between close points.
        block_distances = torch.cdist(points, block, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = nearest.minimum(torch.where(center_block, block_distances, torch.inf).amin(-1))
    return nearest
