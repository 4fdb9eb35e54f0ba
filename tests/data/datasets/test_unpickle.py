"""The restricted unpickler reads images and labels and runs nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kdbench.data.datasets.unpickle import load_pickle


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_reads_what_cifar_holds(tmp_path, protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(2, 6), "labels": [1, 2], "names": ["a", "b"], "note": "x"}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol == 5:  # arrays travel by another constructor there, which torchvision's files never use
        with pytest.raises(pickle.UnpicklingError):
            load_pickle(path)
        return
    found = load_pickle(path)
    assert np.array_equal(found.pop("data"), content.pop("data"))
    assert found == content


class _System:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class _Open:
    def __reduce__(self):
        return open, ("harmed", "w")


class _Codec:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("x", "rot13")


@pytest.mark.parametrize("harm", [_System(), _Open(), _Codec(), {"data": [_System()]}])
def test_refuses_whatever_could_do_harm(tmp_path, harm):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(harm, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match=r"no place among images|not allowed"):
        load_pickle(path)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": [1, 2]})[:-4]])
def test_damaged_pickles_are_unpickling_errors(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        load_pickle(path)
