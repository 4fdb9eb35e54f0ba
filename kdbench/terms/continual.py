"""Terms of class-incremental and online continual learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Number, Term, check_equal_classes, check_logits, check_parameters
from kdbench.terms.numerics import at_least_float32, autocast_disabled, flatten_and_mask, row_weights, safe_divide


@TERMS.register("icarl", space="row", version=1, paper="arXiv:1611.07725")
class ICaRL(Term):
    """iCaRL: binary cross-entropy per class, with the old network as target of old classes and the label otherwise.

    loss = sum_k BCE(sigmoid(student_k), t_k)

    t_k = sigmoid(teacher_k) for k in `old`. For other classes, t_k is 1 if k is the label and 0 otherwise. The sum
    over the classes
    follows the paper (algorithm 3). The authors' code has the mean.

    Args:
        old: numbers of the old classes. `[]` in the first task, where all targets come from labels.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64; rows with a hidden label (negative) have
            loss 0.
        Returns (batch,), nats.

    References:
        Rebuffi, Kolesnikov, Sperl and Lampert, iCaRL: Incremental Classifier and Representation Learning, CVPR 2017,
        arXiv:1611.07725.
    """

    old_index: Tensor

    def __init__(self, old: list[int]) -> None:
        super().__init__()
        if any(number < 0 for number in old) or len(set(old)) != len(old):
            raise ConfigError(f"icarl: old lists the numbers of the old classes, each once, got {old}")
        self.old = tuple(old)
        self.register_buffer("old_index", torch.tensor(self.old, dtype=torch.int64), persistent=False)

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])
        if self.old and max(self.old) >= shapes["student"][1]:
            raise ValueError(
                f"lists old class {max(self.old)}, but the {shapes['student'][1]} classes are numbered from 0"
            )

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        is_old = torch.zeros(student.shape[1], dtype=torch.bool, device=student.device)
        is_old = is_old.scatter(0, self.old_index, True)
        one_hot = torch.zeros_like(student).scatter(1, label.clamp(min=0).unsqueeze(1), 1)
        target = torch.where(is_old, teacher.sigmoid(), one_hot)
        return torch.where(label < 0, 0, (F.softplus(student) - target * student).sum(1))


@TERMS.register(
    "proxy_contrastive",
    space="batch",
    version=1,
    operands=("replayed", "replayed_label"),
    paper="arXiv:2304.04408",
)
class ProxyContrastive(Term):
    """PCR and HPCR: contrasts a sample's similarity to its class proxy with its similarities to other proxies.

    loss = mean_i -log(exp(z_i,y_i / T) / sum_j exp(z_i,y_j / T)), i and j over the rows of the batch

    A class that occurs twice in the batch counts twice in the sum, and a class that does not occur does not count.
    The
    logits z are similarities to the class proxies. In the authors' loss they are the cosines of a cosine classifier,
    divided by
    0.09. The model `cosine_head` divides by 0.09, so T is 1 for it. `replayed` and `replayed_label` are a second
    batch, such as
    samples of a memory; i and j are then rows of either batch. HPCR's second temperature multiplies this loss, which
    a recipe
    does with a schedule of the weight.

    Args:
        temperature: T > 0.

    Shape:
        student: logits (batch, classes), at least 2 classes. label: (batch,), int64.
        replayed: logits (rows, classes). replayed_label: (rows,), int64.
        Returns a scalar, nats. Hidden labels (negative) and masked rows are left out; a row of weight 2 counts twice.

    References:
        Lin, Zhang, Feng, Li and Ye, PCR: Proxy-based Contrastive Replay, CVPR 2023, arXiv:2304.04408, as in the
        authors' code; HPCR, arXiv:2309.15038.
    """

    def __init__(self, temperature: Number = 0.09) -> None:
        super().__init__()
        check_parameters("proxy_contrastive", "above 0", temperature=temperature)
        self.temperature = temperature

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)
        if ("replayed" in shapes) != ("replayed_label" in shapes):
            raise ValueError("reads `replayed` and `replayed_label` together: give both or neither")
        if "replayed" in shapes:
            check_equal_classes(shapes["student"], shapes["replayed"])

    def forward(
        self,
        student: Tensor,
        label: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        replayed: Tensor | None = None,
        replayed_label: Tensor | None = None,
    ) -> Tensor:
        labelled = label >= 0 if mask is None else mask & (label >= 0)
        scores = flatten_and_mask(student, labelled) / self.temperature
        weights = row_weights(scores, labelled, weight)
        if replayed is not None and replayed_label is not None:
            replayed_labelled = replayed_label >= 0
            replayed_scores = flatten_and_mask(replayed, replayed_labelled) / self.temperature
            scores, label = torch.cat([scores, replayed_scores]), torch.cat([label, replayed_label])
            weights = torch.cat([weights, row_weights(replayed_scores, replayed_labelled, None)])
        row_class = label.clamp(min=0).unsqueeze(1)
        # A finite minimum instead of -inf: without a valid row no class occurs at all.
        min_log = torch.finfo(scores.dtype).min / 2
        occurrences = class_occurrences(scores, row_class, weights)
        log_occurrences = torch.where(occurrences > 0, torch.where(occurrences > 0, occurrences, 1).log(), min_log)
        losses = torch.logsumexp(scores + log_occurrences, dim=1) - scores.gather(1, row_class).squeeze(1)
        return safe_divide((weights * torch.where(weights > 0, losses, 0)).sum(), weights.sum())


def class_occurrences(scores: Tensor, row_class: Tensor, weights: Tensor) -> Tensor:
    """Returns the sum of the weights of the rows of each class, (classes,).

    Args:
        scores: (batch, classes), of which only shape, dtype and device are used.
        row_class: class of each row (batch, 1), int64.
        weights: weights of the rows (batch,).
    """
    return (torch.zeros_like(scores).scatter(1, row_class, 1) * weights.unsqueeze(1)).sum(0)


@TERMS.register("proxy_distance", space="batch", version=1, operands=("new_label",), paper="arXiv:2309.15038")
class ProxyDistance(Term):
    """HPCR's proxy distillation (PCD): squared change of the similarities to the classes of the batch.

    loss = mean_i mean_j (z_i,y_j - t_i,y_j)^2

    z and t are the logits of student and teacher. i runs over the replayed samples, and j over their labels. With
    `new_label`, j also runs over the labels of the new samples of the step. A class that occurs twice counts twice,
    and a class that does not occur does not count. The authors' code uses weight 0.1.

    Shape:
        student, teacher: logits (batch, classes). label: (batch,), int64. new_label: (rows,), int64.
        Returns a scalar, squared logits. Hidden labels (negative) and masked rows are left out.

    References:
        Lin, Feng, Zhang, Li and Ye, HPCR: Holistic Proxy-based Contrastive Replay, IEEE TNNLS 2025, arXiv:2309.15038,
        as in the authors' code.
    """

    def check_shapes(self, **shapes: Size) -> None:
        check_equal_classes(shapes["student"], shapes["teacher"])

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        new_label: Tensor | None = None,
    ) -> Tensor:
        labelled = label >= 0 if mask is None else mask & (label >= 0)
        scores, target = flatten_and_mask(student, labelled), flatten_and_mask(teacher, labelled)
        weights = row_weights(scores, labelled, weight)
        occurrences = class_occurrences(scores, label.clamp(min=0).unsqueeze(1), weights)
        if new_label is not None:
            new_weights = (new_label >= 0).to(scores.dtype)
            zeros = scores.new_zeros(len(new_weights), scores.shape[1])
            occurrences = occurrences + class_occurrences(zeros, new_label.clamp(min=0).unsqueeze(1), new_weights)
        losses = safe_divide(((scores - target).square() * occurrences).sum(1), occurrences.sum())
        return safe_divide((weights * losses).sum(), weights.sum())


@TERMS.register("similarity_distribution", space="batch", version=1, features=True, paper="arXiv:2309.15038")
class SimilarityDistribution(Term):
    """HPCR's sample distillation (SCD): cross-entropy of the similarities of a sample to the rest of the batch.

    loss = mean_i -sum_{j != i} p_ij log q_ij, q_i = softmax over j != i of cos(s_i, s_j) / T

    s are the student's features. p_i is computed like q_i from the teacher's features. If p equals q, the loss is the
    entropy of p. The authors' code uses T = 0.09 and weight 0.5.

    Args:
        temperature: T > 0.

    Shape:
        student, teacher: (batch, ...). Each row is flattened.
        Returns a scalar, nats. It is 0 for fewer than two valid rows. A row of weight 2 counts twice in the mean and
        in the sum.

    References:
        Lin, Feng, Zhang, Li and Ye, HPCR: Holistic Proxy-based Contrastive Replay, IEEE TNNLS 2025, arXiv:2309.15038,
        as in the authors' code.
    """

    def __init__(self, temperature: Number = 0.09) -> None:
        super().__init__()
        check_parameters("similarity_distribution", "above 0", temperature=temperature)
        self.temperature = temperature

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        student = flatten_and_mask(student, mask)
        weights = row_weights(student, mask, weight)
        identity = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
        pair_weights = weights.unsqueeze(0) * (1 - identity)
        log_q, log_p = (self._log_softmax(rows, pair_weights) for rows in (student, flatten_and_mask(teacher, mask)))
        losses = -(torch.where(pair_weights > 0, log_p.exp() * log_q, 0)).sum(1)
        return safe_divide((weights * losses).sum(), weights.sum())

    def _log_softmax(self, rows: Tensor, pair_weights: Tensor) -> Tensor:
        """Computes the log-softmax of each row's cosines to all rows.

        Entry [i, j] has the weight `pair_weights[i, j]`.
        """
        with autocast_disabled(rows):
            directions = F.normalize(rows, dim=1, eps=1e-6)
            similarities = directions @ directions.t() / self.temperature
        min_log = torch.finfo(similarities.dtype).min / 2
        log_weights = torch.where(pair_weights > 0, torch.where(pair_weights > 0, pair_weights, 1).log(), min_log)
        return F.log_softmax(similarities + log_weights, dim=1)
