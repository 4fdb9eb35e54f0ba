"""Memory of terms: one stored vector per sample.

Terms with a memory declare the fact `state=True`. The runner then gives them the rows of all processes, so that every
process has the same memory. Otherwise a process would miss, in the next epoch, the rows that another process saw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleBank(nn.Module):
    """Stores one vector per sample of a source, and the step of its last write.

    A module with buffers, so that checkpoints include it. Memory: samples * width floats, 20 MB for CIFAR-100's logits.

    Args:
        samples: size of the source.
        width: elements of a vector.
    """

    values: Tensor
    written_at: Tensor
    num_steps: Tensor

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        self.samples = samples
        # The last row takes the writes of masked rows.
        self.register_buffer("values", torch.zeros(samples + 1, width))
        self.register_buffer("written_at", torch.full((samples + 1,), -1, dtype=torch.int64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the vectors of samples and their age in writes: 0 for the last write, -1 for a sample never written.

        Args:
            index: (batch,), int64.
        """
        written_at = self.written_at[index]
        return self.values[index], torch.where(written_at < 0, -1, self.num_steps - written_at)

    def write(self, index: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Stores the vectors of the valid rows.

        Args:
            index: (batch,), int64.
            values: (batch, width).
            mask: bool (batch,), False for rows that are not stored.
        """
        values = values.detach().to(self.values.dtype)
        if mask is not None:
            # A padded row may repeat the index of a valid one: write it to the extra row.
            index = torch.where(mask, index, self.samples)
            values = torch.where(mask.unsqueeze(1), values, 0)
        self.num_steps += 1
        self.values[index] = values
        self.written_at[index] = self.num_steps.expand(index.shape)
        self.written_at[self.samples :].fill_(-1)  # the extra row counts as never written
