"""How does the cost of every term, weigher and router grow with the batch, the classes and the samples of the source?

For each part and each axis the size is raised step by step, and the exponent of the cost is fitted on the larger half:
once for what is done (elements written and FLOPs: exact, the same on every machine), once for the time. What grows
faster than it should is flagged: a term over samples has to be linear in the batch, one that couples rows may be
quadratic, and nothing but a memory may see the samples at all. `EXPECTED` has those whose maths is steeper.

    python benchmarks/scaling.py --out scaling.json
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from common import argument_parser, result_header, time_calls, write_result
from operands import REGISTRIES, Size, build, count, names

AXES: dict[str, Sequence[int]] = {
    "batch": (16, 32, 64, 128, 256),
    "classes": (10, 32, 100, 316, 1000),
    "samples": (1_000, 10_000, 50_000, 200_000),
}
QUICK: dict[str, Sequence[int]] = {"batch": (8, 16, 32), "classes": (8, 16, 32), "samples": (500, 1_000, 2_000)}
EXPECTED = {
    ("rkd", "batch"): (3, "angles of all triplets of rows, as in the paper"),
    ("cmi", "classes"): (2, "a mean prediction of each class"),
    ("crd", "samples"): (1, "one product with its bank of all samples, instead of a gather of thousands of rows"),
}
"""(part, axis) -> the exponent that its maths has, and why; beyond those of `usual`."""
SLACK = 0.2


def usual(kind: str, name: str, axis: str) -> float:
    """The exponent that a part may have: of the batch 1 (2 where rows are coupled), of the classes 1, of samples 0."""
    if (name, axis) in EXPECTED:
        return EXPECTED[name, axis][0]
    couples = kind == "term" and REGISTRIES[kind].entry(name).facts.get("space") == "batch"
    return {"batch": 2.0 if couples else 1.0, "classes": 1.0, "samples": 0.0}[axis]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of log cost over log size on the larger half of the sizes, where constant parts weigh least."""
    first = min(len(sizes) // 2, len(sizes) - 2)
    xs, ys = ([math.log(max(value, 1e-12)) for value in values[first:]] for values in (sizes, costs))
    return statistics.linear_regression(xs, ys).slope


def measure(
    kind: str, name: str, axis: str, sizes: Sequence[int], base: Size, device: str, samples: int
) -> dict[str, Any]:
    """One part along one axis. samples: timings of each size; 0 times nothing."""
    work, time = [], []
    for value in sizes:
        part = build(kind, name, replace(base, **{axis: value}), device)
        part.work()
        work.append(count(part.work).total)
        if samples:
            time.append(statistics.median(time_calls(part.work, device, samples=samples)))
    allowed = usual(kind, name, axis)
    found = exponent(sizes, work)
    row: dict[str, Any] = {"allowed": allowed, "work_exponent": round(found, 3), "work": work}
    row["surprise"] = found > allowed + SLACK
    if time:
        row |= {"time_exponent": round(exponent(sizes, time), 3), "ms": [round(1000 * value, 4) for value in time]}
    if (name, axis) in EXPECTED:
        row["why"] = EXPECTED[name, axis][1]
    return row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=5, help="timings of each size")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these alone")
    args = parser.parse_args()
    axes, base = AXES, Size()
    if args.quick:
        axes, base, args.samples = QUICK, Size(8, 10, 500), 0
    result = result_header("how the cost of every term, weigher and router grows", __file__, args)
    parts: dict[str, dict[str, Any]] = {}
    for kind, name in names():
        if not args.only or name in args.only:
            rows = {a: measure(kind, name, a, sizes, base, args.device, args.samples) for a, sizes in axes.items()}
            parts[f"{kind} {name}"] = rows
            told = "  ".join(
                f"{axis} {row['work_exponent']:5.2f}" + (f" (time {row['time_exponent']:5.2f})" if args.samples else "")
                for axis, row in rows.items()
            )
            flagged = [axis for axis, row in rows.items() if row["surprise"]]
            print(f"{kind + ' ' + name:28}{told}" + (f"  <- {', '.join(flagged)}" if flagged else ""), flush=True)
    surprises = [f"{part}: {axis}" for part, rows in parts.items() for axis, row in rows.items() if row["surprise"]]
    result |= {"sizes": {axis: list(sizes) for axis, sizes in axes.items()}, "surprises": surprises, "parts": parts}
    print(f"steeper than they should be: {', '.join(surprises) or 'none'}")
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
