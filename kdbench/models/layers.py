"""Small modules that several networks share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.errors import ConfigError


class GlobalAveragePool(nn.Module):
    """Mean over all places: (batch, channels, height, width) -> (batch, channels), for any height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def init_convolutions(model: nn.Module) -> None:
    """Draws every convolution from N(0, 2 / fan_out) with zero bias (He et al. 2015); norms start as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def pooled_size(shape: tuple[int, ...], name: str) -> int:
    """How many values `as_vector` leaves of one sample of this shape."""
    if len(shape) not in (1, 2, 3):
        raise ConfigError(f"{name}: reads vectors, tokens or maps, got a feature of {list(shape)}")
    return shape[-1] if len(shape) == 2 else shape[0]


def pool_to_vector(feature: Tensor) -> Tensor:
    """One vector per sample: a map averaged over its places, tokens over their number, a vector as it is."""
    if feature.dim() == 4:
        return feature.mean(dim=(2, 3))
    return feature.mean(dim=1) if feature.dim() == 3 else feature


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself: (batch, tokens, dim) -> (batch, tokens, dim).

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. Every weight belongs to an `nn.Linear` (`qkv`, `proj`), so
    that transforms of weights reach it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, dim = tokens.shape
        parts = self.qkv(tokens).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class TransformerBlock(nn.Module):
    """LayerNorm and attention, then LayerNorm and two linear layers, each added to what came in: a block of ViT."""

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
