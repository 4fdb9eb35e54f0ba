"""Subsets of a split: random draws, classes, long tails, and disjoint shards for clients.

A subset depends only on the run's seed and the split. Therefore two sources with the same dataset and the same
`subset` have the same samples. Complementary subsets (`rest: true`, or shards of different numbers) never overlap.
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
"""Maximum number of draws of the scheme `dirichlet` until every client has a sample."""


class Subset:
    """Base class of all subsets, which select samples of a split.

    A subclass that is registered with `injected=("names",)` receives the names of the dataset's classes in its
    constructor.

    Example:
        @SUBSETS.register("balanced", version=1)
        class BalancedSubset(Subset): ...
    """

    def select(self, labels: Tensor, indices: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Selects samples among `indices` and returns their indices, int64, sorted.

        Args:
            labels: int64 (samples,), true labels of the full split.
            indices: int64 (candidates,), sorted, indices of the samples that may be selected.
            classes: number of classes.
            generator: random generator whose state depends only on the run's seed.

        Raises:
            ConfigError: there are not enough samples.
        """
        raise NotImplementedError

    def size(self, candidates: int) -> int | None:
        """Returns the number of samples selected from `candidates` samples, or None if it depends on their labels."""
        return None


@SUBSETS.register("balanced", version=1)
class BalancedSubset(Subset):
    """Selects equally many samples of every class. `subset: 100` is short for this subset with amount 100.

    A fraction selects the same fraction of every class. A number selects equally many samples of every class (at most
    all).

    Args:
        amount: fraction in (0, 1], or number of at least 2.
        rest: true: selects all samples that would not be selected with false.
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
    """Random samples, regardless of their classes, or with `rest: true` all other samples (forget and retain sets).

    Two sources that differ only in `rest` are disjoint, and together they contain the full split.

    Args:
        amount: fraction in (0, 1], or number of at least 2, of the samples of `classes`.
        classes: numbers or names of the classes from which samples are drawn; null: all classes.
        rest: true: selects all samples, of every class, that would not be selected with false.
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
    """All samples of some classes, for tasks of continual learning or classes to forget. Labels are not renumbered.

    Args:
        keep: numbers (from 0) or names of the classes.
        rest: true: selects the samples of all classes that are not in `keep`.
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

    From class c, floor(n * ratio ** (c / (classes - 1))) samples are drawn (at least one, at most all), where n is
    the mean size of a class. Class 0 is the most frequent. The paper states "the exponential function n = n_i mu^i".
    The mean size and the rounding down follow the code for the long-tailed CIFAR tables.

    Args:
        ratio: number of samples of the rarest class divided by that of the most frequent class, in (0, 1]. An
            imbalance of 100 is 0.01.
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
    """One of several disjoint shards of a split: the samples of one client in federated learning.

    All shards together contain the full split.

    Schemes:
        iid: the shuffled samples are distributed evenly.
        dirichlet: each class is divided by proportions drawn from Dirichlet(alpha) over the clients (Hsu et al. 2019,
            https://arxiv.org/abs/1909.06335). All proportions are drawn again until every client has a sample, as in
            the code of Li et al. 2022, https://arxiv.org/abs/2102.02079.
        classes: the samples are sorted by class and cut into `of * slices` equal slices. Each client gets `slices`
            random slices (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, with 2 slices).

    Args:
        of: number of shards.
        number: number of this shard, from 0.
        scheme: method that assigns samples to shards.
        alpha: parameter of the scheme `dirichlet`, above 0. With small values a client has few classes.
        slices: number of slices per client in the scheme `classes`.
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
        """Returns the shard number of each candidate sample, int64 (candidates,).

        Args:
            labels: int64 (candidates,), labels of the candidates.
        """
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
    """Converts class names and class numbers to sorted class numbers without duplicates.

    Args:
        classes: names or numbers of the classes to convert.
        names: names of all classes; empty if they are unknown until the files are read. In this case, the classes are
            not checked, and those written as names are left out.

    Raises:
        ConfigError: a class does not exist, or `classes` is empty.
    """
    if not classes:
        raise ConfigError("at least one class must be listed")
    numbers = set()
    for item in classes:
        if isinstance(item, str):
            if item not in names:
                if not names:
                    continue
                raise ConfigError(f"there is no class {item!r}.{suggest(item, names)}")
            numbers.add(list(names).index(item))
        else:
            if item < 0 or (names and item >= len(names)):
                raise ConfigError(
                    f"there is no class {item}; classes are numbered from 0{f' to {len(names) - 1}' if names else ''}"
                )
            numbers.add(item)
    return sorted(numbers)
