"""Random streams: every random number is a function of (seed, stream, key), and not of earlier random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Stream = Literal["init", "order", "augment", "model", "term", "split"]
"""Names of the streams. They seed the random numbers: a changed name changes every result."""


def derive(seed: int, stream: Stream, *key: int | str) -> int:
    """Returns a 63-bit seed for one key of a stream. Different keys give independent random numbers.

    Args:
        seed: the recipe's seed.
        stream: what the random numbers are used for, such as `init` or `order`.
        key: names and numbers, such as the stage, the epoch or step, and the sample.
    """
    text = "\x1f".join(str(part) for part in (seed, stream, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: Stream, *key: int | str) -> torch.Generator:
    """Returns a CPU generator for one key of a stream. Its random numbers are the same on every machine."""
    import torch

    return torch.Generator().manual_seed(derive(seed, stream, *key))


@contextmanager
def seeded(seed: int, stream: Stream, *key: int | str) -> Generator[None, None, None]:
    """Context manager: seeds torch's global CPU generator for one key of a stream.

    The state of the generator is restored after the block.
    """
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, stream, *key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
