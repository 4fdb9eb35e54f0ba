"""Complete runs: their files, the errors that stop them, and that no saved file gets lost."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from helpers.kills import KilledRun, kill_at_write
from helpers.quick import only_quick
from helpers.recipes import (  # noqa: F401
    SYNTHETIC_DATA,
    QuietConsole,
    comparable_results,
    differing_keys,
    equal_weights,
    plugin_registration,
    recipe_from_text,
    train_recipe_text,
)
from kdbench import files
from kdbench.engine.state import checkpoint
from kdbench.engine.train.loop import TrainingLoop
from kdbench.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json, read_json_lines
from kdbench.run_folder import RunFolder

TINY = """
student: {model: {type: t_layers, norm: batch}}
terms: {ce: cross_entropy}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
epochs: 3
batch_size: 16
log_every: 2
tensorboard: false
out: run
"""


def weights(file: Path | str = "run/checkpoints/last.pt") -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["models"]["student"]


def step_of(file: Path | str = "run/checkpoints/last.pt") -> int:
    return torch.load(file, weights_only=True)["step"]


def test_a_run_writes_all_its_files():
    outcome = train_recipe_text(
        TINY.replace("tensorboard: false", "tensorboard: true") + "validation: 0.25\nema: 0.9\n"
    )
    folder = RunFolder("run")
    for path in (folder.recipe, folder.manifest, folder.metrics, folder.summary, folder.last, folder.best):
        assert path.is_file(), path
    assert list(folder.tensorboard.glob("events*")) and list(folder.figures.glob("*.png"))
    manifest = read_json(folder.manifest)
    assert manifest["status"] == "finished" and manifest["identity"] == outcome.summary["identity"]
    assert manifest["training"]["main"]["effective_batch"] == {"train": 16}
    lines = read_json_lines(folder.metrics)
    assert {line["event"] for line in lines} == {"train", "evaluation"}
    splits = {(line["role"], line["split"]) for line in lines if line["event"] == "evaluation"}
    assert {("student", "test"), ("student", "validation"), ("ema", "test"), ("student", "train")} <= splits
    assert outcome.summary["best"]["selected_on"] == "validation"
    assert not list(Path("run").rglob("*.tmp"))


def test_a_finished_run_is_not_trained_again(monkeypatch):
    first = train_recipe_text(TINY)
    monkeypatch.setattr(TrainingLoop, "run", lambda self: pytest.fail("it trained"))
    repeated = train_recipe_text(TINY)
    assert repeated.already_finished and json.dumps(repeated.summary) == json.dumps(read_json("run/summary.json"))
    assert repeated.summary["last"] == read_json("run/summary.json")["last"] and not first.already_finished


def test_fresh_trains_again():
    train_recipe_text(TINY)
    before = RunFolder("run").last.stat().st_mtime_ns
    assert not train_recipe_text(TINY, "fresh=true").already_finished
    assert RunFolder("run").last.stat().st_mtime_ns > before


def test_a_changed_recipe_in_the_same_folder_is_rejected():
    train_recipe_text(TINY)
    before = weights()
    for change in ("terms.ce.weight=0.5", "seed=2", "epochs=4", "dataset.samples=32"):
        with pytest.raises(UserError, match=r"run belongs to another run.*out=DIR.*fresh=true"):
            train_recipe_text(TINY, change)
    assert equal_weights(before, weights())
    train_recipe_text(TINY, "log_every=1")  # changes no result


def test_an_interrupted_run_of_another_recipe_is_rejected(monkeypatch):
    interrupt(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    with pytest.raises(UserError, match="run belongs to another run"):
        train_recipe_text(TINY, "seed=2")


def test_a_folder_with_files_of_the_user_is_unchanged():
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run is not empty.*out=DIR"):
        train_recipe_text(TINY)
    assert [path.name for path in Path("run").iterdir()] == ["thesis.txt"]


def test_two_processes_cannot_write_into_one_folder():
    with RunFolder("run").lock(), pytest.raises(UserError, match=r"run is in use by process \d+"):
        train_recipe_text(TINY)
    train_recipe_text(TINY)


def interrupt(monkeypatch, after: int) -> None:
    """Simulates Ctrl-C after some steps."""
    from kdbench.engine.train.runner import Runner

    original = Runner.step

    def step(self, window):
        if self.progress.steps_done == after:
            monkeypatch.setattr(Runner, "step", original)
            raise KeyboardInterrupt
        original(self, window)

    monkeypatch.setattr(Runner, "step", step)


def test_an_interrupted_run_resumes_to_the_same_bits(monkeypatch):
    train_recipe_text(TINY, "out=uninterrupted")
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    assert RunFolder("run").status() == "interrupted" and step_of() == 4
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


NAN = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_nan, at: AT}}")


@pytest.mark.parametrize("at", [5, 6, 8, 12])
def test_a_loss_that_becomes_nan_stops_at_the_last_good_checkpoint(at):
    text = NAN.replace("AT", str(at)) + "checkpoint_every: {steps: 2}\n"
    with pytest.raises(TrainingError, match=rf"own.yaml:4 terms.odd: .*'odd' \(t_nan\) is not finite since step {at} "):
        train_recipe_text(text)
    last_step = step_of()
    assert last_step == (at - 1) // 2 * 2
    assert all(value.isfinite().all() for value in weights().values())
    healthy = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_nan, at: 999}}")
    train_recipe_text(
        healthy + f"checkpoint_every: {{steps: 2}}\nsteps: {last_step}\n".replace("steps: 0", "steps: 1"),
        "~epochs",
        "out=ok",
    )
    if last_step:
        assert equal_weights(weights(), weights("ok/checkpoints/last.pt"))
    manifest = read_json("run/manifest.json")
    assert manifest["status"] == "failed" and "not finite" in manifest["reason"]
    content = Path("run/checkpoints/last.pt").read_bytes()
    with pytest.raises(TrainingError, match=f"since step {at} "):  # the repeated command resumes and stops again
        train_recipe_text(text)
    assert Path("run/checkpoints/last.pt").read_bytes() == content


def test_a_repeated_command_resumes_after_a_passing_fault(monkeypatch):
    """After a temporary NaN (a flaky device) the run ends with the bits of an uninterrupted run."""
    from helpers import plugin_parts

    text = NAN.replace("AT", "7") + "checkpoint_every: {steps: 2}\n"
    with pytest.raises(TrainingError):
        train_recipe_text(text)
    monkeypatch.setattr(torch, "nan", 0.0)
    assert plugin_parts.torch is torch
    train_recipe_text(text, "out=uninterrupted")
    train_recipe_text(text)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


def test_a_nonfinite_gradient_never_reaches_a_checkpoint():
    text = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_bad_gradient, at: 8}}")
    with pytest.raises(TrainingError, match=r"student\.layer1.*NaN or infinite after step 8 .*gradient was not"):
        train_recipe_text(text + "checkpoint_every: {steps: 1}\n")
    assert step_of() == 7 and all(value.isfinite().all() for value in weights().values())


def fill_disk(monkeypatch, name: str, after: int, code: int = errno.ENOSPC) -> list[int]:
    """Lets the nth write of a file fail with an error of the disk; returns the number of writes in a list."""
    num_writes = [0]
    original = files.os.fsync

    def fsync(file):
        path = Path(f"/proc/self/fd/{file}").resolve() if Path("/proc/self/fd").exists() else None
        if path is not None and path.name == f"{name}.tmp":
            num_writes[0] += 1
            if num_writes[0] == after:
                raise OSError(code, os.strerror(code))
        original(file)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return num_writes


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "summary.json", "manifest.json"])
@pytest.mark.parametrize(
    "code", only_quick([errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES], errno.ENOSPC)
)
def test_an_error_of_the_disk_names_the_file_and_loses_nothing(monkeypatch, name, code):
    train_recipe_text(TINY, "out=uninterrupted")
    num_writes = fill_disk(monkeypatch, name, 2 if name == "last.pt" else 1, code)
    problem = "no space left" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(TrainingError, match="already saved are intact") as raised:
        train_recipe_text(TINY)
    assert problem in str(raised.value) and name in str(raised.value)
    assert num_writes[0] >= 1
    if name == "last.pt":
        state, _ = checkpoint.load(RunFolder("run").last)
        assert state is not None and state.step == 4
    assert not list(Path("run").rglob("*.tmp"))
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


def interrupted_run(monkeypatch, after: int = 9) -> RunFolder:
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    return RunFolder("run")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_falls_back_to_the_previous_one_with_a_notice(monkeypatch, fraction):
    train_recipe_text(TINY, "out=uninterrupted")
    folder = interrupted_run(monkeypatch)
    content = folder.last.read_bytes()
    folder.last.write_bytes(content[: int(len(content) * fraction)])
    console = QuietConsole()
    train_recipe_text(TINY, console=console)
    assert any(
        "last.pt" in text and "damaged" in text and "from the previous checkpoint" in text for text in console.notices
    )
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


def test_a_kill_after_the_fallback_loses_no_checkpoint(monkeypatch):
    """The damaged file must not replace the good previous one before a new checkpoint is complete."""
    train_recipe_text(TINY, "out=uninterrupted")
    interrupted_run(monkeypatch).last.write_bytes(b"PK nothing")
    for write_number in range(1, 40, 3):
        with suppress(KilledRun), kill_at_write(write_number):
            train_recipe_text(TINY)
            break
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


def test_two_damaged_checkpoints_are_reported_and_unchanged(monkeypatch):
    folder = interrupted_run(monkeypatch)
    for file in (folder.last, folder.last.with_name("last.pt.previous")):
        assert file.exists()
        file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match=r"last\.pt .*last\.pt\.previous .*fresh=true"):
        train_recipe_text(TINY)
    assert folder.last.read_bytes() == b"PK\x03\x04 nothing"
    assert not train_recipe_text(TINY, "fresh=true").already_finished


def test_a_checkpoint_of_another_program_is_rejected(monkeypatch):
    folder = interrupted_run(monkeypatch)
    for file in (folder.last, folder.last.with_name("last.pt.previous")):
        torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match="not a checkpoint of kdbench"):
        train_recipe_text(TINY)


def test_a_missing_newest_checkpoint_falls_back_to_the_previous_one(monkeypatch):
    """A kill between the two renames of a checkpoint leaves the folder like this."""
    train_recipe_text(TINY, "out=uninterrupted")
    folder = interrupted_run(monkeypatch)
    folder.last.unlink()
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("uninterrupted"), comparable_results("run")) == []


def test_checkpoints_by_steps_and_by_minutes(monkeypatch):
    steps: list[int] = []
    original = checkpoint.save

    def save(path, content, **options):
        if path.name == "last.pt":
            steps.append(content.step)
        original(path, content, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    train_recipe_text(TINY + "checkpoint_every: {steps: 3}\n")
    assert steps == [3, 4, 6, 8, 9, 12]
    steps.clear()
    train_recipe_text(TINY + "checkpoint_every: {minutes: 1.0e-9}\n", "out=often")
    assert steps == list(range(1, 13))
    steps.clear()
    train_recipe_text(TINY + "checkpoint_every: {steps: 100, minutes: 1.0e-9}\n", "out=both")
    assert steps == list(range(1, 13))
    steps.clear()
    train_recipe_text(TINY, "out=seldom")
    assert steps == [4, 8, 12]


def test_the_best_epoch_is_saved_with_its_weights():
    outcome = train_recipe_text(
        TINY + "validation: 0.25\nkeep_epochs: [1, 2, 3]\n", "epochs=5", data=SYNTHETIC_DATA.replace("64", "96")
    )
    best = outcome.summary["best"]["epoch"]
    lines = [
        x for x in read_json_lines("run/metrics.jsonl") if x["event"] == "evaluation" and x["split"] == "validation"
    ]
    scores = {x["epoch"]: x["metrics"]["top1"] for x in lines}
    assert scores[best] == max(scores.values()) and best == min(
        e for e, s in scores.items() if s == max(scores.values())
    )
    if best <= 3:
        assert equal_weights(weights("run/checkpoints/best.pt"), weights(f"run/checkpoints/epoch_{best:04d}.pt"))
    assert {file.name for file in Path("run/checkpoints").glob("epoch_*")} == {f"epoch_{n:04d}.pt" for n in (1, 2, 3)}


def test_evaluations_follow_eval_every():
    train_recipe_text(TINY + "eval_every: 2\n", "epochs=5")
    lines = [x for x in read_json_lines("run/metrics.jsonl") if x["event"] == "evaluation" and x["split"] == "test"]
    assert sorted({x["epoch"] for x in lines}) == [2, 4, 5]


def test_zero_epochs_only_evaluate():
    outcome = train_recipe_text(TINY, "epochs=0")
    assert outcome.summary["last"]["metrics"]["student"]["test"]["nll"] > 0
    assert train_recipe_text(TINY, "epochs=0").already_finished


def test_two_experiments_in_one_process_do_not_change_each_other():
    second = TINY.replace("t_layers, norm: batch", "t_layers, dropout: 0.5").replace("lr: 0.1", "lr: 0.3") + "seed: 7\n"
    train_recipe_text(TINY, "out=a")
    train_recipe_text(second + "precision: float64\nema: 0.5\n", "out=b")
    train_recipe_text(TINY, "out=c")
    assert differing_keys(comparable_results("a"), comparable_results("c")) == []
    assert differing_keys(comparable_results("a"), comparable_results("b"))


def test_a_run_restores_every_global_setting():
    torch.manual_seed(3)
    before = (
        torch.get_rng_state().clone(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    train_recipe_text(TINY + "precision: tf32\n")
    after = (
        torch.get_rng_state(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_a_frozen_role_below_its_required_accuracy_is_rejected_before_training():
    text = TINY.replace("terms: {ce", "teacher: {model: t_layers, require: {top1: 99}}\nterms: {kd: kd, ce")
    with pytest.raises(TrainingError, match=r"own.yaml:4 teacher.*99"):
        train_recipe_text(text)
    assert not RunFolder("run").last.exists()


def test_an_error_in_the_recipe_is_raised_before_anything_is_written():
    with pytest.raises(ConfigError):
        train_recipe_text(
            TINY.replace("{ce: cross_entropy}", "{h: {type: hint, student: layer9, teacher: student:layer1}}")
        )
    assert not Path("run").exists()


def test_missing_data_create_no_checkpoints():
    with pytest.raises((DataError, ConfigError)):
        train_recipe_text(TINY, data="dataset: {type: image_folder, folder: nowhere}\n")
    assert not Path("run/checkpoints").exists() or not any(Path("run/checkpoints").iterdir())


def test_the_command_line_reports_nan_in_one_paragraph_and_exits_with_2(capsys):
    from kdbench.cli.main import main

    recipe_from_text(NAN.replace("AT", "5"))
    assert main(["train", "own.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("kdbench: own.yaml:4 terms.odd: ")
    assert "step 5" in message and "Traceback" not in message
    assert read_json("run/manifest.json")["status"] == "failed"


def test_the_command_line_reports_an_interrupted_run(monkeypatch, capsys):
    from kdbench.cli.main import main

    recipe_from_text(TINY)
    interrupt(monkeypatch, 6)
    assert main(["train", "own.yaml"]) == 130
    assert "interrupted. Repeat the command" in capsys.readouterr().err and step_of() == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_exhausted_memory_is_a_training_error_and_the_run_resumes(error, monkeypatch):
    def out_of_memory(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "run", out_of_memory)
        with pytest.raises(TrainingError, match=r"memory ran out on CPU.*smaller `batch_size`"):
            train_recipe_text(TINY)
        assert read_json("run/manifest.json")["status"] == "failed"
        patch.setattr(TrainingLoop, "run", lambda self: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            train_recipe_text(TINY)
    assert train_recipe_text(TINY).summary["last"]


def test_a_model_without_defaults_gets_the_parameters_of_the_dataset():
    outcome = train_recipe_text(TINY.replace("{model: {type: t_layers, norm: batch}}", "t_required"))
    assert outcome.summary["last"]


def test_missing_data_is_reported_before_the_missing_model_parameters():
    text = TINY.replace("{model: {type: t_layers, norm: batch}}", "t_required")
    loaded = recipe_from_text(text, data="dataset: {type: image_folder, root: nowhere, size: 8}\n")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        run_experiment(loaded)
