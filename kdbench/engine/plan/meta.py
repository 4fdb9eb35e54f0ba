"""Meta tensors, which have shapes but no memory: batches for the dry run of a step, and errors of the dry run."""

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
    """Returns a zero tensor with the shape and dtype of a field (such as `image`) in a batch of a source."""
    shape, dtype = spec.fields[name]
    return torch.zeros((rows, *shape), dtype=getattr(torch, dtype), device=device)


def meta_batch(
    specs: Mapping[str, SourceSpec], rows: Mapping[str, int], device: torch.device = META
) -> dict[str, Batch]:
    """Returns a micro-batch of zero tensors with the shapes and dtypes of the sources' fields.

    Args:
        specs: source -> specification of its fields.
        rows: source -> number of rows. Sources that are not in `rows` are left out of the micro-batch.
        device: `meta`, or the CPU for models that cannot be built on the meta device.
    """
    return {
        source: Batch({name: meta_field(spec, name, rows[source], device) for name in spec.fields})
        for source, spec in specs.items()
        if source in rows
    }


@contextmanager
def failures_as_config_errors(context: str) -> Iterator[None]:
    """Context manager: converts an exception of a model or a term in the dry run to a ConfigError.

    Args:
        context: prefix of the message, with the location in the recipe and the failing model or term.

    Raises:
        ConfigError: the block raised a RuntimeError, ValueError, TypeError, IndexError or KeyError.
    """
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " A training step must not read the value of a tensor on the host." if "meta" in reason else ""
        raise ConfigError(f"{context}: {type(error).__name__}: {reason}{hint}") from error
