"""What terms with a memory share: a table with a row per sample, equal on all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def of_all_processes(rows: Tensor) -> Tensor:
    """Returns the rows of all processes, in rank order, without gradient; all must hold equally many.

    A memory that each process filled from its own rows would differ between them, and after the next epoch's order a
    process would look for rows that another one saw.
    """
    rows = rows.detach()
    if rows.is_meta or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


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
        """Keeps the vectors of all processes' valid rows, one write in all."""
        values = values.detach().to(self.values.dtype)
        if mask is not None:  # padded rows may repeat the index of a real one: they go where nobody reads
            index = torch.where(mask, index, self.samples)
            values = torch.where(mask.unsqueeze(1), values, 0)
        index = of_all_processes(index)
        self.clock += 1
        self.values[index] = of_all_processes(values)
        self.when[index] = self.clock.expand(index.shape)
