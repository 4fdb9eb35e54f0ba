"""Class-balanced random draws of samples from a split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.errors import ConfigError


def amount_to_count(total: int, amount: float | int) -> int:
    """Converts an amount (a fraction in (0, 1], or a number of at least 2) to a number of samples.

    Raises:
        ConfigError: the amount is a number above `total`.
    """
    if amount > 1 and amount > total:
        raise ConfigError(f"{amount} samples were asked for, but there are only {total}")
    return round(total * amount) if amount <= 1 else int(amount)


def class_quotas(available: Sequence[int], amount: float | int) -> list[int]:
    """Returns the number of samples to draw from each class.

    For a fraction, the same fraction of every class is drawn. If the rounded numbers do not add up to the total, the
    classes with the largest remainders get one more sample. For a number, equally many samples of every class are
    drawn (at most all), and the first classes get one more if the number cannot be divided evenly.

    Args:
        available: number of samples of each class.
        amount: fraction in (0, 1], or number of at least 2.
    """
    total = amount_to_count(sum(available), amount)
    if amount <= 1:
        exact = [count * amount for count in available]
        counts = [math.floor(value + 1e-9) for value in exact]
        order = sorted(range(len(exact)), key=lambda c: (counts[c] - exact[c], c))
    else:
        counts = [0] * len(available)
        level = 0
        while sum(counts) + sum(count > level for count in available) <= total and level < max(available, default=0):
            level += 1
            counts = [min(count, level) for count in available]
        order = [c for c, count in enumerate(available) if count > counts[c]]
    remainder = total - sum(counts)
    for c in order[:remainder]:
        counts[c] += 1
    return counts


def balanced_indices(
    labels: Tensor, indices: Tensor, amount: float | int, classes: int, generator: torch.Generator, option: str
) -> Tensor:
    """Draws a class-balanced subset of `indices`.

    Args:
        labels: int64 (samples,), labels of the full split.
        indices: int64 (candidates,), sorted.
        amount: fraction in (0, 1], or number of at least 2.
        classes: number of classes.
        generator: random generator, from which all classes draw one after the other.
        option: name of the option in messages, such as `train.yaml:3 validation`.

    Returns:
        The drawn indices, int64, sorted.

    Raises:
        ConfigError: the amount is not positive, or larger than the number of candidates.
    """
    check_amount(amount, option)
    candidate_labels = labels[indices]
    groups = [indices[candidate_labels == c] for c in range(classes)]
    if sum(len(group) for group in groups) < len(indices):
        groups.append(indices[candidate_labels < 0])  # unlabelled samples, which an artifact may contain
    try:
        quotas = class_quotas([len(group) for group in groups], amount)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    parts = [
        group[torch.randperm(len(group), generator=generator)[:quota]]
        for group, quota in zip(groups, quotas, strict=True)
    ]
    return torch.cat(parts).sort().values


def check_amount(amount: float | int, option: str) -> None:
    """Raises ConfigError unless the amount is a fraction in (0, 1] or a whole number of at least 2."""
    is_count = amount > 1 and float(amount).is_integer()
    if not (0 < amount <= 1 or is_count):
        raise ConfigError(f"{option} must be a fraction in (0, 1] or a whole number of at least 2, got {amount!r}")


def exclude(indices: Tensor, excluded: Tensor) -> Tensor:
    """Returns `indices` without the elements of `excluded`, in the same order."""
    return indices[~torch.isin(indices, excluded)]


def empty_classes(labels: Tensor, indices: Tensor, classes: Sequence[str]) -> list[str]:
    """Returns the names of the classes without any sample in `indices`."""
    present = labels[indices]
    counts = torch.bincount(present[present >= 0], minlength=len(classes))
    return [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]
