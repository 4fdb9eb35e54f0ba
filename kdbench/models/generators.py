"""Networks that make images: from noise, from an index, or from another image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError
from kdbench.models.layers import GlobalAveragePool
from kdbench.registry import MODELS


@MODELS.register("latent_generator", version=1, paper="https://arxiv.org/abs/1904.01186")
class LatentGenerator(nn.Module):
    """Images from noise, for data-free distillation: two doublings by nearest neighbour between 3x3 convolutions.

    DAFL (Chen et al. 2019, https://arxiv.org/abs/1904.01186) and ZSKT (Micaelli and Storkey 2019,
    https://arxiv.org/abs/1905.09768) share this network; it follows both released codes. A linear layer gives a map of
    a quarter of the image's height and width, `width` channels, then come BatchNorm, and twice: doubling, convolution
    (to `width`, then to half of it), BatchNorm, leaky ReLU of slope 0.2. A last convolution gives the channels of the
    image. The end differs: DAFL has tanh, then BatchNorm without affine parameters (the defaults here); ZSKT has no
    tanh and BatchNorm with them (`tanh: false, affine: true`). Either BatchNorm keeps the images where a teacher's
    normalised images are: mean 0, deviation 1 per channel.

    Shapes: (batch, latent) -> (batch, channels, height, width). Feature: `blocks` is the map before the last
    convolution. 256 thousand parameters for 1x8x8 images from 64 numbers; 22 thousand with `width: 32`.

    Args:
        input_shape: of one sample of the noise; the engine gives it.
        image_shape: of the image to make; the engine gives that of the evaluation images.
        width: channels of the first map; 128 in both papers.
        tanh: bound the image before the last BatchNorm.
        affine: let the last BatchNorm learn a scale and a shift.
        eps: of the BatchNorms that follow the first two convolutions; DAFL's released code has 0.8, ZSKT's 1e-5.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (64,),
        image_shape: tuple[int, ...] = (1, 8, 8),
        width: int = 128,
        tanh: bool = True,
        affine: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        channels, height, breadth = _check_image_shape(image_shape, "latent_generator")
        if height % 4 or breadth % 4:
            raise ConfigError(
                f"latent_generator: the image's height and width must be multiples of 4, got {height}x{breadth}"
            )
        if width < 2 or width % 2:
            raise ConfigError(f"latent_generator: width must be an even number of at least 2, got {width}")
        self.first_map_shape = (width, height // 4, breadth // 4)
        self.fc = nn.Linear(math.prod(input_shape), math.prod(self.first_map_shape))
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width, eps=eps),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, eps=eps),
            nn.LeakyReLU(0.2),
        )
        self.conv = nn.Conv2d(width // 2, channels, 3, padding=1)
        self.bound = nn.Tanh() if tanh else nn.Identity()
        self.standard = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, latent: Tensor) -> Tensor:
        first = self.fc(latent.flatten(1)).unflatten(1, self.first_map_shape)
        return self.standard(self.bound(self.conv(self.blocks(self.norm(first)))))


@MODELS.register("image_bank", version=1, paper="https://arxiv.org/abs/1912.08795")
class ImageBank(nn.Module):
    """Images whose pixels are the parameters: DeepInversion (Yin et al. 2020, https://arxiv.org/abs/1912.08795).

    What it sees is the position of each image (`noise.index`, say), and the gradient of whatever reads the images
    moves their pixels. They live in the space of normalised images, and start from N(0, std^2).

    Shapes: int64 (batch,) -> (batch, *image_shape). One parameter, `pixels`, (samples, *image_shape).

    Args:
        image_shape: of one image; the engine gives that of the evaluation images.
        samples: how many images; every position must be below it.
        std: deviation of the start.
    """

    def __init__(self, image_shape: tuple[int, ...] = (1, 8, 8), samples: int = 256, std: float = 1.0) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"image_bank: samples must be at least 1, got {samples}")
        if std < 0:
            raise ConfigError(f"image_bank: std must not be negative, got {std}")
        self.pixels = nn.Parameter(torch.empty(samples, *_check_image_shape(image_shape, "image_bank")))
        nn.init.normal_(self.pixels, std=std)

    def forward(self, index: Tensor) -> Tensor:
        return self.pixels[index]


@MODELS.register("shared_pattern", version=1, paper="https://arxiv.org/abs/2408.06927", image=(1, 8, 8))
class SharedPattern(nn.Module):
    """Adds one learnt pattern to every image, whatever its class: the compensator of INFER (Zhang et al. 2024).

    out = image + pattern, in the space of normalised images; the pattern starts at 0. Images of all classes move it
    together, so that it holds what the classes share (https://arxiv.org/abs/2408.06927, ICLR 2025).

    Shapes: (batch, *image_shape) -> the same. One parameter, `pattern`, (1, *image_shape).

    Args:
        input_shape: of one image; the engine gives it.
    """

    def __init__(self, input_shape: tuple[int, ...] = (1, 8, 8)) -> None:
        super().__init__()
        self.pattern = nn.Parameter(torch.zeros(1, *_check_image_shape(input_shape, "shared_pattern")))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.pattern


@MODELS.register("affine_augmentor", version=1, paper="https://arxiv.org/abs/2305.14890", image=(1, 8, 8))
class AffineAugmentor(nn.Module):
    """A learnt, bounded augmentation of each image: an affine transform, brightness and contrast.

    For HARD (Nix, Burg and Sinz 2023, https://arxiv.org/abs/2305.14890), whose augmentors reach from spatial
    transforms to a variational autoencoder. The paper's own networks are not reproduced: here a small convolutional
    network predicts seven numbers per image, tanh bounds each by its parameter below, and the image is sampled at the
    moved places (bilinear, border repeated; Jaderberg et al. 2015, https://arxiv.org/abs/1506.02025). The last layer
    starts at zero: the augmentation starts as the identity, and with every bound at 0 stays it.

    Shapes: (batch, channels, height, width) -> the same. Feature: `settings`, (batch, 7), before tanh: rotation,
    shift in x and y, log scale, shear, brightness, contrast.

    Args:
        width: channels of the predicting network.
        rotation: largest angle, in degrees.
        shift: largest shift, as a share of the image's height and width.
        scale: largest growth or shrinking: 0.2 allows factors from 1 / 1.2 to 1.2.
        shear: largest shear, a tangent.
        brightness: largest value added to all pixels, in units of the normalised image.
        contrast: largest factor on the distance from the image's mean, as `scale`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 16,
        rotation: float = 30.0,
        shift: float = 0.15,
        scale: float = 0.2,
        shear: float = 0.2,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ) -> None:
        super().__init__()
        bounds = (rotation, shift, scale, shear, brightness, contrast)
        if min(bounds) < 0:
            raise ConfigError(f"affine_augmentor: no bound may be negative, got {bounds}")
        logs = (math.log1p(scale), math.log1p(contrast))
        limits = (math.radians(rotation), 2 * shift, 2 * shift, logs[0], shear, brightness, logs[1])
        self.limits = limits  # a shift counts the image as 2 wide, as `grid_sample` does
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            GlobalAveragePool(),
            nn.Linear(2 * width, 2 * width),
            nn.ReLU(),
        )
        self.settings = nn.Linear(2 * width, len(limits))
        nn.init.zeros_(self.settings.weight)
        nn.init.zeros_(self.settings.bias)

    def forward(self, image: Tensor) -> Tensor:
        raw = torch.tanh(self.settings(self.body(image)))
        angle, right, down, size, shear, light, contrast = (raw[:, i] * limit for i, limit in enumerate(self.limits))
        # Where each output pixel reads: rotation x shear x scale, then the shift.
        cos, sin, factor = angle.cos(), angle.sin(), size.exp()
        top = torch.stack([cos * factor, (shear * cos - sin) * factor, right], dim=1)
        bottom = torch.stack([sin * factor, (shear * sin + cos) * factor, down], dim=1)
        matrix = torch.stack([top, bottom], dim=1)
        grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
        moved = F.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)
        mean = moved.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (moved - mean) * contrast.exp()[:, None, None, None] + light[:, None, None, None]


def _check_image_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"{name}: image_shape must be channels, height and width, got {list(shape)}")
    channels, height, width = shape
    return channels, height, width
