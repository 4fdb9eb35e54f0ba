"""Trains the digits recipes with one thread each, and writes a log with the training time and the result of each.

    scripts/recipes.py [RECIPE ...]     default: every digits recipe

Teachers are trained first, so that the time of a recipe does not include the training of its teacher. The exit code
is 1 if a recipe fails or takes longer than the limit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60.0


def train(recipe: str, runs: str) -> tuple[str, float, str]:
    """Trains a recipe.

    Returns:
        Name of the recipe, training seconds, and text with the exported role (network) and its last top-1 accuracy.
    """
    command = [sys.executable, "-m", "kdbench", "train", recipe, f"runs={runs}", "tensorboard=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    paths = sorted((Path(runs) / recipe).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if process.returncode or not paths:
        error = process.stderr.strip().splitlines()[-1:] or process.returncode
        return recipe, float("nan"), f"FAILED: {error}"
    summary = json.loads(paths[-1].read_text())
    scores = summary["last"]["metrics"]
    role = summary.get("export") or next(iter(scores))
    top1 = scores.get(role, next(iter(scores.values())))["test"]["top1"]
    return recipe, float(summary["wall_seconds"]), f"{role} {top1:.2f}"


def teachers(recipes: list[str]) -> list[str]:
    """Returns the recipes whose students are the teachers of other recipes."""
    texts = [(ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8") for recipe in recipes]
    return sorted({name for text in texts for name in re.findall(r"recipe: (digits/\w+)", text)})


def main() -> int:
    """Trains the recipes, prints and writes the log, and returns the exit code."""
    arguments = sys.argv[1:]
    recipes = arguments or sorted(f"digits/{path.stem}" for path in (ROOT / "recipes/digits").glob("*.yaml"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        f"scripts/recipes.py, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit.stdout.strip()}",
        f"{len(recipes)} recipes, two at a time, one thread each, seed 1; training seconds, last top-1 on test",
        "",
    ]
    start = time.monotonic()
    failures = []
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(2) as pool:
        for teacher in teachers(recipes):
            train(teacher, runs)  # one after another: two processes with the same teacher would wait for each other
        for recipe, seconds, result in pool.map(lambda name: train(name, runs), recipes):
            lines.append(f"{recipe:<36} {seconds:7.1f} s   {result}")
            print(lines[-1], flush=True)
            if not seconds < LIMIT:  # also true for NaN, the time of a failed recipe
                failures.append(recipe)
    verdict = f"longer than {LIMIT:.0f} s or failed: {', '.join(failures)}" if failures else f"all within {LIMIT:.0f} s"
    lines += ["", f"{verdict}; {time.monotonic() - start:.0f} s in all"]
    print(lines[-1])
    log = ROOT / "results/logs" / f"{datetime.now(timezone.utc):%Y-%m-%d}-recipes{'-some' if arguments else ''}.txt"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
