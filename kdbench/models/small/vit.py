"""Small vision transformers and masked autoencoders: Dosovitskiy et al. 2020, He et al. 2021.

`digits_vit` classifies images (https://arxiv.org/abs/2010.11929). `masked_vit` is a masked autoencoder
(https://arxiv.org/abs/2111.06377). The encoder of `masked_vit` has the modules of `digits_vit`, so that a later
training of `digits_vit` can load the weights of the encoder (`strict: false`).

The second input of `masked_vit` contains one score per patch. The network encodes the `visible` patches with the
lowest scores. Their number is fixed, so that shapes do not depend on values. Random scores give random masks. A
boolean mask (True: hidden) with the right number of hidden patches is also a valid input. Two networks that read the
same scores encode the same patches, as in Masked Autoencoders Enable Efficient Knowledge Distillers (DMAE,
https://arxiv.org/abs/2208.12256). In the following recipe, `mask.z` is random noise, one number per patch:

    student: {model: {type: masked_vit, visible: 4}, input: [train.image, mask.z]}
    teacher: {model: {type: masked_vit, visible: 4, dim: 64, depth: 8}, input: [train.image, mask.z]}
    models: {target: {model: {type: hidden_patches, visible: 4}, input: [train.image, mask.z], frozen: true}}

Features of `digits_vit` and `masked_vit` for n encoded patches: the outputs of `blocks.0`, `blocks.1`, ... and of the
last LayerNorm `norm`. Each has shape (n + 1) x dim. The class token is the first token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.layers import TransformerBlock
from kdbench.registry import MODELS


class ViTEncoder(nn.Module):
    """ViT encoder: patch embedding, fixed position embedding, class token, transformer blocks and LayerNorm.

    Args:
        name: name of the model in error messages.
        image: channels, height and width.
        patch: height and width of a patch.
        dim: token dimension, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads of each block.
    """

    def __init__(self, name: str, image: tuple[int, int, int], patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        channels = image[0]
        rows, columns = patch_grid(name, image, patch)
        if heads < 1 or dim < 4 or dim % 4 or dim % heads:
            raise ConfigError(f"{name}: dim must be a multiple of 4 and of heads, got dim {dim} and heads {heads}")
        if depth < 1:
            raise ConfigError(f"{name}: depth must be at least 1, got {depth}")
        self.num_patches = rows * columns
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(rows, columns, dim)[None])
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # like the equivalent linear layer
        init_linear_layers(self)

    def encode(self, image: Tensor, patch_index: Tensor | None = None) -> Tensor:
        """Computes the output tokens of the encoder for all patches of an image, or for selected patches.

        Args:
            image: images (batch, channels, height, width).
            patch_index: numbers of the patches to encode, int64 (batch, n). None: all patches.

        Returns:
            class token and patch tokens, (batch, 1 + n, dim).
        """
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        if patch_index is not None:
            tokens = tokens.gather(1, patch_index[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


@MODELS.register("digits_vit", version=1, paper="https://arxiv.org/abs/2010.11929", image=(1, 8, 8))
class DigitsViT(ViTEncoder):
    """Small vision transformer for small images, 51 thousand parameters.

    The position embedding is the fixed sine-cosine embedding of MAE. The classifier `fc` reads the class token after
    the last LayerNorm `norm`. Feature shapes for 16 patches: `blocks.0`, `blocks.1`, ... and `norm`, each 17x32.

    Shape:
        (batch, in_channels, image_size, image_size) -> (batch, num_classes).

    Args:
        num_classes: number of classes of the data (injected by kdbench).
        in_channels: channels of the image (injected by kdbench).
        image_size: height and width of the image (injected by kdbench).
        patch: height and width of a patch, a divisor of `image_size`.
        dim: token dimension, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads of each block.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        patch: int = 2,
        dim: int = 32,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__("digits_vit", (in_channels, image_size, image_size), patch, dim, depth, heads)
        self.fc = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.encode(image)[:, 0])


@MODELS.register("masked_vit", version=1, paper="https://arxiv.org/abs/2111.06377")
class MaskedViT(ViTEncoder):
    """Masked autoencoder (MAE): encodes `visible` patches of an image and predicts the pixels of the hidden patches.

    The method is that of He et al. 2021, with the encoder of `digits_vit`. The decoder inserts a learnt mask token
    for each hidden patch, adds a position embedding and applies `decoder_depth` blocks. Its last layer,
    `decoder_pred`, predicts the pixels. The output contains the hidden patches only, in the order of their positions.
    The target is the output of the model `hidden_patches`; the mean squared error between output and target is the
    loss of MAE. The network has 65 thousand parameters.

    Feature shapes for 4 visible patches of 16: `blocks.0`, `blocks.1`, ... and `norm`, each 5x32; `decoder_pred`
        12x4.

    Shape:
        image (batch, in_channels, image_size, image_size), scores (batch, patches) -> (batch, patches - visible,
        patch^2 * in_channels).

    Args:
        in_channels: channels of the image (injected by kdbench).
        image_size: height and width of the image (injected by kdbench).
        visible: number of encoded patches. The patches with the lowest scores are encoded. With 4 of 16 patches, 75
            percent are hidden, as in MAE.
        patch: height and width of a patch, a divisor of `image_size`.
        dim: token dimension of the encoder, a multiple of 4 and of `heads`.
        depth: number of encoder blocks.
        heads: number of attention heads of each block.
        decoder_dim: token dimension of the decoder, a multiple of 4 and of `heads`.
        decoder_depth: number of decoder blocks.

    Example (recipe):
        student: {model: {type: masked_vit, visible: 4}, input: [image, mask.z]}
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        visible: int = 4,
        patch: int = 2,
        dim: int = 32,
        depth: int = 4,
        heads: int = 4,
        decoder_dim: int = 32,
        decoder_depth: int = 1,
    ) -> None:
        image = (in_channels, image_size, image_size)
        super().__init__("masked_vit", image, patch, dim, depth, heads)
        rows, columns = patch_grid("masked_vit", image, patch)
        self.visible = check_visible("masked_vit", visible, self.num_patches)
        if decoder_dim < 4 or decoder_dim % 4 or decoder_dim % heads or decoder_depth < 1:
            raise ConfigError(
                f"masked_vit: decoder_dim must be a multiple of 4 and of heads ({heads}), decoder_depth at least 1, "
                f"got decoder_dim {decoder_dim} and decoder_depth {decoder_depth}"
            )
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(rows, columns, decoder_dim)[None])
        self.decoder_blocks = nn.ModuleList(TransformerBlock(decoder_dim, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * in_channels)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_linear_layers(module)

    def forward(self, image: Tensor, scores: Tensor) -> Tensor:
        visible, hidden = split_patches(scores, self.visible)
        encoded = self.decoder_embed(self.encode(image, visible))
        visible_tokens = encoded[:, 1:] + self._decoder_positions(visible)
        hidden_tokens = self.mask_token + self._decoder_positions(hidden)
        # Attention is equivariant to the order of the tokens, so they need not be sorted by position.
        tokens = torch.cat([encoded[:, :1], visible_tokens, hidden_tokens], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, 1 + self.visible :]))

    def _decoder_positions(self, patch_index: Tensor) -> Tensor:
        positions = self.get_buffer("decoder_pos_embed").expand(len(patch_index), -1, -1)
        return positions.gather(1, patch_index[:, :, None].expand(-1, -1, positions.shape[2]))


@MODELS.register("hidden_patches", version=1, paper="https://arxiv.org/abs/2111.06377")
class HiddenPatchPixels(nn.Module):
    """Pixels of the hidden patches of an image: the target for the masked autoencoder `masked_vit`.

    The patches are in the order of their positions. Each patch is flattened row by row, and the channels of a pixel
    are next to each other. The module has no parameters.

    Shape:
        image (batch, in_channels, image_size, image_size), scores (batch, patches) -> (batch, patches - visible,
        patch^2 * in_channels).

    Args:
        in_channels: channels of the image (injected by kdbench).
        image_size: height and width of the image (injected by kdbench).
        visible: number of visible patches, equal to `visible` of the `masked_vit`.
        patch: height and width of a patch, equal to `patch` of the `masked_vit`.
        standardise: whether to standardise the pixels of each patch to mean 0 and standard deviation 1. MAE has its
            best results with this option.

    Example (recipe):
        models: {target: {model: {type: hidden_patches, visible: 4}, input: [image, mask.z], frozen: true}}
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        visible: int = 4,
        patch: int = 2,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        rows, columns = patch_grid("hidden_patches", (in_channels, image_size, image_size), patch)
        self.visible = check_visible("hidden_patches", visible, rows * columns)
        self.patch = patch
        self.standardise = standardise

    def forward(self, image: Tensor, scores: Tensor) -> Tensor:
        _, hidden = split_patches(scores, self.visible)
        grid = image.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        pixels = patches.gather(1, hidden[:, :, None].expand(-1, -1, patches.shape[2]))
        if not self.standardise:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()


def split_patches(scores: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Returns the positions of the `visible` patches with the lowest scores, and the positions of the hidden patches.

    Among patches of equal score, those at earlier positions become visible first.

    Args:
        scores: scores (batch, patches), or a map (batch, ...) with one value per patch.
        visible: number of visible patches.

    Returns:
        visible positions (batch, visible) and hidden positions (batch, patches - visible), int64, in ascending order.
    """
    order = scores.flatten(1).to(torch.float32).argsort(dim=1, stable=True)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Computes the sine-cosine position embedding of a grid of patches, (rows * columns, dim).

    The first half of each embedding encodes the column of the patch, the second half the row.
    """
    quarter = dim // 4
    frequencies = torch.exp(torch.arange(quarter) * (-math.log(10000) / quarter))
    embeddings = []
    for length in (columns, rows):
        angles = torch.arange(length)[:, None] * frequencies
        embeddings.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    by_column, by_row = embeddings
    halves = [by_column[None].expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)]
    return torch.cat(halves, dim=2).flatten(0, 1)


def patch_grid(name: str, image: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """Returns the number of rows and the number of columns of the patch grid of an image.

    Args:
        name: name of the model in the error message.
        image: channels, height and width of the image.
        patch: height and width of a patch.

    Raises:
        ConfigError: `patch` does not divide height and width of the image.
    """
    _, height, width = image
    if patch < 1 or height % patch or width % patch:
        raise ConfigError(f"{name}: patch must divide the image's height and width ({height}x{width}), got {patch}")
    return height // patch, width // patch


def check_visible(name: str, visible: int, patches: int) -> int:
    """Returns `visible` if at least one patch is visible and at least one patch is hidden.

    Raises:
        ConfigError: no patch would be visible, or no patch would be hidden.
    """
    if not 0 < visible < patches:
        raise ConfigError(
            f"{name}: visible must be from 1 to {patches - 1}, because the image has {patches} patches, got {visible}"
        )
    return visible


def init_linear_layers(module: nn.Module) -> None:
    """Initialises all linear layers with Xavier-uniform weights and zero bias, as MAE and the JAX code of ViT do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
