"""Artifact builders for subsets: samples to label next (active learning), and replay memories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS, SELECTORS


@ARTIFACTS.register("choose", produces="subset", selector="by", injected=("by",))
class BudgetedSubset(ArtifactBuilder):
    """Samples that a selector selects in successive rounds, up to a total budget (active learning).

    The subset contains the samples selected in earlier rounds, the samples with a visible label, and up to `count`
    new samples as long as the budget is not used up. A later `label_fraction: {artifact: STAGE.NAME, initial: N}`
    therefore labels at most `budget` samples.

    Args:
        by: selector with its operands, such as {type: entropy, student: student}. `kdbench list selectors` lists all.
        budget: maximum number of selected samples over all rounds.
        count: number of new samples per round; null: the whole remaining budget.

    Example (recipe):
        artifacts: {labels: {type: choose, by: {type: entropy, student: student}, budget: 100, count: 20}}
    """

    def __init__(self, by: dict, budget: int, count: int | None = None) -> None:  # type: ignore[type-arg]
        if budget < 1 or (count is not None and count < 1):
            raise ConfigError(f"choose: budget and count must be at least 1, got budget {budget} and count {count}")
        if count is not None and count > budget:
            raise ConfigError(f"choose: count ({count}) must not be above the budget ({budget})")
        self.by, self.budget, self.count = by, budget, count

    def check(self, context: ArtifactContext) -> None:
        if context.samples is not None and self.budget > context.samples:
            raise ValueError(f"has a budget of {self.budget}, but its source has only {context.samples} samples")
        if context.labelled_samples is not None and context.labelled_samples > self.budget:
            raise ValueError(
                f"has a budget of {self.budget}, but its source already has {context.labelled_samples} labels"
            )

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        entry = SELECTORS.entry(self.by["type"])
        input_names = [name for name in entry.inputs if name not in ("count", "excluded", "seed")]
        values = outputs.gather(*input_names, "index", "labelled")
        index = values["index"]
        selected = values.get("labelled", torch.zeros(len(index), dtype=torch.bool))
        # Earlier rounds may have read another part of the split; their samples stay and count against the budget.
        outside = torch.zeros(0, dtype=torch.int64)
        if outputs.previous is not None:
            earlier = outputs.previous["index"]
            selected = selected | torch.isin(index, earlier)
            outside = earlier[~torch.isin(earlier, index)]
        used = int(selected.sum()) + len(outside)
        if used > self.budget:
            raise ConfigError(f"choose: the source already has {used} labels, more than the budget of {self.budget}")
        count = self.budget - used if self.count is None else min(self.count, self.budget - used)
        count = min(count, int((~selected).sum()))
        if count:
            selector = SELECTORS.build(self.by["type"], {k: v for k, v in self.by.items() if k != "type"})
            inputs: dict[str, Any] = {name: values[name] for name in input_names}
            if "seed" in entry.inputs:
                inputs["seed"] = outputs.seed
            rows = selector(count, selected, **inputs)
            selected = selected.index_fill(0, rows, True)
        subset = torch.cat([outside, index[selected]]).sort().values
        return {"index": subset, "summary": {"selected": len(subset), "new": count, "budget": self.budget}}


def _check_memory(name: str, memory: int) -> int:
    """Returns the given memory size if it is valid.

    Raises:
        ConfigError: the size is below 1.
    """
    if memory < 1:
        raise ConfigError(f"{name}: memory must be at least 1, got {memory}")
    return memory


@ARTIFACTS.register("reservoir", produces="subset")
class Reservoir(ArtifactBuilder):
    """Replay memory with a uniform random sample of the stream.

    Vitter, Random Sampling with a Reservoir, 1985; the memory of experience replay (Chaudhry et al. 2019,
    arXiv:1902.10486). Each sample draws a random key from [0, 1) in the stage in which it first occurs. The memory
    contains the samples with the smallest keys. Its distribution is that of Vitter's algorithm R.

    The artifact also contains `keys`, the keys of the stored samples, and `stream`, the positions of all samples so
    far.

    Args:
        memory: maximum number of stored samples over all rounds.

    Example (recipe):
        artifacts: {memory: {type: reservoir, memory: 60}}
    """

    def __init__(self, memory: int) -> None:
        self.memory = _check_memory("reservoir", memory)

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        index = outputs.gather("index")["index"]
        keys = torch.rand(len(index), generator=torch.Generator().manual_seed(outputs.seed), dtype=torch.float64)
        stream, stored_before = index, 0
        if outputs.previous is not None:
            stored_before = len(outputs.previous["index"])
            # A sample draws one key only: samples of earlier rounds keep theirs or stay out.
            is_new = ~torch.isin(index, outputs.previous["stream"])
            stream = torch.cat([outputs.previous["stream"], index[is_new]])
            index = torch.cat([outputs.previous["index"], index[is_new]])
            keys = torch.cat([outputs.previous["keys"], keys[is_new]])
        rows = keys.sort(stable=True).indices[: self.memory]
        rows = rows[index[rows].sort(stable=True).indices]
        summary = {
            "stored": len(rows),
            "stream": len(stream),
            "memory": self.memory,
            "stored before": stored_before,
        }
        return {"index": index[rows], "keys": keys[rows], "stream": stream.sort().values, "summary": summary}


@ARTIFACTS.register("exemplars", produces="subset", operands=("features",), labels=True)
class Exemplars(ArtifactBuilder):
    r"""Replay memory by herding: stores samples whose mean feature is close to the class mean (iCaRL).

    .. math:: p_k = \arg\min_x \| \mu - \tfrac{1}{k} (\phi(x) + \sum_{j<k} \phi(p_j)) \|

    with features phi of unit length and their class mean mu. Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725,
    algorithms 4 and 5. Each of the C classes seen so far gets floor(memory / C) exemplars. A class of an earlier
    round keeps its first exemplars in herding order, and new samples of that class do not replace them.

    The artifact also contains `label` and `rank` (position in the herding order) of each exemplar.

    Operands:
        features: (samples, ...) of the network at the end of the stage.

    Args:
        memory: maximum number of stored samples over all rounds.

    Example (recipe):
        artifacts: {memory: {type: exemplars, features: "student:pool", memory: 60}}
    """

    def __init__(self, memory: int) -> None:
        self.memory = _check_memory("exemplars", memory)

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        values = outputs.gather("features", "label", "index")
        features = F.normalize(values["features"].flatten(1).double(), dim=-1)
        previous: Mapping[str, Tensor] = outputs.previous or {}
        old_classes = previous["label"].unique().tolist() if previous else []
        new_classes = [c for c in values["label"].unique().tolist() if c >= 0 and c not in old_classes]
        num_classes = len(old_classes) + len(new_classes)
        per_class = self.memory // max(num_classes, 1)
        if per_class == 0:
            raise ConfigError(f"exemplars: a memory of {self.memory} samples is too small for {num_classes} classes")
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if previous:
            keep = previous["rank"] < per_class
            parts.append((previous["index"][keep], previous["label"][keep], previous["rank"][keep]))
        for number in new_classes:
            rows = (values["label"] == number).nonzero().flatten()
            order = rows[herding_order(features[rows], min(per_class, len(rows)))]
            parts.append((values["index"][order], torch.full_like(order, number), torch.arange(len(order))))
        if not parts:
            raise ConfigError("exemplars: the source has no labelled sample")
        index, label, rank = (torch.cat(values) for values in zip(*parts, strict=True))
        order = index.sort(stable=True).indices
        summary = {"stored": len(index), "memory": self.memory, "classes": num_classes}
        return {"index": index[order], "label": label[order], "rank": rank[order], "summary": summary}


def herding_order(features: Tensor, count: int) -> Tensor:
    """Orders rows greedily: for every k, the mean of the first k rows is close to the mean of all rows.

    Args:
        features: (rows, dimensions).
        count: number of rows to return.

    Returns:
        int64 (count,), the first rows of the order.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    penalty = torch.zeros(len(features), dtype=features.dtype)  # infinite for selected rows
    order = []
    for k in range(1, count + 1):
        row = int((torch.linalg.vector_norm(mean - (features + total) / k, dim=-1) + penalty).argmin())
        penalty[row] = torch.inf
        total = total + features[row]
        order.append(row)
    return torch.tensor(order, dtype=torch.int64)
