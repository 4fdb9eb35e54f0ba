"""Subsets of a split: draws, classes, long tails, and disjoint shards for clients.

A subset depends on the run's seed and the split. So two sources of the same dataset with the same `subset` share one
draw, and its parts (`rest: true`, the numbers of `shard`) never overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.data.sampling.split import amount_to_count, balanced_indices, check_amount, exclude
from kdbench.errors import ConfigError, suggest
from kdbench.registry import SUBSETS

_MAX_DRAWS = 1000
"""Number of draws of `shard` with `scheme: dirichlet` before it gives up on clients without samples."""


class Subset:
    """Base of all subsets. A constructor parameter `names` receives the names of the dataset's classes.

    Example:
        @SUBSETS.register("balanced", version=1)
        class BalancedSubset(Subset): ...
    """

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Returns the selected part of `indices`, int64, sorted.

        Args:
            labels: int64 (samples,), the true labels of the full split.
            indices: int64 (candidates,), sorted.
            classes: number of classes.
            generator: at the start of its stream, which depends on the seed alone.

        Raises:
            ConfigError: there are not enough samples.
        """
        raise NotImplementedError

    def size(self, candidates: int) -> int | None:
        """Returns the number of samples selected from `candidates`; None where it depends on their labels."""
        return None


@SUBSETS.register("balanced", version=1)
class BalancedSubset(Subset):
    """Selects equally many samples of every class; `subset: 100` is short for it.

    A fraction takes the same fraction of every class, a number equally many of every class as far as a class has them.

    Args:
        amount: a fraction in (0, 1], or a number of at least 2.
        rest: true selects all other samples instead.
    """

    def __init__(self, amount: float, rest: bool = False) -> None:
        check_amount(amount, "amount")
        self.amount = amount
        self.rest = rest

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        draw = balanced_indices(labels, indices, self.amount, classes, generator, "amount")
        return exclude(indices, draw) if self.rest else draw

    def size(self, candidates: int) -> int | None:
        count = amount_to_count(candidates, self.amount)
        return max(candidates - count, 0) if self.rest else count


@SUBSETS.register("random", version=1, injected=("names",))
class RandomSubset(Subset):
    """Draws samples regardless of their classes; with `rest: true` selects all others (forget and retain sets).

    Two sources, one with `rest: true` and everything else equal, are disjoint and together the full split.

    Args:
        amount: a fraction in (0, 1], or a number of at least 2, of the samples that may be drawn.
        classes: classes to draw from, by number or name; null: all.
        rest: true selects all samples that are not drawn, of every class.
    """

    def __init__(
        self,
        amount: float,
        classes: list[int | str] | None = None,
        rest: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        check_amount(amount, "amount")
        self.amount = amount
        self.classes = None if classes is None else class_indices(classes, names)
        self.rest = rest

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        candidates = indices
        if self.classes is not None:
            candidates = indices[torch.isin(labels[indices], torch.tensor(self.classes))]
        if self.amount > len(candidates) and self.amount > 1:
            raise ConfigError(f"{self.amount} samples were asked for, but there are only {len(candidates)}")
        order = torch.randperm(len(candidates), generator=generator)
        draw = candidates[order[: amount_to_count(len(candidates), self.amount)]].sort().values
        return exclude(indices, draw) if self.rest else draw

    def size(self, candidates: int) -> int | None:
        if self.classes is not None:
            return None
        count = amount_to_count(candidates, self.amount)
        return max(candidates - count, 0) if self.rest else count


@SUBSETS.register("classes", version=1, injected=("names",))
class ClassSubset(Subset):
    """Selects all samples of some classes: tasks of a stream, classes to forget. The label space stays the dataset's.

    Args:
        keep: the classes, by number (from 0) or by name.
        rest: true selects all other classes instead.
    """

    def __init__(self, keep: list[int | str], rest: bool = False, names: Sequence[str] = ()) -> None:
        self.keep = class_indices(keep, names)
        self.rest = rest

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        mask = torch.isin(labels[indices], torch.tensor(self.keep))
        return indices[~mask if self.rest else mask]


@SUBSETS.register("long_tail", version=1)
class LongTailSubset(Subset):
    """Reduces class sizes exponentially from class to class: Cui et al. 2019 (CVPR), https://arxiv.org/abs/1901.05555

    Of class c (0 the most frequent) floor(n * ratio ** (c / (classes - 1))) samples are drawn, n the mean size of a
    class, at least one and at most the size of the class. The paper removes samples "by the exponential function
    n = n_i mu^i"; the mean size and the rounding down follow the code behind the long-tailed CIFAR tables.

    Args:
        ratio: samples of the rarest class over those of the most frequent, in (0, 1]; an imbalance of 100 is 0.01.
    """

    def __init__(self, ratio: float) -> None:
        if not 0 < ratio <= 1:
            raise ConfigError(
                f"ratio must be above 0 and up to 1 (rarest over most frequent; write an imbalance of 100 as 0.01), "
                f"got {ratio}"
            )
        self.ratio = ratio

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        candidate_labels = labels[indices]
        mean_size = int((candidate_labels >= 0).sum()) / classes
        parts = []
        for number in range(classes):
            group = indices[candidate_labels == number]
            quota = max(1, math.floor(mean_size * self.ratio ** (number / max(classes - 1, 1)) + 1e-9))
            parts.append(group[torch.randperm(len(group), generator=generator)[:quota]])
        return torch.cat(parts).sort().values


@SUBSETS.register("shard", version=1)
class ClientShard(Subset):
    """Selects one of several disjoint shards that together are the full split: the private samples of a client.

    Schemes:
        iid: deals the shuffled samples out evenly.
        dirichlet: splits every class by proportions from Dirichlet(alpha) over the clients (Hsu et al. 2019,
            https://arxiv.org/abs/1909.06335). Proportions are drawn for each class, and all again while a client has no
            sample, as in the code of Li et al. 2022, https://arxiv.org/abs/2102.02079.
        classes: sorts the samples by class, cuts `of * slices` equal slices and gives each client `slices` of them
            (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, with 2).

    Args:
        of: number of shards.
        number: number of this shard, from 0.
        scheme: assignment of samples to shards.
        alpha: of `dirichlet`, above 0; small values give clients few classes.
        slices: of `classes`: slices for each client.
    """

    def __init__(
        self,
        of: int,
        number: int = 0,
        scheme: Literal["iid", "dirichlet", "classes"] = "iid",
        alpha: float = 0.5,
        slices: int = 2,
    ) -> None:
        if of < 1:
            raise ConfigError(f"of must be at least 1, got {of}")
        if not 0 <= number < of:
            raise ConfigError(f"number must be from 0 to {of - 1} (there are {of} shards), got {number}")
        if alpha <= 0:
            raise ConfigError(f"alpha must be above 0, got {alpha}")
        if slices < 1:
            raise ConfigError(f"slices must be at least 1, got {slices}")
        self.of = of
        self.number = number
        self.scheme = scheme
        self.alpha = alpha
        self.slices = slices

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        if len(indices) < self.of:
            raise ConfigError(f"{len(indices)} samples are too few for {self.of} shards")
        clients = self.client_ids(labels[indices], classes, generator)
        return indices[clients == self.number]

    def client_ids(self, labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Returns the shard number of every candidate, int64 (candidates,)."""
        if self.scheme == "dirichlet":
            return self._dirichlet_client_ids(labels, generator)
        count = len(labels)
        clients = torch.empty(count, dtype=torch.int64)
        if self.scheme == "iid":
            clients[torch.randperm(count, generator=generator)] = torch.arange(count) * self.of // count
            return clients
        num_slices = self.of * self.slices
        if num_slices > count:
            raise ConfigError(f"{count} samples are too few for {self.of} shards of {self.slices} slices")
        slice_ids = torch.arange(count) * num_slices // count
        client_of_slice = torch.randperm(num_slices, generator=generator) // self.slices
        clients[labels.sort(stable=True).indices] = client_of_slice[slice_ids]
        return clients

    def _dirichlet_client_ids(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        rng = np.random.Generator(np.random.Philox(seed))
        label_array = labels.numpy()
        groups = [np.flatnonzero(label_array == number) for number in np.unique(label_array)]
        for _ in range(_MAX_DRAWS):
            clients = np.empty(len(label_array), dtype=np.int64)
            for group in groups:
                proportions = np.cumsum(rng.dirichlet(np.full(self.of, self.alpha)))
                cuts = (proportions[:-1] * len(group)).astype(np.int64)
                clients[rng.permutation(group)] = np.searchsorted(cuts, np.arange(len(group)), side="right")
            if len(np.unique(clients)) == self.of:
                return torch.from_numpy(clients)
        raise ConfigError(
            f"alpha {self.alpha} leaves one of {self.of} shards without any sample in each of {_MAX_DRAWS} draws; "
            "use a higher alpha or fewer shards"
        )

    def size(self, candidates: int) -> int | None:
        if self.scheme != "iid":
            return None
        start, end = (-(-candidates * k // self.of) for k in (self.number, self.number + 1))
        return end - start


def class_indices(classes: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Returns the numbers of classes that are written as numbers or names, sorted, without duplicates.

    Args:
        names: of all classes; empty where they are unknown before the files are read. Then nothing is checked, and
            classes written as names are left out.

    Raises:
        ConfigError: there is no such class, or the list is empty.
    """
    if not classes:
        raise ConfigError("at least one class must be listed")
    numbers = set()
    for item in classes:
        if isinstance(item, str):
            if item not in names:
                if not names:
                    continue
                raise ConfigError(f"no class {item!r}.{suggest(item, names)}")
            numbers.add(list(names).index(item))
        else:
            if item < 0 or (names and item >= len(names)):
                raise ConfigError(f"no class {item}; there are {len(names) or 'fewer'}, numbered from 0")
            numbers.add(item)
    return sorted(numbers)
