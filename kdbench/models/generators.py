"""Networks that produce images: from noise, from an index, or from another image."""

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
    https://arxiv.org/abs/1905.09768) use the same network. The layers follow the released code of both papers:

    1. a linear layer to a map with `width` channels and a quarter of the image's height and width, and BatchNorm;
    2. two blocks of nearest-neighbour upsampling by 2, 3x3 convolution, BatchNorm and leaky ReLU of slope 0.2; the
       first block has `width` channels, the second width / 2;
    3. a 3x3 convolution to the channels of the image, an optional tanh, and BatchNorm.

    DAFL ends with tanh and a BatchNorm without affine parameters (the defaults). ZSKT ends with an affine BatchNorm
    and no tanh (`tanh: false, affine: true`). The last BatchNorm gives images of mean 0 and standard deviation 1 per
    channel, like the normalised images on which the teacher was trained.

    Feature: `blocks`, the map before the last convolution. The network has 256 thousand parameters for 1x8x8 images
    from 64 noise values, and 22 thousand with `width: 32`.

    Shape:
        (batch, latent) -> (batch, channels, height, width).

    Args:
        input_shape: shape of the noise per sample (injected by kdbench).
        image_shape: shape of the generated image. Height and width must be multiples of 4. kdbench injects the shape of
            the images that the evaluation uses.
        width: channels of the first map, an even number (128 in both papers).
        tanh: whether tanh bounds the image before the last BatchNorm.
        affine: whether the last BatchNorm learns a scale and a shift.
        eps: eps of the two BatchNorms in `blocks` (0.8 in the released code of DAFL, 1e-5 in the code of ZSKT).

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
    """Images whose pixels are trained (DeepInversion, Yin et al. 2020, https://arxiv.org/abs/1912.08795).

    The input is the number of each image in the bank, for example the field `noise.index`. Losses on the images train
    the pixels. The pixel values are normalised like the teacher's input and start from N(0, std^2). The only
    parameter is `pixels`, (samples, *image_shape).

    Shape:
        image numbers (batch,), int64 -> images (batch, *image_shape).

    Args:
        image_shape: shape of one image. kdbench injects the shape of the images that the evaluation uses.
        samples: number of images in the bank. The image numbers in the input must be below `samples`.
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
    """Learnt pattern that is added to every image of every class (the compensator of INFER, Zhang et al. 2024).

    out = image + pattern

    The images are normalised, and the pattern starts at 0. Images of all classes train the pattern jointly, so that
    the pattern represents the common features of the classes (https://arxiv.org/abs/2408.06927, ICLR 2025). The only
    parameter is `pattern`, (1, *image_shape).

    Shape:
        (batch, *image_shape) -> the same shape.

    Args:
        input_shape: shape of one image (injected by kdbench).

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

    HARD (Nix, Burg and Sinz 2023, https://arxiv.org/abs/2305.14890) needs a learnt augmentation. The networks of the
    paper range from spatial transforms to a variational autoencoder and are not reproduced. Instead, a small
    convolutional network predicts seven numbers per image: rotation, shift in x and y, log scale, shear, brightness
    and log contrast. A tanh times a bound limits each number. The image is then resampled (bilinear, border padding;
    Jaderberg et al. 2015, https://arxiv.org/abs/1506.02025). The last layer of the network is initialised with zeros,
    so that the initial augmentation is the identity. With all bounds at 0, the augmentation stays the identity.

    Feature: `settings` (batch, 7), the predicted numbers before tanh. The network has 6 thousand parameters with one
    input channel.

    Shape:
        (batch, channels, height, width) -> the same shape.

    Args:
        in_channels: channels of the image (injected by kdbench).
        width: channels of the first convolution. The second convolution has twice as many channels.
        rotation: maximum angle in degrees.
        shift: maximum shift, as a fraction of the image's height and width.
        scale: maximum relative change of size: 0.2 allows factors from 1 / 1.2 to 1.2.
        shear: maximum shear, as the tangent of the angle.
        brightness: maximum value added to all pixels, in units of the normalised image.
        contrast: maximum relative change of the contrast: 0.2 multiplies the deviations from the image's mean by a
            factor from 1 / 1.2 to 1.2.

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
            raise ConfigError(f"affine_augmentor: all bounds must be at least 0, got {bounds}")
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
    """Returns channels, height and width of an image shape.

    Raises:
        ConfigError: `shape` is not a shape of three numbers of at least 1.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"{name}: image_shape must be channels, height and width, each at least 1, got {list(shape)}")
    channels, height, width = shape
    return channels, height, width
