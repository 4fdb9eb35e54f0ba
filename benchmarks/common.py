"""What the benchmarks share: contenders that take turns in one process, medians with quartiles, the machine, the JSON.

Run a benchmark as a script (`python benchmarks/step.py ...`); Python then finds this file beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

import kdbench

Training = Callable[[Callable[[], None]], None]
"""Trains without end, and calls what it was given after every step."""


class TrainingEnd(BaseException):
    """Ends a training that has no end."""


class PacedTraining:
    """A training in a thread of its own that goes on a number of steps at a time."""

    def __init__(self, training: Training, threads: int) -> None:
        self.steps_left = 0
        self.stopped = False
        self.error: BaseException | None = None
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(training, threads), daemon=True)
        self.thread.start()

    def run_steps(self, count: int) -> None:
        """Returns after `count` more steps."""
        self.steps_left = count
        self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.stopped = True
        self.go.release()
        self.thread.join()

    def _run(self, training: Training, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
        try:
            self.go.acquire()
            training(self._tick)
        except TrainingEnd:
            pass
        except BaseException as error:
            self.error = error
            self.paused.release()

    def _tick(self) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            self.paused.release()
            self.go.acquire()
            if self.stopped:
                raise TrainingEnd


def measure(
    contenders: dict[str, PacedTraining], rounds: int, steps: int, device: str, *, batch: int
) -> dict[str, list[float]]:
    """Returns the images per second of every turn, by contender; the first round warms up and is left out.

    The contenders take turns of `steps` steps of `batch` images, in a new order each round.
    """
    shuffled = random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        order = list(contenders)
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contenders[name].run_steps(steps)
            if device != "cpu":
                torch.cuda.synchronize()
            speed = steps * batch / (time.perf_counter() - start)
            if number:
                speeds[name].append(speed)
        print(f"round {number}: " + ", ".join(f"{name} {s[-1]:.0f}" for name, s in speeds.items() if s), flush=True)
    return speeds


def quartiles(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits)}


def describe_machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{name}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "kdbench": kdbench.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    work: Callable[[], object], device: str | torch.device, *, samples: int, min_seconds: float = 0.005
) -> list[float]:
    """Seconds of one call of `work`, `samples` times. Each is the mean over as many calls as take `least` seconds."""
    calls = 1
    while True:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        spent = time.perf_counter() - start
        if spent >= min_seconds or calls >= 10_000:
            break
        calls = max(calls + 1, min(10_000, round(1.2 * calls * min_seconds / max(spent, 1e-9))))
    found = []
    for _ in range(samples):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        found.append((time.perf_counter() - start) / calls)
    return found


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--quick", action="store_true", help="small sizes, few samples: to see that it works")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    return parser


def result_header(what: str, script: str, args: argparse.Namespace) -> dict[str, Any]:
    """The head of a result: what was measured, when, by which command (without paths), and on which machine."""
    torch.set_num_threads(args.threads)
    told = {
        key: value
        for key, value in vars(args).items()
        if value is not None and value is not False and not _is_path(value)
    }
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in told.items()]
    command = " ".join([f"python benchmarks/{Path(script).name}", *flags])
    return {"what": what, "date": today(), "command": command, "machine": describe_machine(args.device)}


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, list) and any(isinstance(one, Path) for one in value))


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Writes a result as JSON; without `out` it has only been printed."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
