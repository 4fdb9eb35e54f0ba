"""Records the losses of the first steps of every shipped recipe, or compares the losses with an earlier record.

    scripts/record_losses.py --write FILE [RECIPE ...]     records
    scripts/record_losses.py --compare FILE [RECIPE ...]   records, and exits 1 when a number differs in any bit

Use this script to check that a refactoring does not change any result: record before, compare after, on the same
machine with the same library versions. Every stage is cut to 20 steps, so that artifacts and evaluations between
stages are covered too. CIFAR-100 recipes run on synthetic images of the same shape, with untrained teachers. Digits
recipes run on their own data, and their teachers are trained first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
LONGER = {"digits/consensus": 200}
"""Recipe -> number of steps, for recipes in which a later stage needs networks that agree on enough samples."""
CIFAR = "dataset={type: synthetic, shape: [3, 32, 32], classes: 100, samples: 256}"
LEFT_OUT = ("images_per_s", "seconds", "time_fractions", "epoch", "lr", "event")


def shorten(recipe: Any, name: str) -> Any:
    """Returns a loaded recipe with every stage cut to `STEPS` steps, or to the number in `LONGER`."""
    stages = []
    for stage in recipe.stages:
        roles = stage.roles
        if name.startswith("cifar100/"):
            roles = {n: replace(r, weights=None) if r.weights and r.weights.recipe else r for n, r in roles.items()}
        limit = LONGER.get(name, STEPS)
        length = stage.steps if stage.steps is not None else limit if stage.epochs else 0
        stages.append(replace(stage, roles=roles, epochs=None, steps=min(length, limit), log_every=1))
    return replace(recipe, stages=tuple(stages))


def record(name: str, runs: str, path: Path) -> None:
    """Trains one shortened recipe in this process and writes the lines of its log, without times, to `path`."""
    from kdbench.config.load import load_recipe
    from kdbench.experiment.run import run

    overrides = [f"runs={runs}", "tensorboard=false", "device=cpu"]
    if name.startswith("cifar100/"):
        overrides += [CIFAR, "batch_size=16", "eval_batch_size=64"]
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run(shorten(load_recipe(name, overrides), name))
    lines = [json.loads(line) for line in (outcome.folder.path / "metrics.jsonl").read_text().splitlines()]
    path.write_text(json.dumps([compact(line) for line in lines]))


def compact(line: dict[str, Any]) -> dict[str, Any]:
    """Returns a line of the log without the keys in `LEFT_OUT`. Each term becomes [loss, weighted loss]."""
    values = {key: value for key, value in line.items() if key not in LEFT_OUT}
    if "terms" in line:
        values["terms"] = {name: [term["loss"], term["weighted"]] for name, term in line["terms"].items()}
    return values


def record_all(names: list[str], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Records every recipe in a separate process with one thread. Recipes with the same teacher share its run.

    Returns:
        Recipe -> lines of its log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        runs = str(Path(scratch, "runs"))

        def record_in_process(name: str) -> list[dict[str, Any]]:
            path = Path(scratch, name.replace("/", "-") + ".json")
            command = [sys.executable, __file__, "--recipe", name, "--runs", runs, "--out", str(path)]
            process = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
            if process.returncode:
                print(f"{name} failed:\n{process.stderr[-4000:]}", file=sys.stderr, flush=True)
                return [{"failed": process.stderr.strip().splitlines()[-1]}]
            print(f"{name}: recorded", file=sys.stderr, flush=True)
            return json.loads(path.read_text())

        # Two processes that need the same teacher would wait for each other, so two recipes train all teachers first.
        teacher_recipes = [name for name in ("digits/kd", "digits/takd") if name in names]
        records = {name: record_in_process(name) for name in teacher_recipes}
        with ThreadPoolExecutor(jobs) as pool:
            student_recipes = [name for name in names if name not in teacher_recipes]
            records |= dict(zip(student_recipes, pool.map(record_in_process, student_recipes), strict=True))
    return {name: records[name] for name in names}


def first_difference(before: Any, after: Any, path: str = "") -> str | None:
    """Returns a text with the path of the first value that differs and the two values, or None if all are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key), after.get(key)) for key in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(number, *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        return None if before == after else f"{path}: {repr(before)[:100]} before, {repr(after)[:300]} after"
    differences = (first_difference(old, new, f"{path}/{key}") for key, old, new in pairs)
    return next((difference for difference in differences if difference is not None), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names of recipes; default: all recipes of FILE or of the project")
    parser.add_argument("--write", type=Path, metavar="FILE", help="record the losses into this file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare the losses with this file")
    parser.add_argument("--jobs", type=int, default=2, help="number of recipes that train at the same time")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.recipe:
        record(arguments.recipe, arguments.runs, arguments.out)
        return 0
    files = (path.relative_to(ROOT / "recipes").with_suffix("") for path in (ROOT / "recipes").glob("*/*.yaml"))
    names = arguments.recipes or sorted(path.as_posix() for path in files)
    before: dict[str, Any] = {}
    if arguments.compare is not None:
        before = json.loads(arguments.compare.read_text())
        names = [name for name in arguments.recipes or before]
    records = record_all(names, arguments.jobs)
    if arguments.write is not None:
        body = ",\n".join(f"{json.dumps(name)}: {json.dumps(lines)}" for name, lines in records.items())
        arguments.write.write_text("{\n" + body + "\n}\n")
    if arguments.compare is None:
        return 0
    different = [(n, d) for n in names if (d := first_difference(before[n], records[n])) is not None]
    for name, difference in different:
        print(f"{name}{difference}")
    steps = sum("terms" in line for name in names for line in before[name])
    print(f"{len(names) - len(different)} of {len(names)} recipes are equal to the last bit ({steps} steps compared)")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
