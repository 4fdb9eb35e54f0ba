"""The benchmarks run, at toy size, and what they say of growth and of what is left to do is right."""

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


def result_of(main, monkeypatch, *words: str) -> dict:
    monkeypatch.setattr(
        sys, "argv", [f"{main.__module__}.py", "--device", "cpu", "--quick", "--out", "out.json", *words]
    )
    main()
    result = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert {"what", "date", "command", "machine"} <= set(result) and "out.json" not in result["command"]
    assert {"device", "torch", "kdbench", "threads"} <= set(result["machine"])
    return result


# Every part, and how its cost grows


def test_every_registered_part_can_be_built_and_fed():
    every = {("term", n) for n in TERMS.entries} | {("weigher", n) for n in SAMPLE_WEIGHTS.entries}
    assert set(operands.names()) == every | {("router", n) for n in ROUTERS.entries}
    for kind, name in operands.names():
        part = operands.build(kind, name, SMALL, "cpu")
        part.work()
        assert operands.count(part.work).operations > 0, f"{kind} {name}: say in OPERANDS what it reads"


@pytest.mark.parametrize("axis", AXES)
def test_no_part_grows_faster_than_it_should(axis):
    """Counted, not timed: elements written and FLOPs."""
    steep = {}
    for kind, name in operands.names():
        row = scaling.measure(kind, name, axis, AXES[axis], SMALL, "cpu", 0)
        if row["surprise"]:
            steep[f"{kind} {name}"] = (row["work_exponent"], row["allowed"])
    assert not steep, f"cost against {axis}, measured and allowed; EXPECTED in benchmarks/scaling.py has known ones"


def test_a_part_that_grows_too_fast_is_flagged(monkeypatch):
    """Negative control: a term over samples that compares all rows with all."""

    class Pairs(torch.nn.Module):
        def forward(self, student):
            return (student[:, None] - student[None]).square().sum((1, 2))

    def pairs(kind, name, size, device):
        student = torch.randn(size.batch, 10, requires_grad=True)
        return operands.Built(kind, name, Pairs(), {"student": student}, [student])

    monkeypatch.setattr(scaling, "build", pairs)
    assert scaling.measure("term", "kd", "batch", AXES["batch"], SMALL, "cpu", 0)["surprise"]


def test_an_exponent_is_that_of_the_larger_sizes():
    sizes = (1, 10, 100, 1000)
    assert scaling.exponent(sizes, [500 + 3 * x**2 for x in sizes]) == pytest.approx(2, abs=0.02)
    assert scaling.exponent(sizes, [7.0] * 4) == pytest.approx(0)


def test_a_view_is_no_work_and_a_bank_costs_the_rows_that_are_written():
    bank, rows = torch.zeros(1000, 4), torch.ones(3, 4)
    assert operands.count(lambda: rows.t()).elements == 0
    index = torch.tensor([1, 5, 7])

    def write() -> None:
        bank[index] = rows

    assert operands.count(write).elements == 12
    assert operands.count(lambda: rows @ rows.t()).flops == 2 * 3 * 4 * 3


# The scripts


def test_terms_are_shares_of_a_plain_step(monkeypatch, capsys):
    result = result_of(terms.main, monkeypatch, "--only", "kd", "crd", "--samples", "3")
    assert set(result["parts"]) == {"term kd", "term crd"}
    step = (result["plain_step_ms"]["before"]["median"] + result["plain_step_ms"]["after"]["median"]) / 2
    for part in result["parts"].values():
        assert part["share_of_step"] > 0 and part["ms"]["median"] < 50 * step


def test_scaling_writes_exponents(monkeypatch, capsys):
    result = result_of(scaling.main, monkeypatch, "--only", "rkd", "kd")
    assert result["surprises"] == [] and result["parts"]["term rkd"]["batch"]["allowed"] == 3
    assert result["parts"]["term kd"]["batch"]["work_exponent"] == pytest.approx(1, abs=0.1)


def test_data_paths_race(monkeypatch, capsys):
    result = result_of(data.main, monkeypatch, "--workers", "0", "--batch", "4")
    assert set(result["resident"]) == set(data.LISTS)
    assert set(result["resident"]["crop, flip"]["images_per_second"]) == {"kdbench", "PIL, DataLoader"}
    assert result["streaming"]["threads 1"]["kdbench_over"]["ImageFolder, DataLoader"]["median"] > 0


def test_seconds_are_of_one_call():
    calls = []
    found = common.time_calls(lambda: calls.append(1), "cpu", samples=3, min_seconds=0.0005)
    assert len(found) == 3 and max(found) < 0.0005 < len(calls) * max(found) * 10


# gpu.py


def go(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--out", "gpu", *words])
    return gpu.main()


def state() -> dict:
    return json.loads(Path("gpu/state.json").read_text(encoding="utf-8"))


QUICK = ["kernels", "teacher forward", "step captured bf16", "epochs", "accuracy float32 eager 1", "mdistiller"]


def test_what_a_part_had_started_ends_with_it():
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.finished(["sh", "-c", "sleep 60 & echo $! > pid; wait"], 1.0)
    started = int(Path("pid").read_text())
    for _ in range(50):  # whoever adopts it has to notice
        state = Path(f"/proc/{started}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("it goes on")
    assert gpu.finished(["sh", "-c", "echo why >&2; exit 3"], 9.0) == (3, "why\n")


def test_the_gpu_parts_run_at_toy_size_and_are_not_run_again(monkeypatch, capsys):
    assert go(monkeypatch, "--only", *QUICK) == 0
    assert {name: entry["status"] for name, entry in state().items()} == {
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
    monkeypatch.setattr(gpu, "measured", lambda *_: pytest.fail("it was done"))
    assert go(monkeypatch, "--only", *QUICK) == 0
    assert "nothing is left" in capsys.readouterr().out


def part(measure, minutes: float = 0.1, resumes: bool = False) -> gpu_parts.BenchmarkPart:
    return gpu_parts.BenchmarkPart("a part", measure, minutes, resumes=resumes)


def test_a_part_that_a_kill_cut_off_is_measured_again(monkeypatch, capsys):
    def killed(context):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "PARTS", {"one": part(killed), "two": part(lambda context: {"value": 2})})
    with pytest.raises(KeyboardInterrupt):
        go(monkeypatch, "--only", "one", "two")
    assert state()["one"]["status"] == "running" and "two" not in state()
    monkeypatch.setattr(gpu, "PARTS", {n: part(lambda context: {"value": 1}) for n in ("one", "two")})
    assert go(monkeypatch, "--only", "one", "two") == 0
    assert [entry["status"] for entry in state().values()] == ["done", "done"] and state()["one"]["attempts"] == 2


def test_what_does_not_fit_into_the_minutes_waits_and_what_fails_does_not_stop_the_rest(monkeypatch, capsys):
    went = []

    def attempt(name, args, seconds):
        went.append(name)
        return {"bad": ("failed", "no memory"), "long run": ("interrupted", "the minutes were over")}.get(
            name, ("done", "")
        )

    def nothing(context):
        return {}

    parts = {"bad": part(nothing), "good": part(nothing), "large": part(nothing, minutes=30)}
    monkeypatch.setattr(gpu, "PARTS", parts | {"long run": part(nothing, resumes=True)})
    monkeypatch.setattr(gpu, "attempt", attempt)
    real = ["gpu.py", "--device", "cpu", "--out", "gpu", "--minutes", "9"]
    monkeypatch.setattr(sys, "argv", real)
    assert gpu.main() == 1
    assert went == ["bad", "good"] and state()["bad"]["error"] == "no memory"
    monkeypatch.setattr(sys, "argv", [*real, "--only", "long run"])
    for _ in range(5):  # however often it is cut off, it comes on
        assert gpu.main() == 1
    assert state()["long run"] == {
        "attempts": 0,
        "status": "interrupted",
        "seconds": 0.0,
        "error": "the minutes were over",
    }
    monkeypatch.setattr(sys, "argv", [*real, "--only", "bad"])
    assert gpu.main() == 1 and gpu.main() == 0, "after three attempts it is left alone"
    assert state()["bad"]["attempts"] == 3


def test_a_part_that_is_not_there_is_told(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        go(monkeypatch, "--only", "kernel")
    assert "there are: kernels" in capsys.readouterr().err


@pytest.mark.slow
def test_every_gpu_part_runs_at_toy_size(monkeypatch, capsys):
    assert go(monkeypatch) == 0
    assert {entry["status"] for entry in state().values()} <= {"done", "skipped"}
    assert set(state()) == set(gpu_parts.PARTS)
