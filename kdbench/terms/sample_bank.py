"""Memory of terms: one stored vector per sample of the training data.

Terms with a memory are registered with `state=True`. In distributed training, the training loop then gives each
process the rows of all processes, so that every process has the same memory. Otherwise a process would miss, in the
next epoch, the vectors of rows that another process trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleBank(nn.Module):
    """Memory with one vector per sample of a dataset, and the step in which each vector was last written.

    The memory is a module with buffers, so that checkpoints include it. It has samples * width floats: 20 MB for the
    logits of CIFAR-100.

    Args:
        samples: number of samples of the dataset.
        width: number of elements of each vector.
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
        """Returns the stored vectors of some samples, and the age of each vector.

        Args:
            index: numbers of the samples, (batch,), int64.

        Returns:
            Vectors (batch, width); and ages (batch,), int64. The age is the number of calls of `write` since the vector
            was written: 0 for a vector from the last call. It is -1 for a sample without a stored vector.
        """
        written_at = self.written_at[index]
        return self.values[index], torch.where(written_at < 0, -1, self.num_steps - written_at)

    def write(self, index: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Stores the vectors of the valid rows.

        Args:
            index: number of the sample of each row, (batch,), int64.
            values: vector of each row, (batch, width).
            mask: bool (batch,), False for rows that are not stored. None: all rows are stored.
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
