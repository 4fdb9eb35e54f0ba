"""The run folder: one writer, its status, and no change to files of the user."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from kdbench.errors import UserError
from kdbench.files import write_json
from kdbench.run_folder import LOCK_NAME, RUN_FORMAT, RunFolder, read_summary


def start_lock_holder(path) -> subprocess.Popen:
    """Starts a process that holds the lock until it is killed."""
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


def test_a_second_process_gets_the_holders_id_and_a_kill_releases_the_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    process = start_lock_holder(folder.path)
    try:
        with (
            pytest.raises(UserError, match=f"in use by process {process.pid} on this machine") as raised,
            folder.lock(),
        ):
            pass
        assert "out=DIR" in str(raised.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with folder.lock():
        assert str(os.getpid()) in (folder.path / LOCK_NAME).read_text()
    assert (folder.path / LOCK_NAME).read_text() == ""


def test_a_lock_with_on_wait_gives_notice_and_waits(tmp_path):
    folder = RunFolder(tmp_path / "run")
    process = start_lock_holder(folder.path)
    notices: list[str] = []

    def on_wait(text: str) -> None:
        notices.append(text)
        process.send_signal(signal.SIGKILL)

    try:
        with folder.lock(on_wait=on_wait):
            assert str(os.getpid()) in (folder.path / LOCK_NAME).read_text()
    finally:
        process.kill()
        process.communicate()
    assert len(notices) == 1 and f"in use by process {process.pid}" in notices[0] and "waiting" in notices[0]


def _sleep(ready):
    ready.set()
    import time

    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_worker_does_not_hold_the_lock(tmp_path):
    """A data worker outlives a killed parent by some seconds; the next attempt must not wait for it."""
    folder = RunFolder(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with folder.lock():
        worker = context.Process(target=_sleep, args=(ready,), daemon=True)
        worker.start()
        assert ready.wait(10)
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from kdbench.run_folder import RunFolder as R\nR({str(folder)!r}).lock().__enter__()",
            ],
            capture_output=True,
            text=True,
        )
        assert "in use by process" in second.stderr
    try:
        with folder.lock():
            pass
    finally:
        worker.kill()
        worker.join()


SUMMARY = {
    "recipe": "own",
    "seed": 1,
    "identity": "abc",
    "export": "student",
    "last": {"stage": "main", "epoch": 1, "step": 4, "metrics": {"student": {"test": {"top1": 50.0, "nll": "nan"}}}},
    "best": None,
    "frozen": {},
    "models": {"student": {"parameters": 10}},
    "published": None,
    "wall_seconds": 1.5,
}


def test_status_follows_manifest_and_summary(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.status() == "new"
    with folder.lock():
        assert folder.status() == "new"
    manifest = {"format": RUN_FORMAT, "identity": "abc"}
    write_json(folder.manifest, {**manifest, "status": "running"})
    assert folder.status() == "interrupted"
    write_json(folder.manifest, {**manifest, "status": "finished"})
    assert folder.status() == "interrupted"  # the summary is the last file that a run writes
    write_json(folder.summary, SUMMARY)
    assert folder.status() == "finished"


@pytest.mark.parametrize("name", ["manifest", "summary"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": "kdbench run"', None])
def test_a_damaged_manifest_or_summary_means_interrupted(tmp_path, name, content):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    write_json(folder.manifest, {"format": RUN_FORMAT, "identity": "abc", "status": "finished"})
    write_json(folder.summary, SUMMARY)
    assert folder.status() == "finished", "control: both files are intact"
    path = getattr(folder, name)
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert folder.status() == "interrupted"


@pytest.mark.parametrize("entry", SUMMARY)
def test_a_summary_without_an_entry_is_reported_by_file_and_entry(tmp_path, entry):
    path = tmp_path / "summary.json"
    write_json(path, SUMMARY)
    assert read_summary(path) == SUMMARY
    write_json(path, {key: value for key, value in SUMMARY.items() if key != entry})
    with pytest.raises(UserError, match=rf"summary\.json is damaged: entry '{entry}' is missing"):
        read_summary(path)
    write_json(path, {**SUMMARY, entry: [1]})
    with pytest.raises(UserError, match=rf"summary\.json is damaged: entry '{entry}' is of type list"):
        read_summary(path)


def test_a_folder_of_the_user_is_rejected_and_unchanged(tmp_path):
    (tmp_path / "resolved.yaml").write_text("mine")
    folder = RunFolder(tmp_path)
    for method in (folder.status, folder.create, folder.clear, lambda: folder.lock().__enter__()):
        with pytest.raises(UserError, match="not empty and is not a run folder"):
            method()
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


def test_a_file_in_place_of_the_folder_is_rejected(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run").create()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "run" / "below").create()


def test_clear_deletes_run_files_only(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        run_files = [folder.recipe, folder.manifest, folder.metrics, folder.summary, folder.last, folder.best]
        run_files += [folder.stage("hint"), folder.epoch(3), folder.last.with_name("last.pt.previous")]
        run_files += [folder.tensorboard / "events.out.tfevents.0.kdbench", folder.figures / "confusion_test.png"]
        run_files += [folder.last.with_name("last.pt.tmp")]
        user_files = [
            folder.path / "notes.txt",
            folder.checkpoints / "mine.pt",
            folder.path / "paper" / "metrics.jsonl",
        ]
        for path in run_files + user_files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        folder.clear()
        assert not any(path.exists() for path in run_files)
        assert all(path.exists() for path in user_files)
        assert not folder.tensorboard.exists() and not folder.figures.exists()
    assert folder.is_run


def test_a_run_copied_without_its_lock_file_is_a_run(tmp_path):
    write_json(tmp_path / "manifest.json", {"format": RUN_FORMAT, "status": "finished"})
    assert RunFolder(tmp_path).is_run
    (tmp_path / "manifest.json").write_text('["something else"]')
    assert not RunFolder(tmp_path).is_run
