"""Small vision transformers, whole or with only some patches seen: Dosovitskiy et al. 2020, He et al. 2021.

`digits_vit` classifies images (https://arxiv.org/abs/2010.11929). `masked_vit` is a masked autoencoder
(https://arxiv.org/abs/2111.06377): its encoder has the modules of `digits_vit`, so that a later stage takes the weights
of the encoder (`strict: false`). Its second input ranks the patches: those with the lowest scores are seen, always as
many as `visible` says, so that shapes never depend on values. Noise of the shape [patches] gives random masks; a
boolean mask (true: hidden) with the right number of hidden patches gives itself. Two networks on one such field see the
same patches: Masked Autoencoders Enable Efficient Knowledge Distillers (DMAE, https://arxiv.org/abs/2208.12256).

    student: {model: {type: masked_vit, visible: 4}, input: [train.image, mask.z]}
    teacher: {model: {type: masked_vit, visible: 4, dim: 64, depth: 8}, input: [train.image, mask.z]}
    models: {target: {model: {type: hidden_patches, visible: 4}, input: [train.image, mask.z], frozen: true}}

Features of both, for n patches that are seen: `blocks.0`, `blocks.1`... (n + 1) x dim, the class token first, and
`norm`, the same after the last LayerNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdbench.errors import ConfigError
from kdbench.models.layers import TransformerBlock
from kdbench.registry import MODELS


class ViTEncoder(nn.Module):
    """Patches, fixed positions, a class token, and `depth` transformer blocks."""

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
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # as the linear layer that it is
        init_linear_layers(self)

    def encode(self, image: Tensor, patch_index: Tensor | None = None) -> Tensor:
        """Returns (batch, 1 + patches, dim); only the patches `kept`, int64 (batch, n), where it is given."""
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        if patch_index is not None:
            tokens = tokens.gather(1, patch_index[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


@MODELS.register("digits_vit", version=1, paper="https://arxiv.org/abs/2010.11929", image=(1, 8, 8))
class DigitsViT(ViTEncoder):
    """A small vision transformer for small images, 51 thousand parameters. Features: blocks.0, blocks.1..., norm.

    As ViT, with the fixed sine and cosine positions of MAE. The classifier `fc` reads the class token after `norm`.

    Args:
        num_classes, in_channels, image_size: of the data; the engine gives them.
        patch: height and width of a patch; it must divide the image's.
        dim: length of a token.
        depth: number of blocks.
        heads: of each block's attention; they must divide `dim`.
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
    """A masked autoencoder: encodes `visible` patches of an image and predicts the pixels of the hidden ones.

    MAE (He et al. 2021), with the encoder of `digits_vit`. The decoder puts a learnt token at each hidden place, adds
    positions again, and runs `decoder_depth` blocks of its own; `decoder_pred` gives pixels. The output holds the
    hidden patches alone, in the order of their places, to be compared with that of `hidden_patches`: the mean squared
    difference is MAE's loss.

    Shapes: images and scores (batch, patches) -> (batch, patches - visible, patch^2 * channels).

    Args:
        in_channels, image_size: of the data; the engine gives them.
        visible: how many patches are seen: those with the lowest scores. 4 of 16 hide three quarters, as MAE does.
        patch, dim, depth, heads: of the encoder, as of `digits_vit`.
        decoder_dim, decoder_depth: of the decoder.
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
                "masked_vit: decoder_dim must be a multiple of 4 and of heads, and decoder_depth at least 1, got "
                f"{decoder_dim} and {decoder_depth}"
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
        kept, hidden = split_patches(scores, self.visible)
        seen = self.decoder_embed(self.encode(image, kept))
        seen_places = self._decoder_positions(kept)
        blank = self.mask_token + self._decoder_positions(hidden)
        # Attention does not mind the order of its tokens: class token, what was seen, what was not.
        tokens = torch.cat([seen[:, :1], seen[:, 1:] + seen_places, blank], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, 1 + self.visible :]))

    def _decoder_positions(self, index: Tensor) -> Tensor:
        table = self.get_buffer("decoder_pos_embed").expand(len(index), -1, -1)
        return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))


@MODELS.register("hidden_patches", version=1, paper="https://arxiv.org/abs/2111.06377")
class HiddenPatchPixels(nn.Module):
    """The pixels that `masked_vit` has to predict: those of the hidden patches, in the order of their places.

    Without parameters. Each patch holds its pixels row by row, the channels of a pixel side by side.

    Shapes: images and scores (batch, patches) -> (batch, patches - visible, patch^2 * channels).

    Args:
        in_channels, image_size: of the data; the engine gives them.
        visible, patch: as of the `masked_vit` that is to predict them.
        standardise: subtract each patch's mean and divide by its deviation, as MAE does for its best results.
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
        cut = image.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        pixels = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        chosen = pixels.gather(1, hidden[:, :, None].expand(-1, -1, pixels.shape[2]))
        if not self.standardise:
            return chosen
        variance, mean = torch.var_mean(chosen, dim=2, keepdim=True)
        return (chosen - mean) / (variance + 1e-6).sqrt()


def split_patches(scores: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Returns the places of the `visible` lowest scores and those of the others, int64, each in rising order.

    Equal scores keep the order of their places.
    """
    order = scores.flatten(1).to(torch.float32).argsort(dim=1, stable=True)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Sine and cosine of each patch's column (first half of `dim`) and row (second half), (rows * columns, dim)."""
    quarter = dim // 4
    frequencies = torch.exp(torch.arange(quarter) * (-math.log(10000) / quarter))
    tables = []
    for length in (columns, rows):
        angles = torch.arange(length)[:, None] * frequencies
        tables.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    across, down = tables
    both = [across[None].expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)]
    return torch.cat(both, dim=2).flatten(0, 1)


def patch_grid(name: str, image: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """How many patches stand below and beside each other."""
    _, height, width = image
    if patch < 1 or height % patch or width % patch:
        raise ConfigError(f"{name}: patch must divide the image's height and width ({height}x{width}), got {patch}")
    return height // patch, width // patch


def check_visible(name: str, visible: int, patches: int) -> int:
    """Refuses to show no patch, or to hide none."""
    if not 0 < visible < patches:
        raise ConfigError(f"{name}: visible must be from 1 to {patches - 1} of {patches} patches, got {visible}")
    return visible


def init_linear_layers(module: nn.Module) -> None:
    """Draws every linear layer from Xavier's uniform distribution with zero bias, as MAE and JAX's ViT do."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
