"""Class-balanced choices among the samples of a split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.errors import ConfigError


def amount_to_count(total: int, amount: float | int) -> int:
    """Returns how many of `total` samples a share in (0, 1] or a number (2 or more) asks for.

    Raises:
        ConfigError: more than there are.
    """
    if amount > 1 and amount > total:
        raise ConfigError(f"{amount} samples were asked for, but there are only {total}")
    return round(total * amount) if amount <= 1 else int(amount)


def class_quotas(available: Sequence[int], amount: float | int) -> list[int]:
    """Returns how many samples each class gives.

    A share takes the same share of every class (largest remainders make up the total); a number takes equally many of
    every class, as far as a class has them; the first classes give the rest.
    """
    total = amount_to_count(sum(available), amount)
    if amount <= 1:
        exact = [count * amount for count in available]
        taken = [math.floor(value + 1e-9) for value in exact]
        order = sorted(range(len(exact)), key=lambda c: (taken[c] - exact[c], c))
    else:
        taken = [0] * len(available)
        level = 0
        while sum(taken) + sum(count > level for count in available) <= total and level < max(available, default=0):
            level += 1
            taken = [min(count, level) for count in available]
        order = [c for c, count in enumerate(available) if count > taken[c]]
    missing = total - sum(taken)
    for c in order[:missing]:
        taken[c] += 1
    return taken


def balanced_positions(
    labels: Tensor, positions: Tensor, amount: float | int, classes: int, generator: torch.Generator, what: str
) -> Tensor:
    """Chooses among `positions` a class-balanced part.

    Args:
        labels: int64 (samples,), of the whole split.
        positions: int64 (candidates,), sorted.
        amount: a share in (0, 1] or a number (2 or more).
        generator: at the start of its stream; every class uses it in turn.
        what: names the wish in messages, such as `train.yaml:3 validation`.

    Returns:
        The chosen positions, int64, sorted.

    Raises:
        ConfigError: the amount is not positive, or more than there is.
    """
    check_amount(amount, what)
    own = labels[positions]
    groups = [positions[own == c] for c in range(classes)]
    if sum(len(group) for group in groups) < len(positions):
        groups.append(positions[own < 0])  # samples without a label, as a made dataset may have them
    chosen = []
    try:
        wanted = class_quotas([len(group) for group in groups], amount)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    for group, quota in zip(groups, wanted, strict=True):
        chosen.append(group[torch.randperm(len(group), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values


def check_amount(amount: float | int, what: str) -> None:
    """Raises ConfigError unless the amount is a share in (0, 1] or a whole number of at least 2."""
    whole = amount > 1 and float(amount).is_integer()
    if not (0 < amount <= 1 or whole):
        raise ConfigError(f"{what} must be a share in (0, 1] or a whole number of at least 2, got {amount!r}")


def exclude(positions: Tensor, removed: Tensor) -> Tensor:
    """Returns the positions that are not among `removed`, in their order."""
    return positions[~torch.isin(positions, removed)]


def empty_classes(labels: Tensor, positions: Tensor, classes: Sequence[str]) -> list[str]:
    """Returns the names of the classes of which no sample is left."""
    own = labels[positions]
    counts = torch.bincount(own[own >= 0], minlength=len(classes))
    return [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]
