"""Whole runs: what they leave, what stops them, and that nothing that was saved gets lost."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

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


def test_a_run_leaves_everything():
    outcome = train_recipe_text(TINY.replace("tensorboard: false", "tensorboard: true") + "validation: 0.25\nema: 0.9\n")
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
    assert outcome.summary["best"]["chosen_on"] == "validation"
    assert not list(Path("run").rglob("*.tmp"))


def test_a_finished_run_is_not_trained_again(monkeypatch):
    first = train_recipe_text(TINY)
    monkeypatch.setattr(TrainingLoop, "run", lambda self: pytest.fail("it trained"))
    again = train_recipe_text(TINY)
    assert again.already_finished and json.dumps(again.summary) == json.dumps(read_json("run/summary.json"))
    assert again.summary["last"] == read_json("run/summary.json")["last"] and not first.already_finished


def test_fresh_trains_anew():
    train_recipe_text(TINY)
    before = RunFolder("run").last.stat().st_mtime_ns
    assert not train_recipe_text(TINY, "fresh=true").already_finished
    assert RunFolder("run").last.stat().st_mtime_ns > before


def test_a_changed_recipe_into_the_same_folder_is_refused_in_words():
    train_recipe_text(TINY)
    kept = weights()
    for change in ("terms.ce.weight=0.5", "seed=2", "epochs=4", "dataset.samples=32"):
        with pytest.raises(UserError, match=r"run holds another run.*out=DIR.*fresh=true"):
            train_recipe_text(TINY, change)
    assert equal_weights(kept, weights())
    train_recipe_text(TINY, "log_every=1")  # says how often something is written, not what is computed


def test_an_interrupted_run_of_another_recipe_is_refused_too(monkeypatch):
    interrupt(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    with pytest.raises(UserError, match="run holds another run"):
        train_recipe_text(TINY, "seed=2")


def test_a_folder_of_the_users_own_is_not_touched():
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
    """Ctrl-C in the middle of a run: after so many steps."""
    from kdbench.engine.train.runner import Runner

    original = Runner.step

    def step(self, window):
        if self.done == after:
            monkeypatch.setattr(Runner, "step", original)
            raise KeyboardInterrupt
        original(self, window)

    monkeypatch.setattr(Runner, "step", step)


def test_an_interrupted_run_goes_on_to_the_same_end(monkeypatch):
    train_recipe_text(TINY, "out=whole")
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    assert RunFolder("run").status() == "interrupted" and step_of() == 4
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


NAN = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_nan, at: AT}}")


@pytest.mark.parametrize("at", [5, 6, 8, 12])
def test_a_loss_that_becomes_nan_stops_with_the_last_good_checkpoint(at):
    text = NAN.replace("AT", str(at)) + "checkpoint_every: {steps: 2}\n"
    with pytest.raises(TrainingError, match=rf"own.yaml:4 terms.odd: .*'odd' \(t_nan\) is not finite since step {at} "):
        train_recipe_text(text)
    good = step_of()
    assert good == (at - 1) // 2 * 2
    assert all(value.isfinite().all() for value in weights().values())
    healthy = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_nan, at: 999}}")
    train_recipe_text(
        healthy + f"checkpoint_every: {{steps: 2}}\nsteps: {good}\n".replace("steps: 0", "steps: 1"),
        "~epochs",
        "out=ok",
    )
    if good:
        assert equal_weights(weights(), weights("ok/checkpoints/last.pt"))
    manifest = read_json("run/manifest.json")
    assert manifest["status"] == "failed" and "not finite" in manifest["reason"]
    bits = Path("run/checkpoints/last.pt").read_bytes()
    with pytest.raises(TrainingError, match=f"since step {at} "):  # the same command goes on, and meets it again
        train_recipe_text(text)
    assert Path("run/checkpoints/last.pt").read_bytes() == bits


def test_a_repeated_command_goes_on_from_the_good_checkpoint(monkeypatch):
    """What made the loss NaN may be gone (a flaky device): then the run ends as if nothing had happened."""
    from helpers import plugin_parts

    text = NAN.replace("AT", "7") + "checkpoint_every: {steps: 2}\n"
    with pytest.raises(TrainingError):
        train_recipe_text(text)
    monkeypatch.setattr(torch, "nan", 0.0)
    assert plugin_parts.torch is torch
    train_recipe_text(text, "out=whole")
    train_recipe_text(text)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint():
    text = TINY.replace("{ce: cross_entropy}", "{ce: cross_entropy, odd: {type: t_bad_gradient, at: 8}}")
    with pytest.raises(TrainingError, match=r"not finite after step 8 .*student\.layer1.*gradient"):
        train_recipe_text(text + "checkpoint_every: {steps: 1}\n")
    assert step_of() == 7 and all(value.isfinite().all() for value in weights().values())


def no_space(monkeypatch, name: str, after: int) -> list[int]:
    """The disk is full while the file called `name` is written for the nth time."""
    seen = [0]
    original = files.os.fsync

    def fsync(file):
        path = Path(f"/proc/self/fd/{file}").resolve() if Path("/proc/self/fd").exists() else None
        if path is not None and path.name == f"{name}.tmp":
            seen[0] += 1
            if seen[0] == after:
                raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return seen


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "summary.json", "manifest.json"])
def test_no_space_left_loses_nothing(monkeypatch, name):
    train_recipe_text(TINY, "out=whole")
    seen = no_space(monkeypatch, name, 2 if name == "last.pt" else 1)
    with pytest.raises(TrainingError, match=rf"no space left.*{name}.*what was saved\s+stays"):
        train_recipe_text(TINY)
    assert seen[0] >= 1
    if name == "last.pt":
        tree, _ = checkpoint.load(RunFolder("run").last)
        assert tree is not None and tree["step"] == 4
    assert not list(Path("run").rglob("*.tmp"))
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def unfinished(monkeypatch, after: int = 9) -> RunFolder:
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        train_recipe_text(TINY)
    return RunFolder("run")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_falls_back_to_the_one_before_with_a_notice(monkeypatch, share):
    train_recipe_text(TINY, "out=whole")
    folder = unfinished(monkeypatch)
    content = folder.last.read_bytes()
    folder.last.write_bytes(content[: int(len(content) * share)])
    console = QuietConsole()
    train_recipe_text(TINY, console=console)
    assert any("last.pt" in text and "damaged" in text and "the one before" in text for text in console.notices)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def test_two_damaged_checkpoints_are_told_and_left_alone(monkeypatch):
    folder = unfinished(monkeypatch)
    for file in (folder.last, folder.last.with_name("last.pt.previous")):
        assert file.exists()
        file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match=r"last\.pt .*last\.pt\.previous .*fresh=true"):
        train_recipe_text(TINY)
    assert folder.last.read_bytes() == b"PK\x03\x04 nothing"
    assert not train_recipe_text(TINY, "fresh=true").already_finished


def test_a_checkpoint_of_another_kind_is_no_checkpoint(monkeypatch):
    folder = unfinished(monkeypatch)
    for file in (folder.last, folder.last.with_name("last.pt.previous")):
        torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match="no checkpoint of kdbench"):
        train_recipe_text(TINY)


def test_a_missing_newest_checkpoint_is_the_previous_one(monkeypatch):
    """Where a kill between the renaming of the old and of the new one leaves the folder."""
    train_recipe_text(TINY, "out=whole")
    folder = unfinished(monkeypatch)
    folder.last.unlink()
    train_recipe_text(TINY)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def test_checkpoints_by_steps_and_by_minutes(monkeypatch):
    saved: list[int] = []
    original = checkpoint.save

    def save(path, tree, **options):
        if path.name == "last.pt":
            saved.append(tree["step"])
        original(path, tree, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    train_recipe_text(TINY + "checkpoint_every: {steps: 3}\n")
    assert saved == [3, 4, 6, 8, 9, 12]
    saved.clear()
    train_recipe_text(TINY + "checkpoint_every: {minutes: 1.0e-9}\n", "out=often")
    assert saved == list(range(1, 13))
    saved.clear()
    train_recipe_text(TINY + "checkpoint_every: {steps: 100, minutes: 1.0e-9}\n", "out=both")
    assert saved == list(range(1, 13))
    saved.clear()
    train_recipe_text(TINY, "out=seldom")
    assert saved == [4, 8, 12]


def test_the_best_epoch_is_kept_with_its_weights():
    outcome = train_recipe_text(TINY + "validation: 0.25\nkeep_epochs: [1, 2, 3]\n", "epochs=5", data=SYNTHETIC_DATA.replace("64", "96"))
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


def test_every_evaluation_happens_when_the_recipe_says():
    train_recipe_text(TINY + "eval_every: 2\n", "epochs=5")
    lines = [x for x in read_json_lines("run/metrics.jsonl") if x["event"] == "evaluation" and x["split"] == "test"]
    assert sorted({x["epoch"] for x in lines}) == [2, 4, 5]


def test_zero_epochs_only_evaluate():
    outcome = train_recipe_text(TINY, "epochs=0")
    assert outcome.summary["last"]["metrics"]["student"]["test"]["nll"] > 0
    assert train_recipe_text(TINY, "epochs=0").already_finished


def test_two_experiments_in_one_process_do_not_change_each_other():
    other = TINY.replace("t_layers, norm: batch", "t_layers, dropout: 0.5").replace("lr: 0.1", "lr: 0.3") + "seed: 7\n"
    train_recipe_text(TINY, "out=a")
    train_recipe_text(other + "precision: float64\nema: 0.5\n", "out=b")
    train_recipe_text(TINY, "out=c")
    assert differing_keys(comparable_results("a"), comparable_results("c")) == []
    assert differing_keys(comparable_results("a"), comparable_results("b"))


def test_a_run_leaves_no_global_setting_behind():
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


def test_a_frozen_role_below_its_accuracy_is_refused_before_training():
    text = TINY.replace("terms: {ce", "teacher: {model: t_layers, require: {top1: 99}}\nterms: {kd: kd, ce")
    with pytest.raises(TrainingError, match=r"own.yaml:4 teacher.*99"):
        train_recipe_text(text)
    assert not RunFolder("run").last.exists()


def test_a_mistake_is_told_before_anything_is_written():
    with pytest.raises(ConfigError):
        train_recipe_text(TINY.replace("{ce: cross_entropy}", "{h: {type: hint, student: layer9, teacher: student:layer1}}"))
    assert not Path("run").exists()


def test_missing_data_leave_no_run_behind():
    with pytest.raises((DataError, ConfigError)):
        train_recipe_text(TINY, data="dataset: {type: image_folder, folder: nowhere}\n")
    assert not Path("run/checkpoints").exists() or not any(Path("run/checkpoints").iterdir())


def test_the_command_line_says_nan_in_one_paragraph_and_exits_with_2(capsys):
    from kdbench.cli.main import main

    recipe_from_text(NAN.replace("AT", "5"))
    assert main(["train", "own.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kdbench: own.yaml:4 terms.odd: ") and "step 5" in said and "Traceback" not in said
    assert read_json("run/manifest.json")["status"] == "failed"


def test_the_command_line_says_that_a_run_was_interrupted(monkeypatch, capsys):
    from kdbench.cli.main import main

    recipe_from_text(TINY)
    interrupt(monkeypatch, 6)
    assert main(["train", "own.yaml"]) == 130
    assert "goes on" in capsys.readouterr().err and step_of() == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_is_told_in_words_and_the_run_goes_on_later(error, monkeypatch):
    def out_of_memory(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "run", out_of_memory)
        with pytest.raises(TrainingError, match=r"memory ran out on CPU.*smaller `batch_size`"):
            train_recipe_text(TINY)
        assert read_json("run/manifest.json")["status"] == "failed"
        patch.setattr(TrainingLoop, "run", lambda self: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
        with pytest.raises(RuntimeError, match="a fault of ours"):
            train_recipe_text(TINY)
    assert train_recipe_text(TINY).summary["last"]


def test_a_model_without_defaults_gets_what_the_dataset_tells():
    outcome = train_recipe_text(TINY.replace("{model: {type: t_layers, norm: batch}}", "t_required"))
    assert outcome.summary["last"]


def test_missing_data_is_told_although_a_model_lacks_what_it_would_tell():
    text = TINY.replace("{model: {type: t_layers, norm: batch}}", "t_required")
    loaded = recipe_from_text(text, data="dataset: {type: image_folder, root: nowhere, size: 8}\n")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        run_experiment(loaded)
