"""What terms with a memory share: a table with a row per sample.

Terms that remember declare the fact `state=True`: the runner then gives them the rows of all processes, so that the
memory of each is the same. Otherwise a process would look in the next epoch for rows that another one saw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleBank(nn.Module):
    """Keeps a vector per sample of a source, and when it was last written. In the checkpoint like any buffer.

    Memory: samples * width floats, 20 MB for CIFAR-100's logits. One row more than samples takes what must not be kept.
    """

    values: Tensor
    when: Tensor
    clock: Tensor

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        self.samples = samples
        self.register_buffer("values", torch.zeros(samples + 1, width))
        self.register_buffer("when", torch.full((samples + 1,), -1, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the vectors of these samples, and how many writes ago each was written: 0 the last, -1 never."""
        when = self.when[index]
        return self.values[index], torch.where(when < 0, -1, self.clock - when)

    def write(self, index: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Keeps the vectors of the valid rows."""
        values = values.detach().to(self.values.dtype)
        if mask is not None:  # padded rows may repeat the index of a real one: they go where nobody reads
            index = torch.where(mask, index, self.samples)
            values = torch.where(mask.unsqueeze(1), values, 0)
        self.clock += 1
        self.values[index] = values
        self.when[index] = self.clock.expand(index.shape)
        self.when[self.samples :].fill_(-1)  # the row that takes what is not kept is never written
