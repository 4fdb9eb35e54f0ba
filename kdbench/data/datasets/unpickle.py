"""Reads the pickle files of CIFAR without executing code that they may contain."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Encodes text as latin-1. Pickles of protocol 2 create bytes with this function. Other encodings are rejected."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return codecs.encode(text, "latin1")


_reconstruct = np.empty(0).__reduce__()[0]  # its module depends on the version of numpy


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
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed in a file of images")
        return _ALLOWED[module, name]


def load_pickle(path: Path) -> Any:
    """Reads a pickle file that contains only dictionaries, lists, numbers, strings and arrays.

    Raises:
        pickle.UnpicklingError: the file contains an object of another type, or is not a pickle.
    """
    with path.open("rb") as handle:
        try:
            return _Restricted(handle, encoding="latin1").load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a damaged pickle raises any type
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
