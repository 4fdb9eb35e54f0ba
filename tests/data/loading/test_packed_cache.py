"""The packed cache: once decoded, verified at every load, made anew when stale or damaged."""

from __future__ import annotations

import errno
import fcntl
import logging

import pytest
import torch

from kdbench.data.datasets.base import content_checksum
from kdbench.data.loading.packed_cache import PackedCache, locked

CLASSES = ["cat", "dog"]


class Decoder:
    """Counts how often it is asked."""

    def __init__(self, seed=0):
        self.calls = 0
        self.images = torch.randint(
            0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        self.labels = torch.arange(6) % 2

    def __call__(self):
        self.calls += 1
        return self.images, self.labels


def cache(folder, fingerprint="f", identity=("x",), classes=CLASSES):
    return PackedCache(folder, "pets-train", list(identity), fingerprint, classes)


def load(folder, decode, **changes):
    return cache(folder, **changes).load(decode)


def packed_file(folder):
    (path,) = folder.glob("*.packed")
    return path


def test_decodes_once_and_gives_the_same_bits(tmp_path):
    decode = Decoder()
    for _ in range(2):
        packed = load(tmp_path, decode)
        assert torch.equal(packed.images, decode.images)
        assert torch.equal(packed.labels, decode.labels)
        assert packed.checksum == content_checksum(CLASSES, decode.images, decode.labels)
    assert decode.calls == 1


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"classes": ["cat", "cow"]}])
def test_changed_files_make_it_stale(tmp_path, change):
    load(tmp_path, Decoder())
    changed = Decoder(seed=1)
    assert torch.equal(load(tmp_path, changed, **change).images, changed.images)
    assert len(list(tmp_path.glob("*.packed"))) == 1  # the old one was replaced


def test_the_checksum_is_known_without_reading_the_images(tmp_path):
    assert cache(tmp_path).checksum() is None
    packed = load(tmp_path, Decoder())
    path = packed_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    assert cache(tmp_path).checksum() == packed.checksum
    assert cache(tmp_path, fingerprint="g").checksum() is None
    path.write_bytes(b"hello")
    assert cache(tmp_path).checksum() is None


def test_splits_of_another_identity_lie_side_by_side(tmp_path):
    first, second = Decoder(), Decoder(seed=1)
    load(tmp_path, first)
    load(tmp_path, second, identity=("y",))
    load(tmp_path, first)
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize("damage", ["pixel", "label", "truncated", "header", "empty", "foreign"])
def test_damage_is_noticed_and_mended(tmp_path, caplog, damage):
    decode = Decoder()
    load(tmp_path, decode)
    path = packed_file(tmp_path)
    data = bytearray(path.read_bytes())
    match damage:
        case "pixel":
            data[-100] ^= 1
        case "label":
            data[-8] ^= 1
        case "truncated":
            data = data[:-20]
        case "header":
            data = data.replace(b'"shape": [6', b'"shape": [7')
        case "empty":
            data = bytearray()
        case "foreign":
            data = bytearray(b"hello\n")
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert "damaged" in caplog.text
    assert str(path) in caplog.text
    load(tmp_path, decode)
    assert decode.calls == 2  # the second one mended the file


def test_a_folder_that_cannot_be_written_is_only_a_notice(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    decode = Decoder()
    with caplog.at_level(logging.WARNING, "kdbench.data"):
        assert torch.equal(load(tmp_path / "file" / "cache", decode).images, decode.images)
    assert "are not kept" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdbench.data.loading.packed_cache.os.fsync", full)
    decode = Decoder()
    assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert "No space left on device" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_decoder_that_fails_leaves_no_cache(tmp_path):
    def fail():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        load(tmp_path, fail)
    assert not list(tmp_path.glob("*.packed*"))


def test_a_file_system_without_locks_still_has_a_cache_but_no_table(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    decode = Decoder()
    for _ in range(2):
        assert torch.equal(load(tmp_path, decode).images, decode.images)
    assert decode.calls == 1
    with pytest.raises(OSError, match="not implemented"), locked(tmp_path / "lock", needed=True):
        pytest.fail("it went on")
