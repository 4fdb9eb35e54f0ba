"""The meta device, where tensors have shapes but no memory: batches of it, and failures on it in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.operands import Batch
from kdbench.errors import ConfigError

META = torch.device("meta")


DRY_RUN_ROWS = 2  # of the rehearsal's batch: BatchNorm refuses one


def meta_field(spec: SourceSpec, name: str, rows: int, device: torch.device) -> Tensor:
    """A field of a source, with nothing in it."""
    shape, dtype = spec.fields[name]
    return torch.zeros((rows, *shape), dtype=getattr(torch, dtype), device=device)


def meta_batch(specs: Mapping[str, SourceSpec], rows: Mapping[str, int], device: torch.device = META) -> Batch:
    """A batch of the right shapes and types, with nothing in it."""
    return {
        source: {name: meta_field(spec, name, rows.get(source, DRY_RUN_ROWS), device) for name in spec.fields}
        for source, spec in specs.items()
        if source in rows
    }


@contextmanager
def failures_as_config_errors(context: str) -> Iterator[None]:
    """Turns the failure of a model or a term on the rehearsal's shapes into the recipe's fault."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " Nothing in a training step may read a tensor's value on the host." if "meta" in reason else ""
        raise ConfigError(f"{context}: {type(error).__name__}: {reason}{hint}") from error
