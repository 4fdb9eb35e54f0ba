"""The restricted unpickler reads images and labels, and executes no code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kdbench.data.datasets.unpickle import load_pickle


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_content_of_cifar_files_is_read(tmp_path, protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(2, 6), "labels": [1, 2], "names": ["a", "b"], "note": "x"}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol == 5:  # it pickles arrays by another constructor, which torchvision's files never use
        with pytest.raises(pickle.UnpicklingError):
            load_pickle(path)
        return
    loaded = load_pickle(path)
    assert np.array_equal(loaded.pop("data"), content.pop("data"))
    assert loaded == content


class _CallsSystem:
    def __reduce__(self):
        return os.system, ("touch executed",)


class _OpensFile:
    def __reduce__(self):
        return open, ("executed", "w")


class _UsesCodec:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("x", "rot13")


@pytest.mark.parametrize("content", [_CallsSystem(), _OpensFile(), _UsesCodec(), {"data": [_CallsSystem()]}])
def test_pickle_with_code_is_rejected_and_not_executed(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        load_pickle(path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": [1, 2]})[:-4]])
def test_damaged_pickle_raises_an_unpickling_error(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        load_pickle(path)
