"""Image generators and augmentors: from noise, from an index, or from another image."""

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
    """Convolutional image generator for data-free distillation (DAFL, ZSKT).

    DAFL (Chen et al. 2019, https://arxiv.org/abs/1904.01186) and ZSKT (Micaelli and Storkey 2019,
    https://arxiv.org/abs/1905.09768) share this network; it follows both released codes: a linear layer to a map of a
    quarter of the image's height and width with `width` channels, BatchNorm, then twice nearest-neighbour upsampling by
    2, a 3x3 convolution (to `width`, then to width / 2), BatchNorm and leaky ReLU of slope 0.2, and a last 3x3
    convolution to the image's channels. DAFL ends with tanh and a BatchNorm without affine parameters (the defaults
    here), ZSKT with an affine BatchNorm and no tanh (`tanh: false, affine: true`). The last BatchNorm gives images of
    mean 0 and deviation 1 per channel, the range of a teacher's normalised images.

    Feature: `blocks`, the map before the last convolution. 256 thousand parameters for 1x8x8 images from 64 numbers; 22
    thousand with `width: 32`.

    Shape:
        (batch, latent) -> (batch, channels, height, width).

    Args:
        input_shape: shape of the noise per sample; injected.
        image_shape: shape of the generated image, height and width multiples of 4; injected from the evaluation images.
        width: channels of the first map, even; 128 in both papers.
        tanh: bound the image before the last BatchNorm.
        affine: learn scale and shift of the last BatchNorm.
        eps: eps of the two BatchNorms in `blocks`; 0.8 in DAFL's released code, 1e-5 in ZSKT's.

    Example (recipe):
        models: {generator: {model: {type: latent_generator, width: 32}, input: noise.z}}
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
        channels, image_height, image_width = _check_image_shape(image_shape, "latent_generator")
        if image_height % 4 or image_width % 4:
            raise ConfigError(
                f"latent_generator: height and width of the image must be multiples of 4, "
                f"got {image_height}x{image_width}"
            )
        if width < 2 or width % 2:
            raise ConfigError(f"latent_generator: width must be an even number of at least 2, got {width}")
        self.first_map_shape = (width, image_height // 4, image_width // 4)
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
        first_map = self.fc(latent.flatten(1)).unflatten(1, self.first_map_shape)
        return self.standard(self.bound(self.conv(self.blocks(self.norm(first_map)))))


@MODELS.register("image_bank", version=1, paper="https://arxiv.org/abs/1912.08795")
class ImageBank(nn.Module):
    """Images whose pixels are the parameters (DeepInversion, Yin et al. 2020, https://arxiv.org/abs/1912.08795).

    The input is the position of each image, for example `noise.index`; losses on the images move their pixels. The
    images are in normalised space and start from N(0, std^2). One parameter, `pixels`, (samples, *image_shape).

    Shape:
        int64 (batch,) -> (batch, *image_shape).

    Args:
        image_shape: shape of one image; injected from the evaluation images.
        samples: number of images; every position must be below it.
        std: standard deviation of the initial pixels.

    Example (recipe):
        models: {bank: {model: {type: image_bank, samples: 100}, input: noise.index}}
    """

    def __init__(self, image_shape: tuple[int, ...] = (1, 8, 8), samples: int = 256, std: float = 1.0) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"image_bank: samples must be at least 1, got {samples}")
        if std < 0:
            raise ConfigError(f"image_bank: std must be at least 0, got {std}")
        self.pixels = nn.Parameter(torch.empty(samples, *_check_image_shape(image_shape, "image_bank")))
        nn.init.normal_(self.pixels, std=std)

    def forward(self, index: Tensor) -> Tensor:
        return self.pixels[index]


@MODELS.register("shared_pattern", version=1, paper="https://arxiv.org/abs/2408.06927", image=(1, 8, 8))
class SharedPattern(nn.Module):
    """Adds one learnt pattern to every image of every class (the compensator of INFER, Zhang et al. 2024).

    out = image + pattern, in normalised space; the pattern starts at 0. Images of all classes update it jointly, so
    that it represents what the classes share (https://arxiv.org/abs/2408.06927, ICLR 2025). One parameter, `pattern`,
    (1, *image_shape).

    Shape:
        (batch, *image_shape) -> the same.

    Args:
        input_shape: shape of one image; injected.

    Example (recipe):
        models: {shifted: {model: shared_pattern, input: train.image}}
    """

    def __init__(self, input_shape: tuple[int, ...] = (1, 8, 8)) -> None:
        super().__init__()
        self.pattern = nn.Parameter(torch.zeros(1, *_check_image_shape(input_shape, "shared_pattern")))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.pattern


@MODELS.register("affine_augmentor", version=1, paper="https://arxiv.org/abs/2305.14890", image=(1, 8, 8))
class AffineAugmentor(nn.Module):
    """Learnt augmentation of each image within bounds: affine transform, brightness and contrast.

    For HARD (Nix, Burg and Sinz 2023, https://arxiv.org/abs/2305.14890), whose augmentors range from spatial transforms
    to a variational autoencoder. The paper's networks are not reproduced: here a small convolutional network predicts
    seven numbers per image, tanh times the bounds below limits them, and the image is resampled (bilinear, border
    padding; Jaderberg et al. 2015, https://arxiv.org/abs/1506.02025). The last layer starts at zero, so that the
    initial augmentation is the identity; with all bounds at 0 it stays the identity.

    Feature: `settings` (batch, 7), before tanh: rotation, shift in x and y, log scale, shear, brightness, contrast.
    6 thousand parameters with one input channel.

    Shape:
        (batch, channels, height, width) -> the same.

    Args:
        in_channels: channels of the image; injected.
        width: channels of the predicting network.
        rotation: maximum angle in degrees.
        shift: maximum shift, as a fraction of the image's height and width.
        scale: maximum relative change of size: 0.2 allows factors from 1 / 1.2 to 1.2.
        shear: maximum shear, a tangent.
        brightness: maximum value added to all pixels, in units of the normalised image.
        contrast: maximum relative change of the distance from the image's mean, as `scale`.

    Example (recipe):
        models: {augmentor: {model: affine_augmentor}}
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
            raise ConfigError(f"affine_augmentor: every bound must be at least 0, got {bounds}")
        log_scale, log_contrast = math.log1p(scale), math.log1p(contrast)
        # A shift is doubled, because the coordinates of `grid_sample` run from -1 to 1.
        limits = (math.radians(rotation), 2 * shift, 2 * shift, log_scale, shear, brightness, log_contrast)
        self.limits = limits
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
        angle, shift_x, shift_y, log_scale, shear, brightness, log_contrast = (
            raw[:, i] * limit for i, limit in enumerate(self.limits)
        )
        # Source position of each output pixel: rotation x shear x scale, then the shift.
        cos, sin, scale = angle.cos(), angle.sin(), log_scale.exp()
        row_x = torch.stack([cos * scale, (shear * cos - sin) * scale, shift_x], dim=1)
        row_y = torch.stack([sin * scale, (shear * sin + cos) * scale, shift_y], dim=1)
        matrix = torch.stack([row_x, row_y], dim=1)
        grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
        warped = F.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)
        mean = warped.mean(dim=(1, 2, 3), keepdim=True)
        contrast = log_contrast.exp()[:, None, None, None]
        return mean + (warped - mean) * contrast + brightness[:, None, None, None]


def _check_image_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Returns channels, height and width.

    Raises:
        ConfigError: the shape is not that of an image.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"{name}: image_shape must be channels, height and width, got {list(shape)}")
    channels, height, width = shape
    return channels, height, width
