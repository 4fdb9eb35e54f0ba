"""Startup time: from the start of a process to the first training step of `digits/kd`.

The script starts pairs of new processes, in alternating order. The first process of a pair imports torch and builds an
SGD optimizer. The second process runs `kdbench train digits/kd` to the end of its first step (recipe, checks, plan,
data, weights of the trained teacher and its measured accuracy, logs) and exits. The teacher is trained once before. The
result is the difference between the two processes of a pair, in wall time and in processor time. Processor time
depends less on the load of the machine.

    python benchmarks/startup.py --out benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe_machine, quartiles, today, write_result

MINIMAL_CODE = """
import os, torch
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
os._exit(0)
"""
KDBENCH_CODE = """
import os, sys
from kdbench.report.console import ConsoleReporter

def progress(self, steps_done, phase=""):
    os._exit(0 if steps_done == 1 else 1)

ConsoleReporter.progress = progress
from kdbench.cli.main import main
main(sys.argv[1:])
os._exit(1)
"""


def environment() -> dict[str, str]:
    """Returns environment variables for the processes, with .pyc files enabled as for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def time_process(code: str, *arguments: str) -> tuple[float, float]:
    """Runs Python code in a new process and returns its wall time and processor time in seconds.

    Raises:
        SystemExit: the process failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a process exited with code {process.returncode}, expected 0")
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs of processes")
    parser.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard event files, the default of a recipe"
    )
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    machine = describe_machine("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"runs={scratch}", "device=cpu", f"tensorboard={str(args.tensorboard).lower()}"]
        arguments = ["train", "digits/kd", "fresh=true", *settings]
        teacher = [sys.executable, "-m", "kdbench", "train", "digits/teacher", *settings]
        subprocess.run(teacher, env=environment(), check=True, stdout=subprocess.DEVNULL)
        # Warm-up: file cache and .pyc files.
        time_process(MINIMAL_CODE)
        time_process(KDBENCH_CODE, *arguments)
        pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for number in range(args.pairs):
            if number % 2:  # alternating order: the second process of a pair may profit from the file cache
                recipe, minimal = time_process(KDBENCH_CODE, *arguments), time_process(MINIMAL_CODE)
            else:
                minimal, recipe = time_process(MINIMAL_CODE), time_process(KDBENCH_CODE, *arguments)
            pairs.append((minimal, recipe))
            print(f"pair {number + 1}: torch and SGD {minimal[0]:.2f} s, digits/kd {recipe[0]:.2f} s", flush=True)

    result: dict[str, Any] = {
        "what": "seconds from the start of a process to the end of the first step of digits/kd, over a process that "
        "imports torch and builds an SGD",
        "date": today(),
        "command": f"python benchmarks/startup.py --pairs {args.pairs}" + " --tensorboard" * args.tensorboard,
        "machine": machine,
    }
    for position, kind in enumerate(("wall", "processor")):
        minimal, recipe = ([pair[process][position] for pair in pairs] for process in (0, 1))
        result[f"{kind}_seconds"] = {
            "torch_and_sgd": quartiles(minimal, 3),
            "digits_kd": quartiles(recipe, 3),
            "above": quartiles([b - a for a, b in zip(minimal, recipe, strict=True)], 3),
        }
    result["pairs"] = [[[round(value, 3) for value in process] for process in pair] for pair in pairs]
    print(json.dumps({kind: result[f"{kind}_seconds"] for kind in ("wall", "processor")}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
