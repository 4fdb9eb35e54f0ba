"""Helpers of the benchmarks: alternating trainings in one process, quartiles, machine description, JSON results.

Run a benchmark as a script (`python benchmarks/step.py ...`), so that Python finds this file in the same folder.
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
"""Function that trains until its argument raises an exception. It calls the argument after every step."""


class TrainingEnd(BaseException):
    """Raised inside a training to end it."""


class PacedTraining:
    """A training in a separate thread that runs a given number of steps at a time.

    Args:
        training: the training.
        threads: number of intra-op threads of torch in this training.
    """

    def __init__(self, training: Training, threads: int) -> None:
        self.steps_left = 0
        self.stopped = False
        self.error: BaseException | None = None
        self.resume, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(training, threads), daemon=True)
        self.thread.start()

    def run_steps(self, count: int) -> None:
        """Runs `count` more steps. Raises the error of the training if the training failed."""
        self.steps_left = count
        self.resume.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends the training and its thread."""
        self.stopped = True
        self.resume.release()
        self.thread.join()

    def _run(self, training: Training, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP stores this number per thread
        try:
            self.resume.acquire()
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
            self.resume.acquire()
            if self.stopped:
                raise TrainingEnd


def measure(
    contenders: dict[str, PacedTraining], rounds: int, steps: int, device: str, *, batch: int
) -> dict[str, list[float]]:
    """Measures the images per second of contenders that alternate in one process, in a new order each round.

    Alternating distributes the load of other processes over all contenders.

    Args:
        contenders: name -> training.
        rounds: number of measured rounds; one more round before them warms up.
        steps: number of steps per turn (the steps of one contender before the next contender runs).
        device: cpu or cuda.
        batch: images per step.

    Returns:
        Name -> images per second of every turn.
    """
    generator = random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        order = list(contenders)
        generator.shuffle(order)
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
    """Returns median, q1 and q3, rounded to `digits` decimals."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits)}


def describe_machine(device: str) -> dict[str, Any]:
    """Returns device, number of threads, load average and library versions, for the header of a result."""
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


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    work: Callable[[], object], device: str | torch.device, *, samples: int, min_seconds: float = 0.005
) -> list[float]:
    """Measures the seconds of one call of `work`.

    Args:
        work: the function to time.
        device: device to synchronize.
        samples: number of measurements.
        min_seconds: minimum duration of one measurement. A measurement is the mean over as many calls as needed.

    Returns:
        Seconds per call, one value per measurement.
    """
    calls = 1
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        duration = time.perf_counter() - start
        if duration >= min_seconds or calls >= 10_000:
            break
        calls = max(calls + 1, min(10_000, round(1.2 * calls * min_seconds / max(duration, 1e-9))))
    durations = []
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        durations.append((time.perf_counter() - start) / calls)
    return durations


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Builds an argument parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="intra-op threads of torch on the CPU"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes and few samples, to check that the benchmark runs"
    )
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    return parser


def result_header(what: str, script: str, args: argparse.Namespace) -> dict[str, Any]:
    """Sets torch's number of threads and returns the header of a result: measurement, date, command and machine.

    Args:
        what: description of the measurement.
        script: file of the benchmark.
        args: arguments of the benchmark. The command in the header contains no paths.
    """
    torch.set_num_threads(args.threads)
    arguments = {
        key: value
        for key, value in vars(args).items()
        if value is not None and value is not False and not _is_path(value)
    }
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in arguments.items()]
    command = " ".join([f"python benchmarks/{Path(script).name}", *flags])
    return {"what": what, "date": today(), "command": command, "machine": describe_machine(args.device)}


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, list) and any(isinstance(item, Path) for item in value))


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def write_result(result: dict[str, Any], out: Path | None) -> None:
    """Writes a result as JSON, if the user gave an output file."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
