"""Tensors that a later stage's terms read as `made:STAGE.NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdbench.makers.base import Facts, Maker, Pool
from kdbench.registry import MAKERS


@MAKERS.register("class_means", makes="tensor", operands=("features",), labels=True)
class ClassMeans(Maker):
    """The mean of an operand over the samples of each class, [classes, ...].

    features: (samples, ...), such as a teacher's penultimate layer. KD++ takes its class means as the directions in
    which a student's features should grow (Wang et al., Improving Knowledge Distillation via Regularizing Feature
    Direction and Norm, ECCV 2024, arXiv:2305.17007). Samples without a label do not count; a class without samples has
    mean 0.
    """

    def __call__(self, pool: Pool) -> dict[str, Any]:
        classes = len(pool.facts.classes)
        sums: Tensor | None = None
        counts = torch.zeros(classes)
        for row in pool.rows():
            features, label = row["features"].double().cpu(), row["label"].cpu()
            known = label >= 0
            if sums is None:
                sums = torch.zeros(classes, *features.shape[1:], dtype=torch.float64)
            sums.index_add_(0, label[known], features[known])
            counts += torch.bincount(label[known], minlength=classes)
        assert sums is not None
        means = sums / counts.clamp(min=1).view(-1, *([1] * (sums.dim() - 1)))
        empty = [pool.facts.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        return {"value": means.float(), "told": {"samples": int(counts.sum()), "classes without samples": empty}}

    def shape(self, facts: Facts) -> tuple[int, ...]:
        return (len(facts.classes), *facts.shapes["features"])


@MAKERS.register("class_counts", makes="tensor", labels=True)
class ClassCounts(Maker):
    """How many samples of each class the source gives, [classes]: what long-tailed losses weigh classes by.

    Samples without a label do not count.
    """

    def __call__(self, pool: Pool) -> dict[str, Any]:
        label = pool.gathered("label")["label"]
        counts = torch.bincount(label[label >= 0], minlength=len(pool.facts.classes))
        return {"value": counts.float(), "told": {"samples": int(counts.sum()), "by class": counts.tolist()}}

    def shape(self, facts: Facts) -> tuple[int, ...]:
        return (len(facts.classes),)


@MAKERS.register("outputs", makes="tensor", operands=("value",))
class Outputs(Maker):
    """What a role says of every sample, [samples of the whole split, ...], addressed by the batch's `index`.

    value: (samples, ...), such as a teacher's logits, which then need no teacher any more. Rows of samples that the
    source does not give are 0.
    """

    def __call__(self, pool: Pool) -> dict[str, Any]:
        found = pool.gathered("value", "index")
        value = torch.zeros(pool.source.population, *found["value"].shape[1:], dtype=found["value"].dtype)
        value[found["index"]] = found["value"]
        return {"value": value, "told": {"samples": len(found["index"])}}

    def shape(self, facts: Facts) -> tuple[int, ...]:
        return (facts.population or 1, *facts.shapes["value"])
