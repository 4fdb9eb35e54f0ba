"""Frozen networks that run ahead of the step give the step the same rows, and those that may not are found out."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.plugin_parts import CALLS
from helpers.recipes import (  # noqa: F401
    TESTS,
    QuietConsole,
    StageHarness,
    build_stage,
    comparable_results,
    differing_keys,
    equal_weights,
    plugin_registration,
    recipe_from_text,
    stage_plan,
    step_on_fake_tensors,
    subprocess_environment,
    torchrun_command,
    train_recipe_text,
)
from kdbench.cli.descriptions import describe_stage
from kdbench.engine.train import runner as runner_module
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.runner import Runner
from kdbench.files import read_json
from kdbench.speed.teacher_cache import prefetch as ahead_module
from kdbench.speed.teacher_cache.frozen_forward import FrozenForwardPlan, plan_frozen_forward, requested_mode
from kdbench.speed.teacher_cache.prefetch import Prefetcher, equal_up_to_rounding, prefetch_obstacles

DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 61}\n"
"""61 = 7 * 8 + 5: the last batch is ragged, so that blocks of steps do not end with epochs."""
PLAIN = """
student: {model: {type: t_conv, norm: batch}}
teacher: {model: {type: t_conv, norm: batch}}
terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
augment: [{type: crop, padding: 1}, flip]
label_fraction: 20
epochs: 2
batch_size: 8
frozen_batch_size: 32
tensorboard: false
"""
WIDER = "models: {second: {model: {type: t_layers, hidden: 16, dropout: 0.4}, frozen: true, input: strong}}\n"
STRONG = "augment: {image: [{type: crop, padding: 1}, flip], strong: [{type: crop, padding: 2}, rotate90]}\n"
KD = "terms: {ce: cross_entropy, kd: {type: kd, temperature: 2}}\n"
TWO = "terms: {ce: cross_entropy, kd: {type: kd, teacher: [teacher, second]}}\n"
FEATURES = (
    "terms: {hint: {type: hint, student: {path: conv1, adapter: conv1x1}, teacher: conv1}, "
    "at: {type: at, student: norm2, teacher: 'teacher:conv2/in'}}\n"
)
COUPLED = (
    "terms: {ce: cross_entropy, sp: {type: sp, student: pool, teacher: pool}, "
    "rkd: {type: rkd, student: pool, teacher: pool, weight: 0.1}}\n"
)
CASES = {
    "plain": "",
    "accumulated": "accumulate: 3\n",
    "whole steps": "epochs: null\nsteps: 11\n",
    "one role, two views": "models: {again: {reuse: teacher, input: strong}}\n"
    + STRONG
    + TWO.replace("second", "again"),
    "two teachers": WIDER + STRONG + TWO,
    "features": FEATURES,
    "coupling terms": COUPLED,
    "repeated": "models: {peer: {model: t_layers}}\n"
    "terms: {ce: cross_entropy, kd: kd, dml: {type: kd, student: peer, teacher: teacher}}\n"
    "updates: [{models: [student], terms: [ce, kd], repeat: 2}, {models: [peer], terms: [dml]}]\n",
    "selected": "updates: [{models: [student], terms: [ce, kd], "
    "select: {type: learnability, keep: 4, reference: teacher, student: student}}]\n",
    "held out": "validation: 0.25\n",
}
MIXED = "augment: [{type: crop, padding: 1}, mixup]\n"
SEVERAL = (
    "data: {other: {dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 21}, batch_size: 4}}\n"
    "models: {second: {model: t_layers, frozen: true, input: other.image}, "
    "shown: {reuse: student, input: other.image}}\n"
    "terms: {kd: kd, more: {type: kd, student: shown, teacher: second}}\n"
)
CHAINED = (
    "models: {head: {model: {type: t_layers, hidden: 9}, frozen: true, input: 'teacher:conv1'}, "
    "twin: {reuse: teacher, input: image}}\n"
    "terms: {kd: kd, more: {type: kd, teacher: head}, third: {type: kd, teacher: twin}}\n"
)


def text_of(more: str = "", *, exact: bool = True) -> str:
    """A recipe with keys of `more` in the place of those of PLAIN."""
    keys = {line.split(":", 1)[0] for line in more.splitlines()}
    kept = [line for line in PLAIN.splitlines() if line.split(":", 1)[0] not in keys]
    return "\n".join(kept) + "\n" + more + ("precision: float64\n" if exact else "")


def arranged(more: str, mode: str, *overrides: str, exact: bool = True, data: str = DATA) -> tuple[StageHarness, FrozenForwardPlan]:
    """A stage ready to step, its frozen roles run as `mode` says."""
    own = "" if more.startswith("dataset:") else data
    run = build_stage(recipe_from_text(text_of(more, exact=exact), f"frozen_forward={mode}", *overrides, data=own))
    arrangement = plan_frozen_forward(run.feed, run.runner, run.recipe, Path("tables"))
    run.feed = arrangement.feed  # type: ignore[assignment]
    return run, arrangement


def outcome(run: StageHarness, steps: int | None = None) -> dict[str, torch.Tensor]:
    """Everything that moves, after so many steps or the whole stage."""
    run.step(run.runner.total_steps if steps is None else steps)
    moving = {f"{name}.{key}": value for name in run.network.roles for key, value in run.weights(name).items()}
    terms = {f"terms.{key}": value.clone() for key, value in run.network.terms.state_dict().items()}
    return moving | terms | {"meters": run.runner.meters.sums.clone()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two outcomes are equal but for the rounding of float64: BLAS may sum five rows and 32 in other orders."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[key].double(), other[key].double(), rtol=1e-11, atol=1e-11) for key in one
    )


@pytest.mark.parametrize("mode", ["ahead", "table"])
@pytest.mark.parametrize("case", CASES)
def test_a_stage_ends_as_the_plain_run_does(case, mode):
    """Where all that is read of a frozen network comes from convolutions, which go image by image, to the same bits."""
    plain = outcome(arranged(CASES[case], "inline")[0])
    run, arrangement = arranged(CASES[case], mode)
    found = outcome(run)
    assert close(found, plain) and (case != "features" or equal_weights(found, plain))
    assert set(arrangement.modes.values()) == {mode}


@pytest.mark.parametrize(("more", "reason"), [(MIXED, "mixup blends"), (SEVERAL, ""), (CHAINED, "more than an image")])
def test_what_no_table_can_hold_runs_ahead_to_the_same_result(more, reason):
    plain = outcome(arranged(more, "inline")[0])
    assert close(outcome(arranged(more, "ahead")[0]), plain)
    run, arrangement = arranged(more, "table")
    assert close(outcome(run), plain)
    if reason:
        assert "ahead" in arrangement.modes.values() and reason in arrangement.describe()


def test_in_float32_rows_of_larger_batches_differ_by_rounding_alone():
    plain = outcome(arranged(FEATURES + WIDER + STRONG, "inline", exact=False)[0])
    for mode in ("ahead", "table"):
        found = outcome(arranged(FEATURES + WIDER + STRONG, mode, exact=False)[0])
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def sizes(run: StageHarness, name: str = "teacher") -> list[int]:
    """How many rows a role is run on, call by call, from now on."""
    seen: list[int] = []
    run.model(name).register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


def test_a_role_runs_once_for_several_steps_always_at_the_same_shape():
    run, _ = arranged("", "ahead", "epochs=3")
    seen = sizes(run)
    outcome(run)
    assert run.runner.total_steps == 24
    assert seen == [32, 8, *[32] * 6], "the block, the part that it is compared with, and then 4 steps at once"
    inline, _ = arranged("", "inline", "epochs=3")
    seen = sizes(inline)
    outcome(inline)
    assert seen == [8, 8, 8, 8, 8, 8, 8, 5] * 3


def test_the_largest_batch_of_a_step_decides_how_many_steps_a_block_has():
    run, _ = arranged(SEVERAL, "ahead", "accumulate=2")
    assert isinstance(run.feed, Prefetcher)
    assert (run.feed.steps_per_block, run.feed.rows_per_block) == (2, {"train": 32, "other": 16})


@pytest.mark.parametrize("mode", ["inline", "ahead", "table"])
def test_a_network_ends_at_the_last_feature_that_is_read(mode):
    more = (
        "teacher: {model: {type: t_layers, label: frozen}}\n"
        "terms: {ce: cross_entropy, hint: {type: hint, student: {path: fc, adapter: linear}, teacher: layer2}}\n"
    )
    run, arrangement = arranged(more, mode)
    CALLS.clear()
    outcome(run)
    assert arrangement.modes == {"teacher": mode}
    assert set(CALLS) == {"frozen.layer1", "frozen.layer2"}, "layer3 never runs"


@pytest.mark.parametrize("steps", [3, 11, 12])
def test_nothing_is_read_beyond_the_last_step_of_a_stage(monkeypatch, steps):
    taken: list[int] = []
    original = Feed.windows

    def counting(self: Feed, step: int) -> Any:
        for number, window in enumerate(original(self, step), step):
            taken.append(number)
            yield window

    monkeypatch.setattr(Feed, "windows", counting)
    run, _ = arranged("epochs: null\n", "ahead", f"steps={steps}")
    assert len(list(run.windows())) == steps
    assert taken == list(range(steps))


def fed(run: StageHarness, step: int) -> list[torch.Tensor]:
    """The batches that the teacher is run on from a step on, without those of the check."""
    seen: list[torch.Tensor] = []
    run.feed.checked = True  # type: ignore[attr-defined]
    run.model("teacher").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    run.runner.steps_done = step
    list(run.windows())
    return seen


def test_a_run_that_goes_on_within_a_block_computes_the_same_block_again():
    whole = fed(arranged("", "ahead")[0], 0)
    later = fed(arranged("", "ahead")[0], 6)  # the third step of the second block
    assert len(whole) == 4 and len(later) == 3
    assert all(torch.equal(one, other) for one, other in zip(whole[1:], later, strict=True))


def test_windows_from_a_step_on_are_those_of_the_whole_stage():
    whole = list(arranged(FEATURES, "ahead")[0].windows())
    run = arranged(FEATURES, "ahead")[0]
    run.runner.steps_done = 6
    rest = list(run.windows())
    assert len(rest) == len(whole) - 6
    for (one,), (other,) in zip(whole[6:], rest, strict=True):
        assert "teacher:conv1" in one["train"] and "teacher:conv2/in" in one["train"]
        assert equal_weights(one["train"], other["train"])


def test_blocks_that_began_where_a_run_goes_on_would_be_others(monkeypatch):
    """Negative control of the two tests above: the position of a block must not depend on where a run begins."""
    original = Prefetcher.windows

    def from_here(self: Prefetcher, step: int) -> Any:
        feed = self.feed
        self.feed = type("Moved", (), {"windows": lambda _, first: feed.windows(first + step)})()  # type: ignore[assignment]
        return original(self, 0)

    whole = fed(arranged("", "ahead")[0], 0)
    monkeypatch.setattr(Prefetcher, "windows", from_here)
    later = fed(arranged("", "ahead")[0], 6)
    assert not any(torch.equal(one, other) for one, other in zip(whole[1:], later[:3], strict=True))


def test_the_step_reads_nothing_on_the_host():
    for mode in ("ahead", "table"):
        step_on_fake_tensors(arranged(FEATURES, mode)[0], steps=5)


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_block_is_made_without_reading_anything_once_the_first_was_checked():
    run, _ = arranged(FEATURES, "ahead")
    windows = run.windows()
    with Reads() as first:
        next(windows)
    with Reads() as rest:
        assert len(list(windows)) == run.runner.total_steps - 1
    assert first.counts and not rest.counts


def test_a_step_with_given_rows_compiles_without_a_break(monkeypatch):
    monkeypatch.setattr(
        runner_module, "compiled", lambda network, **o: torch.compile(network, backend="aot_eager", **o)
    )
    for mode in ("ahead", "table"):
        run, _ = arranged("", mode, "compile=true")
        found = outcome(run, 9)
        assert run.runner.compiling
        for key, value in outcome(arranged("", "inline")[0], 9).items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


REFUSED = {
    "teacher: {model: t_mixes_rows}\n": "other rows",
    "teacher: {model: t_draws}\n": "random draws",
    "teacher: {model: t_layers, input: 'student:conv1'}\n": "it sees student, which moves",
    "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 64}\n"
    "data: {noise: {type: gaussian, shape: [6], batch_size: 8}}\n"
    "teacher: {model: t_two, input: [image, noise.z]}\n": "side by side",
}


@pytest.mark.parametrize("mode", ["ahead", "table"])
@pytest.mark.parametrize("more", REFUSED)
def test_a_role_whose_rows_are_not_its_images_alone_runs_in_the_step_and_says_why(more, mode):
    run, arrangement = arranged(more, mode)
    found = outcome(run)
    assert arrangement.modes == {"teacher": "inline"}
    assert REFUSED[more] in arrangement.reasons["teacher"] and REFUSED[more] in arrangement.describe()
    assert equal_weights(found, outcome(arranged(more, "inline")[0]))


def test_without_the_check_a_network_that_mixes_rows_would_give_another_result(monkeypatch):
    """Negative control: why it is checked."""
    more = next(iter(REFUSED))
    plain = outcome(arranged(more, "inline")[0])
    monkeypatch.setattr(ahead_module, "find_coupled_roles", lambda *args: {})
    run, arrangement = arranged(more, "ahead")
    assert not close(outcome(run), plain) and arrangement.modes == {"teacher": "ahead"}


def test_a_head_on_a_network_that_may_not_run_ahead_stays_with_it():
    more = (
        "teacher: {model: t_draws}\n"
        "models: {head: {model: linear_head, frozen: true, input: 'teacher:fc'}}\n"
        "terms: {kd: kd, more: {type: kd, teacher: head}}\n"
    )
    run, arrangement = arranged(more, "ahead")
    assert equal_weights(outcome(run), outcome(arranged(more, "inline")[0]))
    assert arrangement.modes == {"teacher": "inline", "head": "inline"}
    assert "random draws" in arrangement.reasons["teacher"] and arrangement.reasons["head"]


def test_a_feature_without_a_row_for_each_sample_keeps_its_role_in_the_step():
    more = "teacher: {model: t_doubles_rows}\nterms: {kd: kd, hint: {type: t_coupled, student: fc, teacher: doubled}}\n"
    run, arrangement = arranged(more, "ahead")
    assert equal_weights(outcome(run), outcome(arranged(more, "inline")[0]))
    assert arrangement.modes == {"teacher": "inline"}
    assert "doubled of teacher has not one row for each sample" in arrangement.reasons["teacher"]


def test_roles_that_move_are_not_asked_about():
    plan = stage_plan(
        recipe_from_text(
            text_of(
                "models: {shadow: {ema: student}, old: {snapshot: student}}\n" + TWO.replace("second", "shadow, old")
            ),
            data=DATA,
        )
    )
    assert prefetch_obstacles(plan) == {"teacher": ""}


def test_rows_are_compared_with_what_rounding_may_do():
    values = torch.randn(4, 5, dtype=torch.float64)
    assert equal_up_to_rounding(values * (1 + 1e-12), values) and not equal_up_to_rounding(values * (1 + 1e-7), values)
    assert equal_up_to_rounding(values.float() * (1 + 1e-5), values.float()) and not equal_up_to_rounding(values.float() * 1.01, values.float())
    assert not equal_up_to_rounding(values[:3], values) and not equal_up_to_rounding(torch.full_like(values, torch.nan), values)
    assert equal_up_to_rounding(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert not equal_up_to_rounding(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 1]))


def test_a_role_stays_in_a_step_that_is_as_large_as_a_block():
    run, arrangement = arranged("", "ahead", "frozen_batch_size=15")
    assert arrangement.modes == {"teacher": "inline"} and isinstance(run.feed, Feed)
    assert "15 rows" in arrangement.reasons["teacher"]


def test_auto_is_inline_on_the_cpu_and_ahead_on_a_gpu():
    loaded = recipe_from_text(text_of(), data=DATA)
    assert requested_mode(loaded, torch.device("cpu"))[0] == "inline"
    assert requested_mode(loaded, torch.device("cuda"))[0] == "ahead"
    run, arrangement = arranged("", "auto")
    assert arrangement.modes == {"teacher": "inline"} and not arrangement.describe() and isinstance(run.feed, Feed)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{folder}/checkpoints/last.pt", weights_only=True)["models"]["student"]


def test_a_run_says_how_its_frozen_roles_run_and_its_manifest_keeps_it():
    modes = {"inline": "", "ahead": "teacher ahead of it (4 steps, 32 rows)", "table": "teacher from a table (tables/"}
    for mode, words in modes.items():
        console = QuietConsole()
        train_recipe_text(text_of(f"out: {mode}\nfrozen_forward: {mode}\n"), data=DATA, console=console)
        told = [text for text in console.notices if "do not move" in text]
        assert len(told) == (1 if words else 0) and all(words in text for text in told)
        kept = read_json(f"{mode}/manifest.json")
        assert kept["frozen_forward"]["main"]["teacher"]["mode"] == mode
        assert kept["sessions"][0]["frozen_forward"] == f"{mode}, 32 rows"
        assert str(Path.cwd()) not in Path(mode, "manifest.json").read_text().replace(
            kept["sessions"][0]["command"], ""
        )
    assert close(weights_of("ahead"), weights_of("inline")) and close(weights_of("table"), weights_of("inline"))


class Killed(BaseException):
    """Ends a run where it stands."""


def killed_before(step: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Runner.step

    def stepping(self: Runner, window: Any) -> None:
        if self.steps_done == step:
            raise Killed
        original(self, window)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Runner, "step", stepping)
        train_recipe_text(text, data=DATA)


@pytest.mark.parametrize("mode", ["ahead", "table"])
@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_run_that_is_killed_within_a_block_ends_with_the_same_bits(monkeypatch, mode, step):
    """In float32, where another shape of the block would give other bits."""
    more = FEATURES + f"checkpoint_every: {{steps: 1}}\nfrozen_forward: {mode}\nruns: runs-{mode}\nout: "
    train_recipe_text(text_of(more + "whole\n", exact=False), data=DATA)
    killed_before(step, text_of(more + "run\n", exact=False), monkeypatch)
    train_recipe_text(text_of(more + "run\n", exact=False), data=DATA)
    assert differing_keys(comparable_results("whole"), comparable_results("run")) == []


def test_a_run_that_goes_on_in_another_way_is_told_so(monkeypatch):
    more = "checkpoint_every: {steps: 1}\nout: run\nfrozen_forward: "
    killed_before(6, text_of(more + "ahead\n"), monkeypatch)
    console = QuietConsole()
    train_recipe_text(text_of(more + "inline\n"), data=DATA, console=console)
    assert any("frozen forward was ahead, 32 rows, is inline, 32 rows" in text for text in console.notices)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_images_that_are_read_from_files_are_read_once(workers, monkeypatch):
    folder = Path("pets/train")
    for label, name in itertools.product(("ant", "bee"), range(13)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(name))
        Image.fromarray(pixels.numpy()).save(folder / label / f"{name}.png")
    data = (
        "dataset: {type: image_folder, root: pets, resident: false, size: 8}\n"
        "data: {eval: {dataset: {type: synthetic, shape: [3, 8, 8], classes: 2, samples: 8}}}\n"
    )
    reads: list[int] = []
    from kdbench.data.loading.streaming import ImageReader

    original = ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda self, number, *rest: (reads.append(number), original(self, number, *rest))[1]
    )
    results = {}
    for mode in ("inline", "ahead"):
        reads.clear()
        train_recipe_text(text_of(f"workers: {workers}\nout: {mode}\nfrozen_forward: {mode}\nlabel_fraction: null\n"), data=data)
        results[mode] = sorted(reads)
    assert close(weights_of("ahead"), weights_of("inline"))
    assert results["inline"] == results["ahead"] and (workers or len(reads) >= 52)


def test_two_processes_end_as_their_plain_run_does():
    """Each runs ahead, and fills the table, with its own rows; 61 samples leave a row that is repeated."""
    files = []
    for mode in ("inline", "ahead", "table"):
        files.append(f"{mode}.yaml")
        Path(files[-1]).write_text(DATA + text_of(COUPLED + f"out: {mode}\nfrozen_forward: {mode}\n"))
    words = torchrun_command(str(TESTS / "helpers" / "distributed_worker.py"), *files)
    done = subprocess.run(words, env=subprocess_environment(), cwd=os.getcwd(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for mode in ("ahead", "table"):
        assert read_json(f"{mode}/manifest.json")["frozen_forward"]["main"]["teacher"]["mode"] == mode
        assert close(weights_of(mode), weights_of("inline"))


def test_check_says_what_may_run_ahead_and_how_large_its_table_would_be():
    text = " ".join(describe_stage(stage_plan(recipe_from_text(text_of(WIDER + STRONG + TWO), data=DATA))))
    assert "teacher does not move, and may run ahead of the step; a table of it has 61 x 18 rows, 35.1 kB." in text
    assert "second does not move, and may run ahead of the step; a table of it has 61 x 100 rows" in text
    mixed = " ".join(describe_stage(stage_plan(recipe_from_text(text_of(MIXED), data=DATA))))
    assert "may run ahead of the step; no table: mixup blends samples." in mixed
    inside = " ".join(
        describe_stage(stage_plan(recipe_from_text(text_of("teacher: {model: t_layers, input: 'student:conv1'}\n"), data=DATA)))
    )
    assert "teacher does not move, but has to run inside the step: it sees student, which moves." in inside
