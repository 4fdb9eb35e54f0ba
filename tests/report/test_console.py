"""Console output: lines on a pipe, a rate-limited progress bar on a terminal."""

import io
import os
import time

import pytest
from rich.console import Console

from kdbench.report import console as module
from kdbench.report.console import ConsoleReporter, StdoutConsole, duration_text


class Terminal(io.StringIO):
    """Counts the writes."""

    draws = 0

    def write(self, text: str) -> int:
        self.draws += 1
        return super().write(text)


def evaluation(epoch: int, role: str = "student", **metrics: float) -> dict:
    return {"stage": "main", "epoch": epoch, "step": epoch * 10, "split": "test", "role": role, "metrics": metrics}


def piped(**options) -> tuple[ConsoleReporter, io.StringIO]:
    file = io.StringIO()
    return ConsoleReporter(Console(file=file, highlight=False), **options), file


def on_terminal(width: int = 120) -> tuple[ConsoleReporter, Terminal]:
    file = Terminal()
    return ConsoleReporter(Console(file=file, force_terminal=True, width=width, highlight=False)), file


def test_a_pipe_gets_one_complete_plain_line_per_evaluation():
    reporter, file = piped()
    reporter.start({"name": "digits/kd", "device": "cpu", "folder": "runs/" + "x" * 200})
    reporter.stage("main", 12, 120)
    for step in range(1, 121):
        reporter.progress(step)
        if step % 10 == 0:
            reporter.train({"total": 1.25, "images_per_s": 12345.6})
            reporter.evaluation(evaluation(step // 10, top1=90.0 + step / 100, nll=0.5))
    reporter.evaluation(evaluation(12, **{"per_class/0": 99.0}))
    reporter.close()
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[:2] == ["digits/kd · cpu", "folder runs/" + "x" * 200]
    assert len(lines) == 2 + 12
    assert lines[2] == "main  epoch  1/12  loss 1.2500  test  90.10%  nll 0.5000"
    assert len({line.index("nll") for line in lines[2:]}) == 1


def test_the_evaluations_of_one_epoch_share_a_line():
    reporter, file = piped()
    reporter.stage("main", 12, 120)
    reporter.evaluation(evaluation(0, role="teacher", top1=98.0, nll=0.25))
    reporter.progress(1)
    reporter.train({"total": 1.25})
    reporter.evaluation({**evaluation(1, top1=91.0, nll=0.75), "split": "validation"})
    reporter.progress(10, "evaluating")
    reporter.evaluation(evaluation(1, top1=90.0, nll=0.5, agreement=88.0))
    reporter.evaluation(evaluation(1, role="ema", top1=90.5, nll=0.4))
    assert len(file.getvalue().splitlines()) == 1
    reporter.close()
    first, second = file.getvalue().splitlines()
    assert first == "main  epoch  0/12               teacher test  98.00%"
    assert second.startswith("main  epoch  1/12  loss 1.2500  validation  91.00%  test  90.00%  ema test  90.50%  nll")


def test_a_pipe_gets_a_line_of_an_interval_after_a_time_without_output(monkeypatch):
    reporter, file = piped()
    reporter.stage("main", None, 1000)
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    for step in range(100, 1000, 100):
        now += 16
        reporter.progress(step)
        reporter.train({"total": 2.0, "images_per_s": 1000.0})
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "main  step  200/1000  loss 2.0000  1 000 img/s  2m 08s left"


def test_a_prefix_marks_a_teacher_run_and_quiet_prints_notices_only():
    reporter, file = piped(prefix="teacher")
    reporter.stage("main", 2, 20)
    reporter.evaluation(evaluation(1, top1=50.0))
    reporter.close()
    assert file.getvalue().startswith("teacher │ main  epoch 1/2")
    reporter, file = piped(quiet=True, prefix="teacher")
    reporter.start({"name": "digits/teacher"})
    reporter.stage("main", 2, 20)
    reporter.evaluation(evaluation(1, top1=50.0))
    reporter.notice("no GPU here")
    assert file.getvalue() == "teacher │ no GPU here\n"


def test_brackets_are_text_not_markup():
    reporter, file = piped()
    reporter.notice("terms [kd] and [/red]")
    assert file.getvalue() == "terms [kd] and [/red]\n"


def test_control_characters_in_a_notice_are_escaped():
    reporter, file = piped()
    reporter.notice("photos/\x1b]0;x\x07dog.jpg is a JPEG in CMYK")
    assert file.getvalue() == "photos/\\x1b]0;x\\x07dog.jpg is a JPEG in CMYK\n"


def test_a_terminal_shows_stage_epoch_loss_accuracy_speed_and_time_left(monkeypatch):
    reporter, file = on_terminal()
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    reporter.stage("distil", 10, 100)
    now += 10
    reporter.progress(10)
    reporter.train({"total": 1.2345, "images_per_s": 3214.0})
    reporter.evaluation(evaluation(1, top1=67.2))
    now += 10
    reporter.progress(20)
    last_line = file.getvalue().split("\n")[-1]
    reporter.close()
    for part in ("distil", "epoch  3/10", "20%", "loss 1.2345", "test 67.20%", "3 214 img/s", "1m 20s left"):
        assert part in last_line


def test_a_terminal_is_redrawn_at_most_ten_times_a_second():
    reporter, file = on_terminal()
    reporter.stage("main", 1, 10**7)
    file.draws = 0
    start = time.monotonic()
    steps = 0
    while time.monotonic() - start < 0.5:
        steps += 1
        reporter.progress(steps)
    draws = file.draws
    reporter.close()
    assert steps > 1000
    assert 1 <= draws <= 6


def test_a_step_between_two_redraws_takes_microseconds():
    reporter, _ = on_terminal()
    reporter.stage("main", 1, 10**7)
    start = time.perf_counter()
    for step in range(10_000):
        reporter.progress(step)
    seconds = time.perf_counter() - start
    reporter.close()
    assert seconds / 10_000 < 20e-6  # a step of the smallest network takes some hundred microseconds


def test_a_narrow_terminal_does_not_fail():
    reporter, _ = on_terminal(width=20)
    reporter.stage("main", 240, 1000)
    reporter.progress(500)
    reporter.evaluation(evaluation(120, top1=1.0))
    reporter.close()
    reporter.close()


def test_a_full_disk_behind_a_redirected_output_does_not_end_the_run():
    class FullFile(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):  # control: the console alone fails
        Console(file=FullFile()).print("one")
    reporter = ConsoleReporter(Console(file=FullFile()))
    reporter.notice("one")
    reporter.notice("two")


def test_a_closed_pipe_drops_later_output_without_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        StdoutConsole(file=pipe).print("nobody listens")
        print("a plain line of a later job", file=pipe, flush=True)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (187, "3m 07s"), (18123, "5h 02m")])
def test_durations_are_formatted_with_two_units(seconds, text):
    assert duration_text(seconds) == text
