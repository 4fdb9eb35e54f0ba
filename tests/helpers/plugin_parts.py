"""Registers small networks and terms with one property each, as a user's plug-in does. Only tests use them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Size, Tensor, nn

from kdbench.errors import ConfigError
from kdbench.registry import MODELS, TERMS
from kdbench.terms.base import Term

CALLS: list[str] = []
"""Names of the counted terms and layers, in the order of their calls."""


@MODELS.register("t_linear", version=1)
class OneLinear(nn.Module):
    """One linear layer on the flattened image."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, image_size: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels * image_size**2, num_classes, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(image.flatten(1))


class Counted(nn.Module):
    """Identity that appends its name to `CALLS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Tensor) -> Tensor:
        CALLS.append(self.name)
        return value


@MODELS.register("t_required", version=1)
def RequiredArguments(num_classes: int, in_channels: int) -> nn.Module:
    """Requires the arguments that the dataset provides."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * in_channels, num_classes))


@MODELS.register("t_layers", version=1)
class Layers(nn.Module):
    """Three linear layers that record their calls; `norm` and `dropout` follow the first."""

    def __init__(
        self,
        num_classes: int = 4,
        in_channels: int = 1,
        image_size: int = 8,
        hidden: int = 12,
        norm: str = "",
        dropout: float = 0.0,
        label: str = "layers",
    ) -> None:
        super().__init__()
        norms = {"": nn.Identity, "batch": lambda: nn.BatchNorm1d(hidden), "layer": lambda: nn.LayerNorm(hidden)}
        first = nn.Linear(in_channels * image_size**2, hidden)
        self.layer1 = nn.Sequential(first, norms[norm](), nn.ReLU(), nn.Dropout(dropout), Counted(f"{label}.layer1"))
        self.layer2 = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), Counted(f"{label}.layer2"))
        self.layer3 = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), Counted(f"{label}.layer3"))
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(image.flatten(1)))))


@MODELS.register("t_conv", version=1)
class SmallConv(nn.Module):
    """Two convolutions with `norm` (group or batch) between them."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, norm: str = "group") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        value = torch.relu(self.norm1(self.conv1(image)))
        value = torch.relu(self.norm2(self.conv2(value)))
        return self.fc(self.pool(value).flatten(1))


@MODELS.register("t_mixes_rows", version=1)
class MixesRows(OneLinear):
    """A linear layer on each row's difference from the batch mean, also in eval mode."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image - image.mean(0, keepdim=True))


@MODELS.register("t_draws", version=1)
class AlwaysDropout(OneLinear):
    """A linear layer with dropout that stays active in eval mode."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(image, 0.5, training=True))


@MODELS.register("t_doubles_rows", version=1)
class DoublesRows(OneLinear):
    """A linear layer with a module `doubled` whose output has two rows per sample."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, image_size: int = 8, bias: bool = True) -> None:
        super().__init__(num_classes, in_channels, image_size, bias)
        self.doubled = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.doubled(super().forward(image).repeat(2, 1))[: len(image)]


class Block(nn.Module):
    """A residual block with one convolution."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width) if norm == "group" else nn.BatchNorm2d(width)

    def forward(self, value: Tensor) -> Tensor:
        return torch.relu(value + self.norm(self.conv(value)))


@MODELS.register("t_blocks", version=1)
class Blocks(nn.Module):
    """A stem, three blocks of seven channels, a classifier. Seven is odd: two ranks have shards of different sizes."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, 7, 1))
        self.blocks = nn.Sequential(*(Block(7, norm) for _ in range(3)))
        self.fc = nn.Linear(7, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(image)).mean((2, 3)))


@MODELS.register("t_tokens", version=1)
class Tokens(nn.Module):
    """Sixteen patches of an 8x8 image as tokens of eight values, and a classifier on their mean."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, 8, 2, stride=2)
        self.tokens = nn.Linear(8, 8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.relu(self.tokens(self.patches(image).flatten(2).transpose(1, 2))).mean(1))


@MODELS.register("t_two", version=1)
class ImageAndVector(nn.Module):
    """Sums the logits of an image and of an optional vector."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.image, self.vector = nn.Linear(64, num_classes), nn.Linear(6, num_classes)

    def forward(self, image: Tensor, vector: Tensor | None = None) -> Tensor:
        logits = self.image(image.flatten(1))
        return logits if vector is None else logits + self.vector(vector)


@MODELS.register("t_twice", version=1)
class RepeatedLayer(nn.Module):
    """Calls one layer twice, a layer with a keyword argument, an in-place ReLU, and overwrites a layer's output."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, image_size: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(in_channels * image_size**2, 6)
        self.shared = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])
        self.fc = nn.Linear(5, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        value = self.shared(self.shared(self.stem(image.flatten(1))))
        value = self.act(value)
        value = self.blocks[0](input=value)
        value += 1  # overwrites the output of the block
        return self.fc(self.blocks[1](value))


@MODELS.register("t_generator", version=1)
class Generator(nn.Module):
    """Maps noise (batch, latent) to images. The output is a mapping with the entry `image`."""

    def __init__(self, latent: int = 6, in_channels: int = 1, image_size: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.shape = (in_channels, image_size, image_size)
        size = in_channels * image_size**2
        self.net = nn.Linear(latent, size)
        self.norm = nn.BatchNorm1d(size) if norm else nn.Identity()

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        value = torch.tanh(self.norm(self.net(z))).unflatten(1, self.shape)
        return {"first": value.detach() * 0, "image": value}


@TERMS.register("t_counted", space="row")
class CountedTerm(Term):
    """Squared logits; appends "term" to `CALLS`."""

    def forward(self, student: Tensor) -> Tensor:
        CALLS.append("term")
        return student.square().flatten(1).sum(1)


@TERMS.register("t_nan", space="row")
class TurnsNaN(Term):
    """Squared logits before step `at` (counted from 1), then NaN."""

    def __init__(self, at: int = 5) -> None:
        super().__init__()
        self.at = at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        loss = student.square().sum(1) * 1e-3
        return torch.where(self.steps >= self.at, torch.nan, loss)


@TERMS.register("t_bad_gradient", space="row")
class BadGradient(Term):
    """A finite loss whose gradient is NaN from step `at` on: the square root at 0."""

    def __init__(self, at: int = 5) -> None:
        super().__init__()
        self.at = at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        zero = (student - student.detach()).sum(1)
        return (zero.square() + torch.where(self.steps >= self.at, 0.0, 1.0)).sqrt()


class _Once(torch.autograd.Function):
    """The square, with a gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * gradient


@TERMS.register("t_once", space="row")
class OnceDifferentiable(Term):
    """Squared logits with a gradient and without a second gradient."""

    def forward(self, student: Tensor) -> Tensor:
        return _Once.apply(student).sum(1)  # type: ignore[no-any-return,attr-defined]


@TERMS.register("t_scaled", space="row")
class Scaled(Term):
    """Squared logits times a parameter that a schedule may change."""

    def __init__(self, scale: Number = 1.0) -> None:  # noqa: F821 (annotations are read as text)
        super().__init__()
        self.scale = scale

    def forward(self, student: Tensor) -> Tensor:
        return self.scale * student.square().sum(1)


@TERMS.register("t_owner", space="row")
class LearnableBias(Term):
    """(student - bias)^2 with a learnable bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(()))

    def forward(self, student: Tensor) -> Tensor:
        return (student - self.bias).square().sum(1)


@TERMS.register("t_model", space="model")
class ModelTerm(Term):
    """A loss of a parameter alone, independent of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self) -> Tensor:
        return self.value.square()


@TERMS.register("t_picky", space="row")
class RejectingTerm(Term):
    """Rejects its operands with an error message."""

    def check_shapes(self, **shapes: Size) -> None:
        raise ValueError("compares apples only")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().sum(1)


@MODELS.register("t_refusing", version=1)
class RejectingModel(nn.Module):
    """Rejects its parameters, like a network with few possible depths."""

    def __init__(self, depth: int = 9) -> None:
        super().__init__()
        raise ConfigError(f"t_refusing: depth must be 6n + 2, got {depth}")


@TERMS.register("t_coupled", space="batch")
class BatchMeanDistance(Term):
    """The distance of the batch means; it accepts no sample weights."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.mean(0) - teacher.mean(0)).square().sum()


@TERMS.register("t_reads_item", space="row")
class ReadsItem(Term):
    """Reads a tensor's value on the host."""

    def forward(self, student: Tensor) -> Tensor:
        value = 0.0 if student.is_meta else student.detach().sum().item()
        return student.square().sum(1) * (1.0 + 0.0 * value)


@TERMS.register("t_brings_number", space="row")
class BringsNumber(Term):
    """Creates a tensor from a host number."""

    def forward(self, student: Tensor) -> Tensor:
        return student.square().sum(1) * torch.tensor(2.0, device=student.device)


@TERMS.register("t_reads_branch", space="row")
class ReadsBranch(Term):
    """Selects a branch by a tensor's value."""

    def forward(self, student: Tensor) -> Tensor:
        return student.square().sum(1) if student.is_meta or student.sum() > 0 else student.abs().sum(1)


@TERMS.register("t_reads_mask", space="row")
class ReadsMask(Term):
    """Uses a tensor whose shape depends on values."""

    def forward(self, student: Tensor) -> Tensor:
        return student.square().sum(1) + (0 if student.is_meta else student[student > 0].sum())


@TERMS.register("t_dies", space="row")
class CrashingTerm(Term):
    """Ends the process at training step `at` without a message, unless the file `alive` exists."""

    def __init__(self, at: int = 5) -> None:
        super().__init__()
        self.at = at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if not student.is_meta and self.steps == self.at and not Path("alive").exists():
                os._exit(9)
        return student.square().sum(1) * 1e-4


@MODELS.register("t_hooked", version=1)
class Hooked(Layers):
    """Layers whose classifier has a forward pre-hook."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, image_size: int = 8, norm: str = "") -> None:
        super().__init__(num_classes, in_channels, image_size, norm=norm)
        hidden = self.fc.in_features
        self.fc = nn.Sequential(nn.Linear(hidden, num_classes))
        self.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.0,))
