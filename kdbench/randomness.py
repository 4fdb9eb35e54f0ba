"""Every draw is a function of (seed, stream, epoch or step, sample), never of what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Stream = Literal["init", "order", "augment", "model", "term", "split"]


def derive(seed: int, stream: Stream, *key: int | str) -> int:
    """Returns a 63-bit seed for one draw. Different keys give independent streams."""
    text = "\x1f".join(str(part) for part in (seed, stream, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: Stream, *key: int | str) -> torch.Generator:
    """Returns a CPU generator at the start of one stream; CPU draws are the same on every machine."""
    import torch

    return torch.Generator().manual_seed(derive(seed, stream, *key))


@contextmanager
def seeded(seed: int, stream: Stream, *key: int | str) -> Generator[None, None, None]:
    """Runs a block under torch's global CPU generator seeded for one stream, and puts the old state back."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, stream, *key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
