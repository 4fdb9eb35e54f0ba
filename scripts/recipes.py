"""Trains every digits recipe whole, or those that are named, with one thread each; says how long its own part took and
what came out.

Every teacher that another recipe makes is trained first, so that each time is the recipe's own. Exit code 1 when a
recipe fails or takes longer than the limit.
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
    """Returns the recipe, the seconds that its own part took by the summary, and what came out."""
    command = [sys.executable, "-m", "kdbench", "train", recipe, f"runs={runs}", "tensorboard=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    folders = sorted((Path(runs) / recipe).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if done.returncode or not folders:
        return recipe, float("nan"), f"FAILED: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    summary = json.loads(folders[-1].read_text())
    scores = summary["last"]["metrics"]
    role = summary.get("export") or next(iter(scores))
    top1 = scores.get(role, next(iter(scores.values())))["test"]["top1"]
    return recipe, float(summary["wall_seconds"]), f"{role} {top1:.2f}"


def main() -> int:
    named = sys.argv[1:]
    names = named or sorted(f"digits/{path.stem}" for path in (ROOT / "recipes/digits").glob("*.yaml"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        f"scripts/recipes.py, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, commit {commit.stdout.strip()}",
        f"{len(names)} recipes, two at a time, one thread each, seed 1; seconds in training, last top-1 on test",
        "",
    ]
    began = time.monotonic()
    bad = []
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(2) as pool:
        texts = [(ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8") for name in names]
        for needed in sorted({found for text in texts for found in re.findall(r"recipe: (digits/\w+)", text)}):
            train(needed, runs)  # before two of them want to at the same time
        for recipe, seconds, told in pool.map(lambda name: train(name, runs), names):
            lines.append(f"{recipe:<36} {seconds:7.1f} s   {told}")
            print(lines[-1], flush=True)
            if not seconds < LIMIT:
                bad.append(recipe)
    last = f"longer than {LIMIT:.0f} s or failed: {', '.join(bad)}" if bad else f"all within {LIMIT:.0f} s"
    lines += ["", f"{last}; {time.monotonic() - began:.0f} s in all"]
    print(lines[-1])
    log = ROOT / "results/logs" / f"{datetime.now(timezone.utc):%Y-%m-%d}-recipes{'-some' if named else ''}.txt"
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
