"""Relabellings: labels that a source changes, such as noise. The true label stays in the field `label_true`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.data.sampling.subsets import class_indices
from kdbench.errors import ConfigError
from kdbench.registry import RELABELS


class Relabel:
    """Base of all relabellings. The constructor may ask for `names`, those of the dataset's classes.

        @RELABELS.register("symmetric_noise", version=1)
        class SymmetricNoise(Relabel): ...

    columns: how many numbers each sample draws, once for the whole run.
    """

    num_draws = 1

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        """Returns the new labels.

        Args:
            labels: int64 (samples,), of the whole split, all in [0, classes).
            draws: float32 (samples, columns), uniform in [0, 1), a function of the seed and the sample's position.
            classes: how many there are.
        """
        raise NotImplementedError


def _rate(rate: float) -> float:
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate must be in [0, 1], got {rate}")
    return rate


@RELABELS.register("symmetric_noise", version=1)
class SymmetricNoise(Relabel):
    """With probability `rate` a label becomes one of the other classes, all equally likely.

    As "symmetry flipping" of Han et al. 2018 (Co-teaching), https://arxiv.org/abs/1804.06872: the own class is not
    among the new ones, so that `rate` of the labels are wrong.

    Args:
        rate: in [0, 1].
    """

    num_draws = 2

    def __init__(self, rate: float) -> None:
        self.rate = _rate(rate)

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        if classes < 2:
            return labels
        step = 1 + (draws[:, 1] * (classes - 1)).long().clamp(max=classes - 2)
        return torch.where(draws[:, 0] < self.rate, (labels + step) % classes, labels)


@RELABELS.register("asymmetric_noise", version=1, injected=("names",))
class AsymmetricNoise(Relabel):
    """With probability `rate` a label becomes that of one other class, the one it is mistaken for.

    Patrini et al. 2017 (CVPR), https://arxiv.org/abs/1609.03683, with pairs such as truck -> automobile. Without
    `pairs` class c becomes c + 1 (the last becomes the first), the "pair flipping" of https://arxiv.org/abs/1804.06872

    Args:
        rate: in [0, 1].
        pairs: a list of [from, to], classes by number or name; classes that begin no pair keep their labels.
    """

    def __init__(self, rate: float, pairs: list[list[int | str]] | None = None, names: Sequence[str] = ()) -> None:
        self.rate = _rate(rate)
        self.pairs: list[tuple[int, int]] | None = None
        if pairs is not None:
            for pair in pairs:
                if len(pair) != 2:
                    raise ConfigError(f"pairs must be a list of [from, to], got {pair!r}")
            known = all(isinstance(one, int) for pair in pairs for one in pair) or names
            numbers = [[class_indices([one], names)[0] for one in pair] for pair in pairs] if known else []
            self.pairs = [(start, end) for start, end in numbers]
            if len({start for start, _ in self.pairs}) < len(self.pairs):
                raise ConfigError("pairs: a class begins more than one pair")

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        if self.pairs is None:
            becomes = (torch.arange(classes) + 1) % classes
        else:
            becomes = torch.arange(classes)
            for start, end in self.pairs:
                becomes[start] = end
        return torch.where(draws[:, 0] < self.rate, becomes[labels], labels)


@RELABELS.register("random_labels", version=1)
class RandomLabels(Relabel):
    """Every label is drawn anew, all classes equally likely: Zhang et al. 2017 (ICLR), https://arxiv.org/abs/1611.03530"""

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        return (draws[:, 0] * classes).long().clamp(max=classes - 1)


@RELABELS.register("shuffled_labels", version=1)
class ShuffledLabels(Relabel):
    """The labels of the split change places, so that every class stays as frequent as it was."""

    def __call__(self, labels: Tensor, draws: Tensor, classes: int) -> Tensor:
        return labels[draws[:, 0].argsort(stable=True)]
