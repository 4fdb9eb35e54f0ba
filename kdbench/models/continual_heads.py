"""What a network says of one task alone: for streams of tasks that share a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


@MODELS.register("task_logits", version=1, paper="https://arxiv.org/abs/1606.09282", image=(10,))
class ContinualHead(nn.Module):
    """The logits of one task's classes; those of all others are put out of reach, so that they have probability 0.

    The rows of a linear classifier share nothing: one classifier over all classes, seen through such a mask for each
    task, is one head per task (Li and Hoiem, Learning without Forgetting, ECCV 2016). Labels keep their numbers. No
    gradient reaches the other classes.

    Shapes: (batch, num_classes) -> the same.

    Args:
        keep: the numbers of the task's classes.
        input_shape: of one sample's logits; the engine gives it.
    """

    class_mask: Tensor
    MASKED_LOGIT = -1e4  # exp gives 0 in every precision, and it fits into half precision where -inf would make NaN of 0 * inf

    def __init__(self, keep: list[int], input_shape: tuple[int, ...] = (10,)) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(f"task_logits: reads one number per class, but what it sees is {list(input_shape)}")
        wrong = [number for number in keep if not 0 <= number < input_shape[0]]
        if wrong or not keep:
            raise ConfigError(
                f"task_logits: keep lists class numbers from 0 to {input_shape[0] - 1}, got {wrong or keep}"
            )
        inside = torch.zeros(input_shape[0], dtype=torch.bool)
        inside[torch.tensor(keep)] = True
        self.register_buffer("class_mask", inside, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return torch.where(self.class_mask, logits, self.MASKED_LOGIT)


@MODELS.register("nearest_mean", version=1, paper="https://arxiv.org/abs/1611.07725", image=(64,))
class NearestMeanClassifier(nn.Module):
    """A classifier without training: the class whose mean feature is nearest, both at length 1: iCaRL's.

    Output: minus the Euclidean distance to each class's mean. The maker `nearest_mean` finds the means. A class without
    samples has mean 0 and is never nearest to what points anywhere near another mean.

    Shapes: (batch, values) -> (batch, num_classes).

    Args:
        num_classes: of the data; the engine gives it.
        input_shape: of one sample of the feature; the engine gives it.
        means: of the classes, num_classes lists of as many values as the feature has; null: 0.
    """

    means: Tensor

    def __init__(
        self, num_classes: int = 10, input_shape: tuple[int, ...] = (64,), means: list[list[float]] | None = None
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(f"nearest_mean: reads one vector per sample, but what it sees is {list(input_shape)}")
        value = torch.zeros(num_classes, input_shape[0]) if means is None else torch.tensor(means)
        if tuple(value.shape) != (num_classes, input_shape[0]):
            raise ConfigError(
                f"nearest_mean: means must be {num_classes} lists of {input_shape[0]} values, got {list(value.shape)}"
            )
        self.register_buffer("means", value)

    def forward(self, feature: Tensor) -> Tensor:
        unit, means = F.normalize(feature, dim=1), F.normalize(self.means, dim=1)
        return -torch.linalg.vector_norm(unit.unsqueeze(1) - means, dim=2)
