"""Records the losses of the first steps of every shipped recipe, or compares them with an earlier record.

    scripts/record_losses.py --write FILE [RECIPE ...]     records
    scripts/record_losses.py --compare FILE [RECIPE ...]   records, and exits 1 when a number differs in any bit

A change of the code that must not change what is computed is checked with it: record before, compare after, on the
same machine with the same versions. Every stage is cut to 20 steps, so that artifacts and evaluations between stages
are covered too. CIFAR-100 recipes run on synthetic images of the same shape, with untrained teachers; digits recipes
run on their own data, and their teachers are trained first.
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
"""Recipes in which a later stage needs networks that agree on enough samples."""
CIFAR = "dataset={type: synthetic, shape: [3, 32, 32], classes: 100, samples: 256}"
LEFT_OUT = ("images_per_s", "seconds", "time_fractions", "epoch", "lr", "event")


def shorten(recipe: Any, name: str) -> Any:
    """Cuts every stage of a loaded recipe to `STEPS` steps, or the recipe's number in `LONGER`."""
    stages = []
    for stage in recipe.stages:
        roles = stage.roles
        if name.startswith("cifar100/"):
            roles = {n: replace(r, weights=None) if r.weights and r.weights.recipe else r for n, r in roles.items()}
        most = LONGER.get(name, STEPS)
        length = stage.steps if stage.steps is not None else most if stage.epochs else 0
        stages.append(replace(stage, roles=roles, epochs=None, steps=min(length, most), log_every=1))
    return replace(recipe, stages=tuple(stages))


def record(name: str, runs: str, path: Path) -> None:
    """Trains one shortened recipe in this process and writes its log, without times, to `path`."""
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
    """Keeps what the computation determines: of each term its loss and its weighted loss; times are left out."""
    kept = {key: value for key, value in line.items() if key not in LEFT_OUT}
    if "terms" in line:
        kept["terms"] = {name: [term["loss"], term["weighted"]] for name, term in line["terms"].items()}
    return kept


def record_all(names: list[str], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Records every recipe in a process of its own with one thread; teachers of the digits recipes are trained once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        runs = str(Path(scratch, "runs"))

        def one(name: str) -> list[dict[str, Any]]:
            path = Path(scratch, name.replace("/", "-") + ".json")
            command = [sys.executable, __file__, "--one", name, "--runs", runs, "--out", str(path)]
            done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                print(f"{name} failed:\n{done.stderr[-4000:]}", file=sys.stderr, flush=True)
                return [{"failed": done.stderr.strip().splitlines()[-1]}]
            print(f"{name}: recorded", file=sys.stderr, flush=True)
            return json.loads(path.read_text())

        # Two processes that need the same teacher would wait for each other, so teachers come first.
        first = [name for name in ("digits/kd", "digits/takd") if name in names]
        records = {name: one(name) for name in first}
        with ThreadPoolExecutor(jobs) as pool:
            rest = [name for name in names if name not in first]
            records |= dict(zip(rest, pool.map(one, rest), strict=True))
    return {name: records[name] for name in names}


def first_difference(before: Any, after: Any, path: str = "") -> str | None:
    """Returns the path of the first value that differs in two records, with both values; None when all are equal."""
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
    parser.add_argument("recipes", nargs="*", help="names of recipes; default: all that the file or the project has")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        record(arguments.one, arguments.runs, arguments.out)
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
    print(f"{len(names) - len(different)} of {len(names)} recipes equal to the last bit ({steps} steps compared)")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
