"""Tensors on the meta device: shapes without memory. Batches for the dry run, and its errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kdbench.data.loading.batch import Batch
from kdbench.data.source_spec import SourceSpec
from kdbench.errors import ConfigError

META = torch.device("meta")


DRY_RUN_ROWS = 2
"""Rows of a batch in the dry run: BatchNorm rejects a batch of one row in training mode."""


def meta_field(spec: SourceSpec, name: str, rows: int, device: torch.device) -> Tensor:
    """Returns a field of a source with the right shape and dtype, filled with zeros."""
    shape, dtype = spec.fields[name]
    return torch.zeros((rows, *shape), dtype=getattr(torch, dtype), device=device)


def meta_batch(
    specs: Mapping[str, SourceSpec], rows: Mapping[str, int], device: torch.device = META
) -> dict[str, Batch]:
    """Returns a micro-batch with the right shapes and dtypes, filled with zeros.

    Args:
        specs: source -> its fields.
        rows: source -> number of rows; sources that are not in it are left out.
        device: `meta`, or the CPU for models that cannot be built on meta.
    """
    return {
        source: Batch({name: meta_field(spec, name, rows[source], device) for name in spec.fields})
        for source, spec in specs.items()
        if source in rows
    }


@contextmanager
def failures_as_config_errors(context: str) -> Iterator[None]:
    """Converts the failure of a model or a term on the dry run's shapes to an error of the recipe.

    Args:
        context: prefix of the message: location, and the part that fails.

    Raises:
        ConfigError: instead of the RuntimeError, ValueError, TypeError, IndexError or KeyError that the block raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " A training step must not read the value of a tensor on the host." if "meta" in reason else ""
        raise ConfigError(f"{context}: {type(error).__name__}: {reason}{hint}") from error
