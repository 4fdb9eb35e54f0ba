"""Atomic writes, strict JSON, resumable logs, file locks, and errors that name the path."""

import errno
import json
import math
import os

import pytest

from kdbench.errors import TrainingError, UserError
from kdbench.files import (
    JsonLinesLog,
    ResumableLog,
    file_lock,
    read_json,
    read_json_lines,
    to_strict_json,
    translate_disk_errors,
    write_json,
)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_numbers_round_trip_exactly_and_nonfinite_values_become_strings(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53, 76.32999999999998]
    lines = JsonLinesLog(tmp_path / "a.jsonl")
    lines.write({"values": values, "odd": [math.nan, math.inf, -math.inf], "text": "zwei\u2028Zeilen\n"})
    lines.file.close()

    def reject_constant(token):
        raise AssertionError(f"{token} is not strict JSON")

    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    record = json.loads(text, parse_constant=reject_constant)
    assert [v.hex() for v in map(float, record["values"])] == [v.hex() for v in map(float, values)]
    assert [float(v) for v in record["odd"]][1:] == [math.inf, -math.inf] and math.isnan(float(record["odd"][0]))
    assert read_json_lines(tmp_path / "a.jsonl") == [record]


def test_an_incomplete_last_line_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


def test_strict_json_keeps_plain_values_and_rejects_tensors(tmp_path):
    import torch

    assert to_strict_json({"a": (1, 2.5, None, True, "x")}) == {"a": [1, 2.5, None, True, "x"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"loss": torch.tensor(1.0)})


def test_a_failed_write_keeps_the_old_json_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(TrainingError, match=r"no space left .*a\.json.* already saved are intact"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_into_a_removed_folder_names_the_folder(tmp_path):
    with pytest.raises(TrainingError, match=r"none/a\.json cannot be written: the folder .*none does not exist"):
        write_json(tmp_path / "none" / "a.json", {})


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EISDIR, errno.EDQUOT])
def test_every_disk_error_of_a_write_names_the_path(tmp_path, monkeypatch, code):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TrainingError, match=r"a\.json.*run continues from its last checkpoint") as raised:
        write_json(path, {"a": 2})
    assert code == errno.EDQUOT or os.strerror(code) in str(raised.value)
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_only_disk_errors_are_translated(tmp_path):
    with pytest.raises(KeyError), translate_disk_errors(tmp_path / "a"):
        raise KeyError("a bug keeps its own type")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b'{"a": ', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 text: byte 0 is 0xff"),
        (b"[" * 100_000, "not JSON"),
        (None, "cannot be read .*directory"),
    ],
)
def test_a_damaged_json_file_is_reported_by_name(tmp_path, content, problem):
    path = tmp_path / "a.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json.*{problem}"):
        read_json(path)


def test_a_missing_json_file_is_reported_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.json cannot be read \(No such file"):
        read_json(tmp_path / "a.json")


def test_a_damaged_line_is_reported_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is damaged"):
        read_json_lines(tmp_path / "a.jsonl")


def test_a_log_is_truncated_at_the_offset_of_the_checkpoint(tmp_path):
    log = ResumableLog(tmp_path / "log")
    log.write(b"one\n")
    offset = log.sync()
    log.write(b"two\n")
    log.close()
    resumed = ResumableLog(tmp_path / "log")
    assert resumed.resume(offset)
    resumed.write(b"TWO\n")
    resumed.close()
    assert (tmp_path / "log").read_bytes() == b"one\nTWO\n"


def test_the_lines_of_an_attempt_without_checkpoint_are_removed(tmp_path):
    (tmp_path / "log").write_bytes(b"stale\n")
    log = ResumableLog(tmp_path / "log")
    log.write(b"new\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"new\n"


def test_a_log_that_is_never_written_is_unchanged(tmp_path):
    (tmp_path / "log").write_bytes(b"kept\n")
    ResumableLog(tmp_path / "log").close()
    assert (tmp_path / "log").read_bytes() == b"kept\n"


def test_a_log_that_lost_its_end_continues_after_the_last_complete_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    log = JsonLinesLog(tmp_path / "a.jsonl")
    assert not log.file.resume(1000)
    log.write({"a": 3})
    log.file.close()
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_log_shorter_than_its_checkpoint_is_reported(tmp_path):
    (tmp_path / "log").write_bytes(b"one\n")
    log = ResumableLog(tmp_path / "log")
    assert not log.resume(100)
    log.write(b"two\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_a_full_disk_leaves_complete_lines(tmp_path, monkeypatch):
    log = ResumableLog(tmp_path / "log")
    log.write(b"one\n")
    write = os.write
    calls = []

    def write_two_bytes_then_fail(file, content):
        calls.append(content)
        if len(calls) > 1:
            full_disk()
        return write(file, content[:2])

    monkeypatch.setattr(os, "write", write_two_bytes_then_fail)
    with pytest.raises(TrainingError, match="no space left"):
        log.write(b"two\n")
    monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == b"one\n"
    log.write(b"three\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_without_space_is_reported():
    """Control for the simulated full disks above: the system reports the same error number."""
    with (
        pytest.raises(TrainingError, match="no space left"),
        translate_disk_errors("/dev/full"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_lock_is_exclusive_and_its_content_is_removed_at_the_end(tmp_path):
    path = tmp_path / "folder" / "lock"

    def give_up():
        raise UserError("busy")

    with file_lock(path, content=b"holder"):
        assert path.read_bytes() == b"holder"
        with pytest.raises(UserError, match="busy"), file_lock(path, on_busy=give_up, content=b"second"):
            pytest.fail("the lock was granted twice")
        assert path.read_bytes() == b"holder"
    assert path.read_bytes() == b""
    with file_lock(path, on_busy=give_up):
        pass


def test_an_optional_lock_does_without_a_writable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with file_lock(tmp_path / "file" / "lock", optional=True):
        pass
    with pytest.raises(OSError), file_lock(tmp_path / "file" / "lock"):
        pytest.fail("a required lock needs its folder")
