"""Relabellings: label noise and other changes of labels. The field `label_true` keeps the original label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.data.sampling.subsets import class_indices
from kdbench.errors import ConfigError
from kdbench.registry import RELABELS


class Relabel:
    """Base class of all relabellings, such as label noise.

    A subclass that is registered with `injected=("names",)` receives the names of the dataset's classes in its
    constructor.

    Example:
        @RELABELS.register("symmetric_noise", version=1)
        class SymmetricNoise(Relabel): ...

    Attributes:
        num_draws: number of random numbers per sample. They are drawn once for the whole run.
    """

    num_draws = 1

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        """Returns the new labels, int64 (samples,).

        Args:
            labels: int64 (samples,), labels of all labelled samples of the split, in [0, classes).
            draws: float32 (samples, num_draws), random numbers in [0, 1) that depend on the seed and the sample's
                index.
            classes: number of classes.
        """
        raise NotImplementedError


def _check_rate(rate: float) -> float:
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate must be in [0, 1], got {rate}")
    return rate


@RELABELS.register("symmetric_noise", version=1)
class SymmetricNoise(Relabel):
    """Replaces a label with probability `rate` by a different class, drawn uniformly.

    This is the "symmetry flipping" of Han et al. 2018 (Co-teaching), https://arxiv.org/abs/1804.06872. The true class
    is never drawn, so a fraction `rate` of the labels is wrong.

    Args:
        rate: probability, in [0, 1].
    """

    num_draws = 2

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        if classes < 2:
            return labels
        step = 1 + (draws[:, 1] * (classes - 1)).long().clamp(max=classes - 2)
        return torch.where(draws[:, 0] < self.rate, (labels + step) % classes, labels)


@RELABELS.register("asymmetric_noise", version=1, injected=("names",))
class AsymmetricNoise(Relabel):
    """Replaces a label with probability `rate` by a fixed class that is easily confused with the true class.

    Patrini et al. 2017 (CVPR), https://arxiv.org/abs/1609.03683, use pairs such as truck -> automobile. Without
    `pairs`, class c is replaced by c + 1, and the last class by the first. This is the "pair flipping" of Han et al.
    2018 (Co-teaching), https://arxiv.org/abs/1804.06872.

    Args:
        rate: probability, in [0, 1].
        pairs: list of [from, to] with numbers or names of classes. Labels of classes that are not listed are
            unchanged.
    """

    def __init__(self, rate: float, pairs: list[list[int | str]] | None = None, names: Sequence[str] = ()) -> None:
        self.rate = _check_rate(rate)
        self.pairs: list[tuple[int, int]] | None = None
        if pairs is not None:
            for pair in pairs:
                if len(pair) != 2:
                    raise ConfigError(f"pairs must be a list of [from, to], got {pair!r}")
            # Class names are unknown before the files are read. In this case only the shape of `pairs` is checked.
            resolvable = all(isinstance(item, int) for pair in pairs for item in pair) or names
            numbers = [[class_indices([item], names)[0] for item in pair] for pair in pairs] if resolvable else []
            self.pairs = [(start, end) for start, end in numbers]
            if len({start for start, _ in self.pairs}) < len(self.pairs):
                raise ConfigError("pairs: a class is the first of more than one pair")

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        if self.pairs is None:
            targets = (torch.arange(classes) + 1) % classes
        else:
            targets = torch.arange(classes)
            for start, end in self.pairs:
                targets[start] = end
        return torch.where(draws[:, 0] < self.rate, targets[labels], labels)


@RELABELS.register("random_labels", version=1)
class RandomLabels(Relabel):
    """Replaces every label by a uniform draw over the classes: Zhang et al. 2017 (ICLR), https://arxiv.org/abs/1611.03530"""

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        return (draws[:, 0] * classes).long().clamp(max=classes - 1)


@RELABELS.register("shuffled_labels", version=1)
class ShuffledLabels(Relabel):
    """Permutes the labels of the split at random, so that class frequencies do not change."""

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        return labels[draws[:, 0].argsort(stable=True)]
