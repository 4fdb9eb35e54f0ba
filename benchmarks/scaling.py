"""Scaling of every term, sample weight and router with the batch size, the classes and the samples of the source.

Each part is measured at increasing sizes along each axis. The exponent of the cost is fitted on the larger half of the
sizes, for the counted work (elements written and FLOPs, equal on every machine) and for the time. Parts that grow
faster than allowed are flagged. A loss per row must be linear in the batch size, and a loss that couples rows may be
quadratic. Only terms that store one vector per sample may depend on the number of samples. `EXPECTED` lists the parts
whose definition requires a faster growth.

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
"""(part, axis) -> exponent of its mathematics and the reason, if it differs from `allowed_exponent`."""
SLACK = 0.2


def allowed_exponent(kind: str, name: str, axis: str) -> float:
    """Returns the allowed exponent of the cost along an axis.

    It is 1 for the batch size (2 if the loss couples rows), 1 for the classes, and 0 for the samples.
    """
    if (name, axis) in EXPECTED:
        return EXPECTED[name, axis][0]
    couples = kind == "term" and REGISTRIES[kind].entry(name).facts.get("space") == "batch"
    return {"batch": 2.0 if couples else 1.0, "classes": 1.0, "samples": 0.0}[axis]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Fits the exponent of the cost: the slope of log cost over log size.

    Only the larger half of the sizes is used, because constant costs matter least there.
    """
    start = min(len(sizes) // 2, len(sizes) - 2)
    xs, ys = ([math.log(max(value, 1e-12)) for value in values[start:]] for values in (sizes, costs))
    return statistics.linear_regression(xs, ys).slope


def measure(
    kind: str, name: str, axis: str, sizes: Sequence[int], base: Size, device: str, samples: int
) -> dict[str, Any]:
    """Measures the cost of one part (a term, sample weight or router) at several sizes along one axis.

    Args:
        kind: "term", "sample weight" or "router".
        name: name of the part.
        axis: batch, classes or samples.
        sizes: sizes along this axis.
        base: sizes along the two other axes.
        device: cpu or cuda.
        samples: number of timings per size; 0: no times are measured.

    Returns:
        Allowed exponent, counted work and its exponent, `flagged` (whether the growth is too fast), and the measured
        times with their exponent.
    """
    work, time = [], []
    for value in sizes:
        part = build(kind, name, replace(base, **{axis: value}), device)
        part.work()
        work.append(count(part.work).total)
        if samples:
            time.append(statistics.median(time_calls(part.work, device, samples=samples)))
    allowed = allowed_exponent(kind, name, axis)
    work_exponent = exponent(sizes, work)
    row: dict[str, Any] = {"allowed": allowed, "work_exponent": round(work_exponent, 3), "work": work}
    row["flagged"] = work_exponent > allowed + SLACK
    if time:
        row |= {"time_exponent": round(exponent(sizes, time), 3), "ms": [round(1000 * value, 4) for value in time]}
    if (name, axis) in EXPECTED:
        row["why"] = EXPECTED[name, axis][1]
    return row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=5, help="timings of each size; 0 only counts")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only these parts")
    args = parser.parse_args()
    axes, base = AXES, Size()
    if args.quick:
        axes, base, args.samples = QUICK, Size(8, 10, 500), 0
    result = result_header("scaling of every term, sample weight and router", __file__, args)
    parts: dict[str, dict[str, Any]] = {}
    for kind, name in names():
        if not args.only or name in args.only:
            rows = {a: measure(kind, name, a, sizes, base, args.device, args.samples) for a, sizes in axes.items()}
            parts[f"{kind} {name}"] = rows
            exponents = "  ".join(
                f"{axis} {row['work_exponent']:5.2f}" + (f" (time {row['time_exponent']:5.2f})" if args.samples else "")
                for axis, row in rows.items()
            )
            flagged = [axis for axis, row in rows.items() if row["flagged"]]
            print(f"{kind + ' ' + name:28}{exponents}" + (f"  <- {', '.join(flagged)}" if flagged else ""), flush=True)
    flagged_parts = [f"{part}: {axis}" for part, rows in parts.items() for axis, row in rows.items() if row["flagged"]]
    result |= {"sizes": {axis: list(sizes) for axis, sizes in axes.items()}, "flagged": flagged_parts, "parts": parts}
    print(f"steeper than allowed: {', '.join(flagged_parts) or 'none'}")
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
