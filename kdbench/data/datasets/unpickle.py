"""Reads the pickles of CIFAR without running what a stranger may have put into them."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into a protocol-2 pickle; no other codec is let through."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return codecs.encode(text, "latin1")


_reconstruct = np.empty(0).__reduce__()[0]  # numpy has moved it between modules


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which has no place among images and labels")
        return _ALLOWED[module, name]


def load_pickle(path: Path) -> Any:
    """Returns the dictionaries, lists, numbers, strings and arrays of a pickle.

    Raises:
        pickle.UnpicklingError: it holds anything else, or is no pickle.
    """
    with path.open("rb") as handle:
        try:
            return _Restricted(handle, encoding="latin1").load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # damaged pickles fail in any way
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
