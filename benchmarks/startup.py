"""How long from the start of a process to the first training step of `digits/kd`?

Pairs of fresh processes, in turns: one that imports torch and builds an SGD, which is the least that any training does,
and one that runs `kdbench train digits/kd` to the end of its first step (recipe, checks, plan, data, weights of the
trained teacher, its measured accuracy, logs) and ends there. The teacher is trained once before. What is told is the
difference within each pair: wall time, and the processor time of the process, which a busy machine changes less.

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

LEAST = """
import os, torch
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
os._exit(0)
"""
OURS = """
import os, sys
from kdbench.report.console import ConsoleReporter

def progress(self, done, phase=""):
    os._exit(0 if done == 1 else 1)

ConsoleReporter.progress = progress
from kdbench.cli.main import main
main(sys.argv[1:])
os._exit(1)
"""


def environment() -> dict[str, str]:
    """With compiled modules kept, as an installed package has them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def timed(code: str, *words: str) -> tuple[float, float]:
    """Returns wall and processor seconds of a fresh process that runs `code` and must exit with 0."""
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a process ended with {process.returncode} before it was through")
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of processes to measure")
    parser.add_argument("--tensorboard", action="store_true", help="with event files, as a recipe does by itself")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    args = parser.parse_args()
    machine = describe_machine("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"runs={scratch}", "device=cpu", f"tensorboard={str(args.tensorboard).lower()}"]
        words = ["train", "digits/kd", "fresh=true", *settings]
        teacher = [sys.executable, "-m", "kdbench", "train", "digits/teacher", *settings]
        subprocess.run(teacher, env=environment(), check=True, stdout=subprocess.DEVNULL)
        timed(LEAST)
        timed(OURS, *words)  # both once, so that files are at hand and modules are compiled
        pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for number in range(args.pairs):
            if number % 2:
                ours, least = timed(OURS, *words), timed(LEAST)
            else:
                least, ours = timed(LEAST), timed(OURS, *words)
            pairs.append((least, ours))
            print(f"pair {number + 1}: torch and an SGD {least[0]:.2f} s, digits/kd {ours[0]:.2f} s", flush=True)

    result: dict[str, Any] = {
        "what": "seconds from the start of a process to the end of the first step of digits/kd, over a process that "
        "imports torch and builds an SGD",
        "date": today(),
        "command": f"python benchmarks/startup.py --pairs {args.pairs}" + " --tensorboard" * args.tensorboard,
        "machine": machine,
    }
    for position, kind in enumerate(("wall", "processor")):
        least, ours = ([pair[who][position] for pair in pairs] for who in (0, 1))
        result[f"{kind}_seconds"] = {
            "torch_and_sgd": quartiles(least, 3),
            "digits_kd": quartiles(ours, 3),
            "above": quartiles([b - a for a, b in zip(least, ours, strict=True)], 3),
        }
    result["pairs"] = [[[round(value, 3) for value in one] for one in pair] for pair in pairs]
    print(json.dumps({kind: result[f"{kind}_seconds"] for kind in ("wall", "processor")}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
