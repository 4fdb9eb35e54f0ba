"""What does each term cost, as a share of a plain step?

The plain step is kdbench's own: a resnet20 on CIFAR-100 images, batch 64, cross-entropy, SGD. A term's cost is its
forward and its backward into what the student gave, on operands of the sizes that it would have there: logits of 100
classes, the last map (64 x 8 x 8) or its mean, tokens of a small transformer. Weighers and routers are measured alike.

    python benchmarks/terms.py --out terms.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, quartiles, result_header, time_calls, write_result
from operands import Size, build, count, names

from kdbench.config.load import load_recipe
from kdbench.experiment.reopened import open_stage
from kdbench.speed.profiling.profiler import run_step

RECIPE = """
dataset: {{type: synthetic, shape: [3, 32, 32], classes: {classes}, samples: {samples}}}
student: {model}
terms: {{ce: cross_entropy}}
optimizer: {{type: SGD, lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4}}
batch_size: {batch}
epochs: 240
"""


def plain_step(device: str, batch: int, classes: int, model: str, samples: int) -> list[float]:
    """Seconds of plain steps, after three that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.yaml"
        text = RECIPE.format(classes=classes, samples=max(2048, 2 * classes), model=model, batch=batch)
        file.write_text(text, encoding="utf-8")
        with open_stage(load_recipe(str(file), [f"device={device}", f"runs={folder}"])) as found:
            windows = found.feed.windows(0)
            for _ in range(3):
                run_step(found.runner, windows)
            return time_calls(lambda: run_step(found.runner, windows), device, samples=samples)


def measure(device: str, size: Size, samples: int, only: list[str] | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, name in names():
        if only and name not in only:
            continue
        part = build(kind, name, size, device)
        part.work()  # what a first call makes is no part of the cost
        counted = count(part.work)
        spent = time_calls(part.work, device, samples=samples)
        found[f"{kind} {name}"] = {
            "ms": quartiles([1000 * value for value in spent], 4),
            "operations": counted.operations,
            "elements": counted.elements,
            "flops": counted.flops,
            "largest_tensor": list(counted.largest),
            "operands": part.shapes,
        }
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--samples", type=int, default=15, help="timings of each part")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these alone")
    args = parser.parse_args()
    model, remembered = ("resnet20", 50_000)
    if args.quick:
        args.batch, args.samples, model, remembered = min(args.batch, 8), 3, "resnet8x4", 500
    result = result_header("cost of every term, weigher and router as a share of a plain step", __file__, args)
    before = plain_step(args.device, args.batch, args.classes, model, args.samples)
    parts = measure(args.device, Size(args.batch, args.classes, remembered), args.samples, args.only)
    after = plain_step(args.device, args.batch, args.classes, model, args.samples)
    step = statistics.median([*before, *after])
    for part in parts.values():
        part["share_of_step"] = round(part["ms"]["median"] / 1000 / step, 5)
    result |= {
        "size": {"batch": args.batch, "classes": args.classes, "samples": remembered, "student": model},
        "plain_step_ms": {
            "before": quartiles([1000 * value for value in before], 4),
            "after": quartiles([1000 * value for value in after], 4),
        },
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["share_of_step"])),
    }
    print(f"plain step: {1000 * step:.3f} ms on {result['machine']['device']}")
    for name, part in result["parts"].items():
        told = f"{100 * part['share_of_step']:8.2f} %  {part['ms']['median']:9.4f} ms"
        print(f"{name:28}{told}  {part['operations']:5} operations")
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
