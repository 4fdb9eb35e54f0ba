"""Choices among the samples of a split: what to label next, and what to remember of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS, SELECTORS


@ARTIFACTS.register("choose", produces="subset", selector="by", injected=("by",))
class BudgetedSubset(ArtifactBuilder):
    """Adds the samples that a selector finds most useful, never more than a budget in all.

    What is chosen is what was chosen before (in earlier rounds, and the samples whose label the source keeps) and up to
    `count` more, as long as the budget lasts. So a later `label_fraction: {artifact: STAGE.NAME, initial: N}` labels at most
    `budget` samples.

    by: a part of `kdbench list selectors` with its operands, {type: entropy, student: student}. budget: how many
    samples may be chosen in all. count: how many in this round; without it, as many as the budget leaves.
    """

    def __init__(self, by: dict, budget: int, count: int | None = None) -> None:  # type: ignore[type-arg]
        if budget < 1 or (count is not None and count < 1):
            raise ConfigError(f"choose: budget and count must be 1 or more, got budget {budget} and count {count}")
        if count is not None and count > budget:
            raise ConfigError(f"choose: count ({count}) is more than the budget ({budget})")
        self.by, self.budget, self.count = by, budget, count

    def check(self, facts: ArtifactContext) -> None:
        if facts.samples is not None and self.budget > facts.samples:
            raise ValueError(f"has a budget of {self.budget}, but its source has only {facts.samples} samples")
        if facts.labelled_samples is not None and facts.labelled_samples > self.budget:
            raise ValueError(f"has a budget of {self.budget}, but its source begins with {facts.labelled_samples} labels")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        entry = SELECTORS.entry(self.by["type"])
        read = [name for name in entry.inputs if name not in ("count", "excluded", "seed")]
        found = pool.gather(*read, "index", "labelled")
        index = found["index"]
        taken = found.get("labelled", torch.zeros(len(index), dtype=torch.bool))
        if pool.previous is not None:
            taken = taken | torch.isin(index, pool.previous["index"])
        outside = torch.zeros(0, dtype=torch.int64)  # chosen before among samples that this source does not give
        if pool.previous is not None:
            earlier = pool.previous["index"]
            outside = earlier[~torch.isin(earlier, index)]
        before = int(taken.sum()) + len(outside)
        if before > self.budget:
            raise ConfigError(
                f"choose: the source has {before} labels to begin with, more than the budget of {self.budget}"
            )
        wanted = self.budget - before if self.count is None else min(self.count, self.budget - before)
        wanted = min(wanted, int((~taken).sum()))
        chosen = taken.clone()
        if wanted:
            selector = SELECTORS.build(self.by["type"], {k: v for k, v in self.by.items() if k != "type"})
            given: dict[str, Any] = {name: found[name] for name in read}
            if "seed" in entry.inputs:
                given["seed"] = pool.seed
            chosen[selector(wanted, taken, **given)] = True
        found_now = torch.cat([outside, index[chosen]]).sort().values
        return {"index": found_now, "summary": {"chosen": len(found_now), "new": wanted, "budget": self.budget}}


def _check_memory(name: str, memory: int) -> int:
    if memory < 1:
        raise ConfigError(f"{name}: memory must be 1 or more, got {memory}")
    return memory


@ARTIFACTS.register("reservoir", produces="subset")
class Reservoir(ArtifactBuilder):
    """A replay memory: a uniform sample of everything that the stream has shown so far.

    Vitter, Random Sampling with a Reservoir, 1985; the memory of experience replay (Chaudhry et al. 2019,
    arXiv:1902.10486). Every sample draws a number in [0, 1) in the stage in which it is first seen; the memory holds
    the smallest. That is the same law as Vitter's algorithm R, for samples that come in stages.

    memory: how many samples are remembered at most, over all rounds.
    """

    def __init__(self, memory: int) -> None:
        self.memory = _check_memory("reservoir", memory)

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        seen = pool.gather("index")["index"]
        keys = torch.rand(len(seen), generator=torch.Generator().manual_seed(pool.seed), dtype=torch.float64)
        before, known = 0, torch.zeros(0, dtype=torch.int64)
        if pool.previous is not None:
            known, before = pool.previous["seen"], len(pool.previous["index"])
            new = ~torch.isin(seen, known)  # what was shown before has had its chance
            seen, keys = seen[new], keys[new]
            known = torch.cat([known, seen])
            seen, keys = torch.cat([pool.previous["index"], seen]), torch.cat([pool.previous["keys"], keys])
        else:
            known = seen
        kept = keys.sort(stable=True).indices[: self.memory]
        kept = kept[seen[kept].sort(stable=True).indices]
        told = {"remembered": len(kept), "of": len(known), "memory": self.memory, "before": before}
        return {"index": seen[kept], "keys": keys[kept], "seen": known.sort().values, "summary": told}


@ARTIFACTS.register("exemplars", produces="subset", operands=("features",), labels=True)
class Exemplars(ArtifactBuilder):
    """A replay memory of the samples whose mean feature stays nearest to their class's mean: iCaRL's herding.

    p_k = argmin_x || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||, with features phi of unit length and mu their mean over
    the class. Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725, algorithms 4 and 5: each of the C classes seen so far
    gets floor(memory / C) exemplars; classes of earlier rounds keep the first of theirs, in the order in which they
    were chosen. Samples of a known class that come later do not compete with its exemplars.

    features: (samples, ...) of the network as the stage left it. memory: how many samples are remembered at most.
    """

    def __init__(self, memory: int) -> None:
        self.memory = _check_memory("exemplars", memory)

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        found = pool.gather("features", "label", "index")
        features = torch.nn.functional.normalize(found["features"].flatten(1).double(), dim=-1)
        before: Mapping[str, Tensor] = pool.previous or {}
        old = before["label"].unique().tolist() if before else []
        new = [c for c in found["label"].unique().tolist() if c >= 0 and c not in old]
        each = self.memory // max(len(old) + len(new), 1)
        if each == 0:
            raise ConfigError(f"exemplars: a memory of {self.memory} is too small for {len(old) + len(new)} classes")
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if before:
            kept = before["rank"] < each
            parts.append((before["index"][kept], before["label"][kept], before["rank"][kept]))
        for own in new:
            rows = (found["label"] == own).nonzero().flatten()
            order = rows[herding_order(features[rows], min(each, len(rows)))]
            parts.append((found["index"][order], torch.full_like(order, own), torch.arange(len(order))))
        if not parts:
            raise ConfigError("exemplars: the source has no sample with a label")
        index, label, rank = (torch.cat(values) for values in zip(*parts, strict=True))
        order = index.sort(stable=True).indices
        told = {"remembered": len(index), "memory": self.memory, "classes": len(old) + len(new)}
        return {"index": index[order], "label": label[order], "rank": rank[order], "summary": told}


def herding_order(features: Tensor, count: int) -> Tensor:
    """Orders rows so that the mean of the first k is near the mean of all, for every k.

    Args:
        features: (rows, dimensions).

    Returns:
        int64 (count,), the first of them.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.zeros(len(features), dtype=features.dtype)
    order = []
    for k in range(1, count + 1):
        row = int((torch.linalg.vector_norm(mean - (features + total) / k, dim=-1) + free).argmin())
        free[row] = torch.inf
        total = total + features[row]
        order.append(row)
    return torch.tensor(order, dtype=torch.int64)
