"""The benchmarks run at small size; counted work, growth exponents and the bookkeeping of the GPU parts are right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdbench.registry import ROUTERS, SAMPLE_WEIGHTS, TERMS
from kdbench.speed.profiling import peaks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import common  # noqa: E402
import data  # noqa: E402
import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import operands  # noqa: E402
import scaling  # noqa: E402
import terms  # noqa: E402

SMALL = operands.Size(batch=8, classes=10, samples=200)
AXES = {"batch": (16, 32, 64), "classes": (16, 32, 64), "samples": (400, 800, 1600)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(peaks, "PROBE_SECONDS", 0.0)


def run_benchmark(main, monkeypatch, *arguments: str) -> dict:
    """Runs a benchmark at small size on the CPU and returns its result."""
    command = [f"{main.__module__}.py", "--device", "cpu", "--quick", "--out", "out.json", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    main()
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert {"what", "date", "command", "machine"} <= set(result) and "out.json" not in result["command"]
    assert {"device", "torch", "kdbench", "threads"} <= set(result["machine"])
    return result


# Every part, and the growth of its cost


def test_every_registered_part_can_be_built_and_run():
    registries = {"term": TERMS, "sample weight": SAMPLE_WEIGHTS, "router": ROUTERS}
    assert set(operands.names()) == {(kind, n) for kind, registry in registries.items() for n in registry.entries}
    for kind, name in operands.names():
        part = operands.build(kind, name, SMALL, "cpu")
        part.work()
        assert operands.count(part.work).operations > 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_no_part_grows_faster_than_allowed(axis):
    """Counted, not timed: elements written and FLOPs."""
    steep = {}
    for kind, name in operands.names():
        row = scaling.measure(kind, name, axis, AXES[axis], SMALL, "cpu", 0)
        if row["flagged"]:
            steep[f"{kind} {name}"] = (row["work_exponent"], row["allowed"])
    assert not steep, f"exponents along {axis}, measured and allowed; EXPECTED in benchmarks/scaling.py has exceptions"


def test_part_that_grows_too_fast_is_flagged(monkeypatch):
    """Control: a loss per row that compares all rows with all."""

    class AllPairs(torch.nn.Module):
        def forward(self, student):
            return (student[:, None] - student[None]).square().sum((1, 2))

    def build_all_pairs(kind, name, size, device):
        student = torch.randn(size.batch, 10, requires_grad=True)
        return operands.BuiltPart(kind, name, AllPairs(), {"student": student}, [student])

    monkeypatch.setattr(scaling, "build", build_all_pairs)
    assert scaling.measure("term", "kd", "batch", AXES["batch"], SMALL, "cpu", 0)["flagged"]


def test_exponent_is_fitted_on_the_larger_sizes():
    sizes = (1, 10, 100, 1000)
    assert scaling.exponent(sizes, [500 + 3 * x**2 for x in sizes]) == pytest.approx(2, abs=0.02)
    assert scaling.exponent(sizes, [7.0] * 4) == pytest.approx(0)


def test_view_is_no_work_and_a_bank_update_counts_the_written_rows():
    bank, rows = torch.zeros(1000, 4), torch.ones(3, 4)
    assert operands.count(lambda: rows.t()).elements == 0
    index = torch.tensor([1, 5, 7])

    def write() -> None:
        bank[index] = rows

    assert operands.count(write).elements == 12
    assert operands.count(lambda: rows @ rows.t()).flops == 2 * 3 * 4 * 3


# The scripts


def test_terms_reports_fractions_of_a_plain_step(monkeypatch, capsys):
    result = run_benchmark(terms.main, monkeypatch, "--only", "kd", "crd", "--samples", "3")
    assert set(result["parts"]) == {"term kd", "term crd"}
    step = (result["plain_step_ms"]["before"]["median"] + result["plain_step_ms"]["after"]["median"]) / 2
    for part in result["parts"].values():
        assert part["fraction_of_step"] > 0 and part["ms"]["median"] < 50 * step


def test_scaling_reports_exponents(monkeypatch, capsys):
    result = run_benchmark(scaling.main, monkeypatch, "--only", "rkd", "kd")
    assert result["flagged"] == [] and result["parts"]["term rkd"]["batch"]["allowed"] == 3
    assert result["parts"]["term kd"]["batch"]["work_exponent"] == pytest.approx(1, abs=0.1)


def test_data_compares_kdbench_with_other_loaders(monkeypatch, capsys):
    result = run_benchmark(data.main, monkeypatch, "--workers", "0", "--batch", "4")
    assert set(result["resident"]) == set(data.AUGMENTATIONS)
    assert set(result["resident"]["crop, flip"]["images_per_second"]) == {"kdbench", "PIL, DataLoader"}
    assert result["streaming"]["threads 1"]["kdbench_over"]["ImageFolder, DataLoader"]["median"] > 0


def test_time_calls_returns_the_seconds_of_one_call():
    calls = []
    seconds = common.time_calls(lambda: calls.append(1), "cpu", samples=3, min_seconds=0.0005)
    assert len(seconds) == 3 and max(seconds) < 0.0005 < len(calls) * max(seconds) * 10


# gpu.py


def run_gpu(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--out", "gpu", *arguments])
    return gpu.main()


def read_state() -> dict:
    return json.loads(Path("gpu/state.json").read_text(encoding="utf-8"))


QUICK = ["kernels", "teacher forward", "step cuda_graph bf16", "epochs", "accuracy float32 eager 1", "mdistiller"]


def test_child_processes_of_a_part_are_killed_with_it():
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_command(["sh", "-c", "sleep 60 & echo $! > pid; wait"], 1.0)
    pid = int(Path("pid").read_text())
    for _ in range(50):  # the process that adopts the child needs a moment to reap it
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child process is still running")
    assert gpu.run_command(["sh", "-c", "echo why >&2; exit 3"], 9.0) == (3, "why\n")


def test_gpu_parts_run_at_small_size_and_are_not_run_again(monkeypatch, capsys):
    assert run_gpu(monkeypatch, "--only", *QUICK) == 0
    assert {name: entry["status"] for name, entry in read_state().items()} == {
        name: "skipped" if name == "mdistiller" else "done" for name in QUICK
    }
    for name in QUICK:
        result = json.loads(Path(f"gpu/{gpu_parts.file_name(name)}.json").read_text(encoding="utf-8"))
        assert result["part"] == name and result["predicted"] == json.loads(json.dumps(gpu_parts.PARTS[name].predicted))
        assert str(Path.cwd()) not in json.dumps(result), "no paths of this machine"
    epochs = json.loads(Path("gpu/epochs.json").read_text(encoding="utf-8"))["measured"]
    assert len(epochs["epoch_seconds"]) >= 3
    mean = sum(epochs["epoch_seconds"]) / len(epochs["epoch_seconds"])
    assert epochs["projected_minutes"] == pytest.approx(240 * mean / 60, rel=0.01)
    monkeypatch.setattr(gpu, "measure_part", lambda *_: pytest.fail("a complete part is measured again"))
    assert run_gpu(monkeypatch, "--only", *QUICK) == 0
    assert "all parts are complete" in capsys.readouterr().out


def make_part(measure, minutes: float = 0.1, resumes: bool = False) -> gpu_parts.BenchmarkPart:
    return gpu_parts.BenchmarkPart("a part", measure, minutes, resumes=resumes)


def test_interrupted_part_is_measured_again(monkeypatch, capsys):
    def interrupt(context):
        raise KeyboardInterrupt

    first_call = {"interrupted": make_part(interrupt), "next": make_part(lambda context: {"value": 2})}
    monkeypatch.setattr(gpu, "PARTS", first_call)
    with pytest.raises(KeyboardInterrupt):
        run_gpu(monkeypatch, "--only", *first_call)
    assert read_state()["interrupted"]["status"] == "running" and "next" not in read_state()
    monkeypatch.setattr(gpu, "PARTS", {name: make_part(lambda context: {"value": 1}) for name in first_call})
    assert run_gpu(monkeypatch, "--only", *first_call) == 0
    assert [entry["status"] for entry in read_state().values()] == ["done", "done"]
    assert read_state()["interrupted"]["attempts"] == 2


def test_long_part_waits_for_a_later_call_and_a_failed_part_does_not_stop_the_rest(monkeypatch, capsys):
    attempted = []

    def attempt(name, args, seconds):
        attempted.append(name)
        outcomes = {"bad": ("failed", "no memory"), "resumable": ("interrupted", "time limit reached")}
        return outcomes.get(name, ("done", ""))

    def measure_nothing(context):
        return {}

    parts = {"bad": make_part(measure_nothing), "good": make_part(measure_nothing)}
    parts |= {"long": make_part(measure_nothing, minutes=30), "resumable": make_part(measure_nothing, resumes=True)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "attempt", attempt)
    command = ["gpu.py", "--device", "cpu", "--out", "gpu", "--minutes", "9"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 1
    assert attempted == ["bad", "good"] and read_state()["bad"]["error"] == "no memory"
    monkeypatch.setattr(sys, "argv", [*command, "--only", "resumable"])
    for _ in range(5):  # an interrupted part that resumes may use any number of calls
        assert gpu.main() == 1
    expected = {"attempts": 0, "status": "interrupted", "seconds": 0.0, "error": "time limit reached"}
    assert read_state()["resumable"] == expected
    monkeypatch.setattr(sys, "argv", [*command, "--only", "bad"])
    assert gpu.main() == 1 and gpu.main() == 0, "a part is abandoned after three failed attempts"
    assert read_state()["bad"]["attempts"] == 3


def test_unknown_part_reports_the_known_parts(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_gpu(monkeypatch, "--only", "kernel")
    assert "the parts are: kernels" in capsys.readouterr().err


@pytest.mark.slow
def test_every_gpu_part_runs_at_small_size(monkeypatch, capsys):
    assert run_gpu(monkeypatch) == 0
    assert {entry["status"] for entry in read_state().values()} <= {"done", "skipped"}
    assert set(read_state()) == set(gpu_parts.PARTS)
