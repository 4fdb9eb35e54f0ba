"""Subsets: which samples of a split a source gives.

A subset is drawn by the run's seed alone. Two sources of the same dataset that write the same draw therefore share it,
and its parts (`rest: true`, the numbers of `shard`) never overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.data.sampling.split import amount_to_count, balanced_positions, check_amount, exclude
from kdbench.errors import ConfigError, suggest
from kdbench.registry import SUBSETS

_TRIES = 1000
"""How often `shard` draws anew where a client would get no sample."""


class Subset:
    """Base of all subsets. Parameters called `names` are the names of the dataset's classes; the engine gives them.

    @SUBSETS.register("balanced", version=1)
    class Balanced(Subset): ...
    """

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Chooses a part of `positions`.

        Args:
            labels: int64 (samples,), the true labels of the whole split.
            positions: int64 (candidates,), sorted.
            classes: how many there are.
            generator: at the start of its stream, which depends on the seed alone.

        Returns:
            The chosen positions, int64, sorted.

        Raises:
            ConfigError: there are not enough samples.
        """
        raise NotImplementedError

    def size(self, candidates: int) -> int | None:
        """Returns how many of so many candidates are chosen; None where only their labels could tell."""
        return None


@SUBSETS.register("balanced", version=1)
class BalancedSubset(Subset):
    """Equally many samples of every class; `subset: 100` is short for it.

    A share takes the same share of every class, a number equally many of every class as far as a class has them.

    Args:
        amount: a share in (0, 1], or a number (2 or more).
        rest: true takes all that the same draw leaves.
    """

    def __init__(self, amount: float, rest: bool = False) -> None:
        check_amount(amount, "amount")
        self.amount = amount
        self.rest = rest

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        chosen = balanced_positions(labels, positions, self.amount, classes, generator, "amount")
        return exclude(positions, chosen) if self.rest else chosen

    def size(self, candidates: int) -> int | None:
        chosen = amount_to_count(candidates, self.amount)
        return max(candidates - chosen, 0) if self.rest else chosen


@SUBSETS.register("random", version=1, injected=("names",))
class RandomSubset(Subset):
    """Samples drawn without regard to their classes, or with `rest: true` all others (forget and retain).

    Two sources, one with `rest: true` and all else equal, are disjoint and together the whole.

    Args:
        amount: a share in (0, 1], or a number (2 or more), of the samples that may be drawn.
        classes: draw among these classes only, by number or name; null: among all.
        rest: true takes all that the same draw leaves, of every class.
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
        self.among = None if classes is None else class_indices(classes, names)
        self.rest = rest

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        among = positions
        if self.among is not None:
            among = positions[torch.isin(labels[positions], torch.tensor(self.among))]
        if self.amount > len(among) and self.amount > 1:
            raise ConfigError(f"{self.amount} samples were asked for, but there are only {len(among)}")
        order = torch.randperm(len(among), generator=generator)
        chosen = among[order[: amount_to_count(len(among), self.amount)]].sort().values
        return exclude(positions, chosen) if self.rest else chosen

    def size(self, candidates: int) -> int | None:
        if self.among is not None:
            return None
        chosen = amount_to_count(candidates, self.amount)
        return max(candidates - chosen, 0) if self.rest else chosen


@SUBSETS.register("classes", version=1, injected=("names",))
class ClassSubset(Subset):
    """All samples of some classes: tasks of a stream, classes to forget. The label space stays that of the dataset.

    Args:
        keep: the classes, by number (from 0) or by name.
        rest: true takes all other classes instead.
    """

    def __init__(self, keep: list[int | str], rest: bool = False, names: Sequence[str] = ()) -> None:
        self.keep = class_indices(keep, names)
        self.rest = rest

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        kept = torch.isin(labels[positions], torch.tensor(self.keep))
        return positions[~kept if self.rest else kept]


@SUBSETS.register("long_tail", version=1)
class LongTailSubset(Subset):
    """Exponentially fewer samples from class to class: Cui et al. 2019 (CVPR), https://arxiv.org/abs/1901.05555

    Of class c (0 the most frequent) floor(n * ratio ** (c / (classes - 1))) samples are kept, n the mean size of a
    class, at least one and at most what the class has. The paper removes samples "by the exponential function
    n = n_i mu^i"; the mean size and the rounding down are those of the code that the long-tailed CIFAR tables use.

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

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        own = labels[positions]
        most = int((own >= 0).sum()) / classes
        chosen = []
        for number in range(classes):
            group = positions[own == number]
            wanted = max(1, math.floor(most * self.ratio ** (number / max(classes - 1, 1)) + 1e-9))
            chosen.append(group[torch.randperm(len(group), generator=generator)[:wanted]])
        return torch.cat(chosen).sort().values


@SUBSETS.register("shard", version=1)
class ClientShard(Subset):
    """One of several disjoint parts that together are the whole: the private samples of a client.

    Schemes: `iid` deals the shuffled samples out evenly. `dirichlet` splits every class by proportions from
    Dirichlet(alpha) over the clients (Hsu et al. 2019, https://arxiv.org/abs/1909.06335; per class and drawn anew while
    a client has nothing, as the code of Li et al. 2022, https://arxiv.org/abs/2102.02079). `classes` sorts the samples
    by class, cuts `of * slices` equal slices and gives each client `slices` of them (McMahan et al. 2017,
    https://arxiv.org/abs/1602.05629, with 2).

    Args:
        of: how many parts there are.
        number: which one this is, from 0.
        scheme: how the samples are dealt out.
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

    def select(self, labels: Tensor, positions: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        if len(positions) < self.of:
            raise ConfigError(f"{len(positions)} samples are too few for {self.of} shards")
        owners = self.client_ids(labels[positions], classes, generator)
        return positions[owners == self.number]

    def client_ids(self, labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Returns the shard of every sample, int64 (candidates,)."""
        if self.scheme == "dirichlet":
            return self._by_proportions(labels, generator)
        count = len(labels)
        owners = torch.empty(count, dtype=torch.int64)
        if self.scheme == "iid":
            owners[torch.randperm(count, generator=generator)] = torch.arange(count) * self.of // count
            return owners
        cuts = self.of * self.slices
        if cuts > count:
            raise ConfigError(f"{count} samples are too few for {self.of} shards of {self.slices} slices")
        slice_of = torch.arange(count) * cuts // count
        client_of = torch.randperm(cuts, generator=generator) // self.slices
        owners[labels.sort(stable=True).indices] = client_of[slice_of]
        return owners

    def _by_proportions(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        rng = np.random.Generator(np.random.Philox(seed))
        own = labels.numpy()
        groups = [np.flatnonzero(own == number) for number in np.unique(own)]
        for _ in range(_TRIES):
            owners = np.empty(len(own), dtype=np.int64)
            for group in groups:
                ends = np.cumsum(rng.dirichlet(np.full(self.of, self.alpha)))
                cuts = (ends[:-1] * len(group)).astype(np.int64)
                owners[rng.permutation(group)] = np.searchsorted(cuts, np.arange(len(group)), side="right")
            if len(np.unique(owners)) == self.of:
                return torch.from_numpy(owners)
        raise ConfigError(
            f"alpha {self.alpha} leaves one of {self.of} shards without any sample in each of {_TRIES} draws; "
            "choose a higher alpha or fewer shards"
        )

    def size(self, candidates: int) -> int | None:
        if self.scheme != "iid":
            return None
        first, last = (-(-candidates * k // self.of) for k in (self.number, self.number + 1))
        return last - first


def class_indices(wanted: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Returns the numbers of classes that are given by number or by name.

    Args:
        names: of all classes; empty where only the files could tell them, and then nothing can be checked.

    Raises:
        ConfigError: there is no such class, or none was given.
    """
    if not wanted:
        raise ConfigError("at least one class has to be named")
    found = []
    for one in wanted:
        if isinstance(one, str):
            if one not in names:
                if not names:
                    continue
                raise ConfigError(f"no class {one!r}.{suggest(one, names)}")
            found.append(list(names).index(one))
        else:
            if one < 0 or (names and one >= len(names)):
                raise ConfigError(f"no class {one}; there are {len(names) or 'fewer'}, numbered from 0")
            found.append(one)
    return sorted(set(found))
