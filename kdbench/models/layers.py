"""Modules and functions that several networks share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError


class GlobalAveragePool(nn.Module):
    """Mean over all positions: (batch, channels, height, width) -> (batch, channels), for any height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def init_convolutions(model: nn.Module) -> None:
    """Initialises convolutions (weights from N(0, 2 / fan_out), biases 0; He et al. 2015) and BatchNorms (identity).

    The random numbers are drawn in the order of `model.modules()`.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def pooled_size(shape: tuple[int, ...], name: str) -> int:
    """Returns the length of the vectors that `pool_to_vector` computes from a feature.

    Args:
        shape: shape of the feature per sample.
        name: name of the model in the error message.

    Raises:
        ConfigError: `shape` is not the shape of a vector, a token sequence or a feature map.
    """
    if len(shape) not in (1, 2, 3):
        raise ConfigError(
            f"{name}: the input must be a vector, tokens or a feature map, got shape {list(shape)} per sample"
        )
    return shape[-1] if len(shape) == 2 else shape[0]


def pool_to_vector(feature: Tensor) -> Tensor:
    """Averages a feature map over its positions, or a token sequence over its tokens. Vectors are returned unchanged.

    Shape:
        (batch, channels, height, width) -> (batch, channels), (batch, tokens, dim) -> (batch, dim), (batch, values)
        -> the same shape.
    """
    if feature.dim() == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.dim() == 3 else feature


class SelfAttention(nn.Module):
    """Multi-head self-attention: (batch, tokens, dim) -> (batch, tokens, dim).

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. All weights belong to `nn.Linear` modules (`qkv`, `proj`),
    so that weight transforms (quantisation, pruning) apply to these weights.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(values.transpose(1, 2).reshape(batch, length, dim))


class TransformerBlock(nn.Module):
    """Pre-norm block of ViT: self-attention and a two-layer MLP, each with LayerNorm and a residual connection.

    Args:
        dim: token dimension.
        heads: number of attention heads.
        ratio: hidden width of the MLP relative to `dim`.

    Shape:
        (batch, tokens, dim) -> the same shape.
    """

    def __init__(self, dim: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))
