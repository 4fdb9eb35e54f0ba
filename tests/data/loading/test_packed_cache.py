"""The packed cache: decoded once, verified at every load, decoded again when stale or damaged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os

import pytest
import torch

from kdbench.data.datasets.base import content_checksum
from kdbench.data.loading.packed_cache import MAGIC, PackedCache
from kdbench.files import file_lock

CLASSES = ["cat", "dog"]


class Decoder:
    """Returns a split of 6 images and counts its calls."""

    def __init__(self, seed=0):
        self.calls = 0
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(6) % 2

    def __call__(self):
        self.calls += 1
        return self.images, self.labels


def new_cache(folder, fingerprint="f", identity=("x",), classes=CLASSES):
    return PackedCache(folder, "pets-train", list(identity), fingerprint, classes)


def load(folder, decode, **changes):
    return new_cache(folder, **changes).load(decode)


def packed_file(folder):
    (path,) = folder.glob("*.packed")
    return path


def replace_header(path, header: bytes) -> None:
    """Replaces the header by another one with a correct checksum, as only a program could damage it."""
    magic, _, content = path.read_bytes().split(b"\n", 2)
    line = header + b"\n"
    path.write_bytes(magic + b"\n" + hashlib.sha256(line).hexdigest().encode() + b" " + line + content)


def header_entries(path) -> dict:
    line = path.read_bytes().split(b"\n", 2)[1]
    return json.loads(line.partition(b" ")[2])


def assert_reported_and_rewritten(folder, decode, caplog):
    """Loads the right content from a damaged cache, with one notice that names it; the next load reads the new file."""
    path, calls = new_cache(folder).path, decode.calls
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        split = load(folder, decode)
    assert torch.equal(split.images, decode.images) and torch.equal(split.labels, decode.labels)
    assert split.checksum == content_checksum(CLASSES, decode.images, decode.labels)
    assert caplog.text.count(f"The cache {path} is damaged") == 1
    assert torch.equal(load(folder, decode).images, decode.images)
    assert decode.calls == calls + 1


def test_split_is_decoded_once_and_loaded_with_the_same_bits(tmp_path):
    decode = Decoder()
    for _ in range(2):
        split = load(tmp_path, decode)
        assert torch.equal(split.images, decode.images)
        assert torch.equal(split.labels, decode.labels)
        assert split.checksum == content_checksum(CLASSES, decode.images, decode.labels)
    assert decode.calls == 1


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"classes": ["cat", "cow"]}])
def test_cache_of_changed_files_is_replaced(tmp_path, change):
    load(tmp_path, Decoder())
    second = Decoder(seed=1)
    assert torch.equal(load(tmp_path, second, **change).images, second.images)
    assert len(list(tmp_path.glob("*.packed"))) == 1


def test_cache_of_an_older_format_is_replaced_without_a_warning(tmp_path, caplog):
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(MAGIC, b"kdbench packed images 1\n", 1))
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert decode.calls == 2 and caplog.text == ""


def test_checksum_is_known_without_reading_the_images(tmp_path):
    assert new_cache(tmp_path).checksum() is None
    split = load(tmp_path, Decoder())
    path = packed_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    assert new_cache(tmp_path).checksum() == split.checksum
    assert new_cache(tmp_path, fingerprint="g").checksum() is None
    path.write_bytes(b"hello")
    assert new_cache(tmp_path).checksum() is None


def test_damaged_checksum_in_the_header_is_not_returned(tmp_path):
    """The checksum is part of a run's identity: a flipped digit would name another run."""
    checksum = load(tmp_path, Decoder()).checksum
    path = packed_file(tmp_path)
    damaged = checksum[:-1] + ("0" if checksum[-1] != "0" else "1")
    path.write_bytes(path.read_bytes().replace(checksum.encode(), damaged.encode()))
    assert new_cache(tmp_path).checksum() is None


def test_splits_of_different_identity_have_different_files(tmp_path):
    first, second = Decoder(), Decoder(seed=1)
    load(tmp_path, first)
    load(tmp_path, second, identity=("y",))
    load(tmp_path, first)
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize(
    "damage", ["pixel", "label", "cut", "cut header", "header", "appended", "empty", "text", "bit"]
)
def test_damaged_bytes_are_reported_and_rewritten(tmp_path, caplog, damage):
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    data = bytearray(path.read_bytes())
    match damage:
        case "pixel":
            data[-100] ^= 1
        case "label":
            data[-8] ^= 1
        case "cut":
            data = data[:-20]
        case "cut header":
            data = data[: len(MAGIC) + 70]
        case "header":
            data = data.replace(b'"shape": [6', b'"shape": [7')
        case "appended":
            data += b"x"
        case "empty":
            data = bytearray()
        case "text":
            data = bytearray(b"hello\n")
        case "bit":
            data[len(MAGIC) + 3] ^= 64
    path.write_bytes(data)
    assert_reported_and_rewritten(tmp_path, decode, caplog)


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [6],
        [6, 3, 4],
        [6, 3, 4, 10**25],
        [10**13, 3, 4, 4],
        [6, 10**9, 10**9, 10**9],
        [-6, 3, 4, -4],
        [6, 3, 0, 4],
        [6.0, 3, 4, 4],
        [True, 3, 4, 4],
        [[6], 3, 4, 4],
        "6344",
        None,
        {"6": 3},
    ],
    ids=str,
)
def test_impossible_shape_is_reported_and_rewritten(tmp_path, caplog, shape):
    """The header's own checksum is correct, so that only the check of the shape can detect it."""
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    replace_header(path, json.dumps(header_entries(path) | {"shape": shape}).encode())
    assert_reported_and_rewritten(tmp_path, decode, caplog)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"[]",
        b"5",
        b"null",
        b"",
        b"\xff\xfe",
        "{}".encode("utf-16"),
        b"1" * 5000,
        b'{"shape": NaN}',
    ],
    ids=["lists", "mappings", "list", "number", "null", "empty", "latin", "utf-16", "long number", "nan"],
)
def test_header_of_another_structure_is_reported_and_rewritten(tmp_path, caplog, header):
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    replace_header(path, header)
    assert new_cache(tmp_path).checksum() is None
    assert_reported_and_rewritten(tmp_path, decode, caplog)


@pytest.mark.parametrize("checksum", [None, 5, [], "0" * 64], ids=str)
def test_wrong_checksum_of_the_content_is_reported_and_rewritten(tmp_path, caplog, checksum):
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    replace_header(path, json.dumps(header_entries(path) | {"checksum": checksum}).encode())
    assert_reported_and_rewritten(tmp_path, decode, caplog)


def test_untouched_header_is_accepted(tmp_path):
    """Negative control of the tests that replace the header."""
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    replace_header(path, json.dumps(header_entries(path)).encode())
    assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert decode.calls == 1


def test_pipe_instead_of_a_file_is_reported_and_rewritten(tmp_path, caplog):
    os.mkfifo(new_cache(tmp_path).path)
    assert_reported_and_rewritten(tmp_path, Decoder(), caplog)


def test_folder_instead_of_a_file_is_reported_and_images_stay_in_memory(tmp_path, caplog):
    new_cache(tmp_path).path.mkdir()
    decode = Decoder()
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert "is damaged (it is not a regular file)" in caplog.text and "are not cached" in caplog.text


def test_folder_that_is_not_writable_is_only_a_notice(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    decode = Decoder()
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        assert torch.equal(load(tmp_path / "file" / "cache", decode).images, decode.images)
    assert "are not cached" in caplog.text and "damaged" not in caplog.text


def test_failed_write_leaves_no_file(tmp_path, monkeypatch, caplog):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kdbench.data.loading.packed_cache.os.fsync", full_disk)
    decode = Decoder()
    assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert "No space left on device" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_decoder_that_raises_leaves_no_cache(tmp_path):
    def fail():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        load(tmp_path, fail)
    assert not list(tmp_path.glob("*.packed*"))


def test_cache_works_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    decode = Decoder()
    for _ in range(2):
        assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert decode.calls == 1
    with pytest.raises(OSError, match="not implemented"), file_lock(tmp_path / "lock"):
        pytest.fail("the lock is not optional here")
