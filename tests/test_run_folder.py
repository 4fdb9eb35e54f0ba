"""The folder of a run: one writer, nothing of the user's touched."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.run_folder import LOCK_NAME, RUN_FORMAT, RunFolder


def holder(path) -> subprocess.Popen:
    """Another process that holds the lock until it is killed."""
    code = f"""
        import time
        from kdbench.run_folder import RunFolder
        with RunFolder({str(path)!r}).lock():
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_a_kill_frees_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    process = holder(folder.path)
    try:
        with (
            pytest.raises(UserError, match=f"in use by process {process.pid} on this machine") as caught,
            folder.lock(),
        ):
            pass
        assert "out=DIR" in str(caught.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with folder.lock():
        assert str(os.getpid()) in (folder.path / LOCK_NAME).read_text()
    assert (folder.path / LOCK_NAME).read_text() == ""


def test_a_teacher_that_two_students_need_is_waited_for(tmp_path):
    folder = RunFolder(tmp_path / "run")
    process = holder(folder.path)
    told: list[str] = []

    def told_then_freed(text: str) -> None:
        told.append(text)
        process.send_signal(signal.SIGKILL)

    try:
        with folder.lock(wait=told_then_freed):
            assert str(os.getpid()) in (folder.path / LOCK_NAME).read_text()
    finally:
        process.kill()
        process.communicate()
    assert len(told) == 1 and f"in use by process {process.pid}" in told[0] and "waiting" in told[0]


def _sleep(ready):
    ready.set()
    import time

    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """A data worker outlives a killed parent for some seconds; the next attempt must not wait for it."""
    folder = RunFolder(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with folder.lock():
        worker = context.Process(target=_sleep, args=(ready,), daemon=True)
        worker.start()
        assert ready.wait(10)
        held = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from kdbench.run_folder import RunFolder as R\nR({str(folder)!r}).lock().__enter__()",
            ],
            capture_output=True,
            text=True,
        )
        assert "in use by process" in held.stderr
    try:
        with folder.lock():
            pass
    finally:
        worker.kill()
        worker.join()


def test_the_status_follows_what_lies_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.status() == "new"
    with folder.lock():
        assert folder.status() == "new"
    write_json(folder.manifest, {"format": RUN_FORMAT, "status": "running"})
    assert folder.status() == "interrupted"
    write_json(folder.manifest, {"format": RUN_FORMAT, "status": "finished"})
    assert folder.status() == "interrupted"  # the summary is the last thing that a run writes
    write_json(folder.summary, {})
    assert folder.status() == "finished"


def test_a_folder_of_the_user_is_refused_and_left_alone(tmp_path):
    (tmp_path / "resolved.yaml").write_text("mine")
    folder = RunFolder(tmp_path)
    for act in (folder.status, folder.create, folder.clear, lambda: folder.lock().__enter__()):
        with pytest.raises(UserError, match="not empty and holds no run"):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run").create()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "run" / "below").create()


def test_clear_deletes_what_kdbench_wrote_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        own = [folder.recipe, folder.manifest, folder.metrics, folder.summary, folder.last, folder.best]
        own += [folder.stage("hint"), folder.epoch(3), folder.last.with_name("last.pt.previous")]
        own += [folder.tensorboard / "events.out.tfevents.0.kdbench", folder.figures / "confusion_test.png"]
        own += [folder.last.with_name("last.pt.tmp")]
        users = [folder.path / "notes.txt", folder.checkpoints / "mine.pt", folder.path / "paper" / "metrics.jsonl"]
        for path in own + users:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        folder.clear()
        assert not any(path.exists() for path in own)
        assert all(path.exists() for path in users)
        assert not folder.tensorboard.exists() and not folder.figures.exists()
    assert folder.is_run


def test_a_copied_run_without_its_hidden_lock_is_still_a_run(tmp_path):
    write_json(tmp_path / "manifest.json", {"format": RUN_FORMAT, "status": "finished"})
    assert RunFolder(tmp_path).is_run
    (tmp_path / "manifest.json").write_text('["something else"]')
    assert not RunFolder(tmp_path).is_run
