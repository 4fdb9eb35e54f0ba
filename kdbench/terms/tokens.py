"""Terms on tokens: how they relate to each other within a sample."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Term
from kdbench.terms.distances import mean_over_tokens, scaled_to_length
from kdbench.terms.numerics import at_least_float32, full_precision, ratio, safe_sqrt

Part = Literal["whole", "query", "key", "value"]


def as_tokens(features: Tensor) -> Tensor:
    """Tokens (batch, length, width), at least float32; the places of a map (batch, width, h, w) are tokens, too."""
    features = at_least_float32(features)
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def token_relation_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean over tokens of 1 - cosine of the rows of the two similarity matrices: (batch,). See `TokenRelation`."""
    with full_precision(student):
        ours, theirs = _similarities(student, tokens), _similarities(teacher, tokens)
        return mean_over_tokens(1 - (ours * theirs).sum(2), tokens)


def _similarities(features: Tensor, tokens: Tensor | None) -> Tensor:
    """Cosines of all pairs of tokens (batch, length, length), each row scaled to length 1 over the counted tokens."""
    directions = scaled_to_length(as_tokens(features))
    cosines = directions @ directions.transpose(1, 2)
    if tokens is not None:
        cosines = torch.where(tokens.to(torch.bool).unsqueeze(1), cosines, 0)
    return ratio(cosines, safe_sqrt(cosines.square().sum(2, keepdim=True)))


def attention_relation_loss(student: Tensor, teacher: Tensor, heads: int = 1, part: Part = "whole") -> Tensor:
    """KL(teacher || student) of how each token attends to all, over heads and tokens: (batch,).

    See `AttentionRelation` for the arguments.
    """
    with full_precision(student):
        log_p, log_q = _log_relations(student, heads, part), _log_relations(teacher, heads, part)
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean((1, 2))


def _log_relations(features: Tensor, heads: int, part: Part) -> Tensor:
    """Log-softmax of the scaled inner products of all pairs of tokens, per relation head: (batch, heads, l, l)."""
    vectors = at_least_float32(features)
    if part != "whole":
        vectors = vectors.chunk(3, dim=2)[("query", "key", "value").index(part)]
    split = vectors.unflatten(2, (heads, -1)).transpose(1, 2)
    return F.log_softmax(split @ split.transpose(2, 3) / math.sqrt(split.shape[-1]), dim=-1)


@TERMS.register(
    "token_relation", space="sample", version=1, features=True, operands=("tokens",), paper="arXiv:2504.00037"
)
class TokenRelation(Term):
    """Token relations: tokens of one image that are alike for the teacher are alike for the student.

    loss = 1/L * sum_i (1 - <A_s[i] / |A_s[i]|, A_t[i] / |A_t[i]|>), A[i, j] the cosine of tokens i and j: activation
    matching of ViT-Linearizer, one edge per pair of stages (4 there, averaged: give the term the weight 1/4). Needs no
    projector; widths may differ. `tokens` (a mask, batch x length) says which tokens count: those that the student saw,
    since relations of hidden tokens would tell it what it is to predict (section 3.3). No code was published: this
    follows the text as its summaries give it.

    Wei and Chellappa, ViT-Linearizer: Distilling Quadratic Knowledge into Linear-Time Vision Models, ICCV 2025,
    arXiv:2504.00037.
    Shapes: student, teacher (batch, length, width) or (batch, width, height, width'), of equal length; tokens
    (batch, length), bool or 0/1 -> (batch,), without unit, in [0, 2].
    """

    def check_shapes(self, **shapes: Size) -> None:
        _equal_lengths(shapes)
        marks, length = shapes.get("tokens"), _length_of(shapes["student"])
        if marks is not None and tuple(marks[1:]) != (length,):
            raise ValueError(
                f"needs one mark for each of {length} tokens, but `tokens` is {list(marks[1:])} per sample"
            )

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
        return token_relation_loss(student, teacher, tokens)


@TERMS.register("attention_relation", space="sample", version=1, features=True, paper="arXiv:2012.15828")
class AttentionRelation(Term):
    """MiniLM v2: each token attends to the others as the teacher's does, by queries, keys or values alone.

    loss = mean over relation heads and tokens of KL(R_t || R_s), R = softmax(V V^T / sqrt(d)) row by row, V one part of
    the attention (queries, keys or values) split anew into `heads` parts of d elements, so that student and teacher may
    differ in width and in heads; one term per part, of weight 1 each in the paper. `part` takes the first, second or
    last third of an operand that holds all three, as the output of a `qkv` layer does; `whole` takes it as it is.
    Hybrid Distill (ICLR 2024, arXiv:2306.15876) takes such relations from a masked-image teacher.

    Wang, Bao, Huang, Dong and Wei, MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers, Findings of ACL 2021, arXiv:2012.15828.
    Shapes: student, teacher (batch, length, width), of equal length, widths divisible by `heads` (by 3 * heads where
    `part` is not whole) -> (batch,), nats.
    """

    def __init__(self, heads: int = 1, part: Literal["whole", "query", "key", "value"] = "whole") -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"attention_relation: heads must be at least 1, got {heads}")
        self.heads = heads
        self.part: Part = part

    def check_shapes(self, **shapes: Size) -> None:
        _equal_lengths(shapes, maps=False)
        divisor = self.heads * (1 if self.part == "whole" else 3)
        for role in ("student", "teacher"):
            if shapes[role][2] % divisor:
                raise ValueError(
                    f"splits each token into {divisor} equal parts ({self.heads} heads, part {self.part}), but the "
                    f"{role}'s have {shapes[role][2]} elements"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_relation_loss(student, teacher, self.heads, self.part)


def _length_of(shape: Size) -> int:
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _equal_lengths(shapes: dict[str, Size], *, maps: bool = True) -> None:
    for role in ("student", "teacher"):
        if len(shapes[role]) not in ((3, 4) if maps else (3,)):
            raise ValueError(
                f"reads tokens [length, width]{' or maps [width, h, w]' if maps else ''}, but the {role}'s operand is "
                f"{list(shapes[role][1:])} per sample"
            )
    if _length_of(shapes["student"]) != _length_of(shapes["teacher"]):
        raise ValueError(
            f"compares tokens one by one, but the student has {_length_of(shapes['student'])} "
            f"and the teacher {_length_of(shapes['teacher'])}"
        )
