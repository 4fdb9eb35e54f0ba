"""Heads for continual learning: logits restricted to the classes of one task, and the nearest-mean classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


@MODELS.register("task_logits", version=1, paper="https://arxiv.org/abs/1606.09282", image=(10,))
class ContinualHead(nn.Module):
    """Head of one continual-learning task: sets the probability of all classes outside the task to 0.

    The outputs of a linear classifier do not share weights. One classifier over all classes with one mask per task is
    therefore equivalent to one head per task (Li and Hoiem, Learning without Forgetting, ECCV 2016). The mask does
    not change the class numbers. Masked classes get no gradient. The head has no parameters.

    Shape:
        (batch, num_classes) -> the same shape.

    Args:
        keep: class numbers of the task. All classes that are not in this list are masked.
        input_shape: shape of the logits per sample (injected by kdbench).

    Example (recipe):
        models: {task1: {model: {type: task_logits, keep: [0, 1, 2]}, input: "student:logits", frozen: true}}
    """

    class_mask: Tensor
    # exp(-1e4) is 0 in every precision, -1e4 is finite in half precision, and -inf would give NaN in 0 * inf.
    MASKED_LOGIT = -1e4

    def __init__(self, keep: list[int], input_shape: tuple[int, ...] = (10,)) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(
                f"task_logits: the input must be logits (a vector), got shape {list(input_shape)} per sample"
            )
        invalid = [number for number in keep if not 0 <= number < input_shape[0]]
        if invalid or not keep:
            raise ConfigError(
                f"task_logits: keep must list class numbers from 0 to {input_shape[0] - 1}, got {invalid or keep}"
            )
        class_mask = torch.zeros(input_shape[0], dtype=torch.bool)
        class_mask[torch.tensor(keep)] = True
        self.register_buffer("class_mask", class_mask, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return torch.where(self.class_mask, logits, self.MASKED_LOGIT)


@MODELS.register("nearest_mean", version=1, paper="https://arxiv.org/abs/1611.07725", image=(64,))
class NearestMeanClassifier(nn.Module):
    """Nearest-mean classifier on normalised features (iCaRL).

    logit_c = - || f / |f| - mu_c / |mu_c| ||, where f is the feature and mu_c the mean feature of class c

    At the end of a training stage, the artifact builder `nearest_mean` computes the class means from the training
    samples. A class without samples has mean 0 and therefore logit -1: every class whose mean is within 60 degrees of
    the feature has a higher logit. The classifier has no parameters, and the means are a buffer.

    Shape:
        (batch, values) -> (batch, num_classes). The logits are at most 0.

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        input_shape: shape of the feature per sample (injected by kdbench).
        means: class means, one list per class, each as long as the feature. null: all means are 0.

    Example (recipe):
        models: {nearest: {model: nearest_mean, input: "student:pool", frozen: true}}
    """

    means: Tensor

    def __init__(
        self, num_classes: int = 10, input_shape: tuple[int, ...] = (64,), means: list[list[float]] | None = None
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigError(f"nearest_mean: the input must be a vector, got shape {list(input_shape)} per sample")
        value = torch.zeros(num_classes, input_shape[0]) if means is None else torch.tensor(means)
        if tuple(value.shape) != (num_classes, input_shape[0]):
            raise ConfigError(
                f"nearest_mean: means must be {num_classes} lists of {input_shape[0]} values, got {list(value.shape)}"
            )
        self.register_buffer("means", value)

    def forward(self, feature: Tensor) -> Tensor:
        unit, means = F.normalize(feature, dim=1), F.normalize(self.means, dim=1)
        return -torch.linalg.vector_norm(unit.unsqueeze(1) - means, dim=2)
