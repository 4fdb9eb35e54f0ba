"""Writing: whole or not at all, strict JSON, and words when the disk is full."""

import errno
import json
import math
import os

import pytest

from kdbench.errors import TrainingError
from kdbench.files import JsonLinesLog, ResumableLog, read_json, read_json_lines, to_strict_json, write_json


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_numbers_round_trip_exactly_and_the_rest_is_strict_json(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53, 76.32999999999998]
    lines = JsonLinesLog(tmp_path / "a.jsonl")
    lines.write({"values": values, "odd": [math.nan, math.inf, -math.inf], "text": "zwei\u2028Zeilen\n"})
    lines.file.close()

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    record = json.loads(text, parse_constant=refuse)
    assert [v.hex() for v in map(float, record["values"])] == [v.hex() for v in map(float, values)]
    assert [float(v) for v in record["odd"]][1:] == [math.inf, -math.inf] and math.isnan(float(record["odd"][0]))
    assert read_json_lines(tmp_path / "a.jsonl") == [record]


def test_an_unfinished_last_line_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


def test_strict_leaves_plain_values_alone_and_refuses_tensors(tmp_path):
    import torch

    assert to_strict_json({"a": (1, 2.5, None, True, "x")}) == {"a": [1, 2.5, None, True, "x"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"loss": torch.tensor(1.0)})


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(TrainingError, match=r"no space left .* what was saved stays"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_other_faults_of_the_disk_keep_their_own_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "none" / "a.json", {})


def test_a_log_is_cut_where_the_checkpoint_stands(tmp_path):
    log = ResumableLog(tmp_path / "log")
    log.write(b"one\n")
    offset = log.sync()
    log.write(b"two\n")
    log.close()
    again = ResumableLog(tmp_path / "log")
    assert again.resume(offset)
    again.write(b"TWO\n")
    again.close()
    assert (tmp_path / "log").read_bytes() == b"one\nTWO\n"


def test_an_attempt_that_reached_no_checkpoint_leaves_no_lines(tmp_path):
    (tmp_path / "log").write_bytes(b"stale\n")
    log = ResumableLog(tmp_path / "log")
    log.write(b"new\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"new\n"


def test_a_log_that_is_never_written_stays_as_it_is(tmp_path):
    (tmp_path / "log").write_bytes(b"kept\n")
    ResumableLog(tmp_path / "log").close()
    assert (tmp_path / "log").read_bytes() == b"kept\n"


def test_a_log_shorter_than_the_checkpoint_says_so(tmp_path):
    (tmp_path / "log").write_bytes(b"one\n")
    log = ResumableLog(tmp_path / "log")
    assert not log.resume(100)
    log.write(b"two\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    log = ResumableLog(tmp_path / "log")
    log.write(b"one\n")
    real = os.write
    calls = []

    def half(file, content):
        calls.append(content)
        if len(calls) > 1:
            full_disk()
        return real(file, content[:2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(TrainingError, match="no space left"):
        log.write(b"two\n")
    monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == b"one\n"
    log.write(b"three\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_really_full_is_named():
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
