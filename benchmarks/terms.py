"""Cost of each term, sample weight and router as a fraction of a plain training step.

The plain step is kdbench's: a resnet20 on CIFAR-100 images, batch 64, cross-entropy, SGD. The cost of a part is its
forward pass and its backward pass into the student operand, on operands of realistic size: logits of 100 classes, the
last map (64 x 8 x 8) or its mean, tokens of a small transformer.

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
    """Returns the seconds of several plain training steps (cross-entropy only), after three warm-up steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.yaml"
        text = RECIPE.format(classes=classes, samples=max(2048, 2 * classes), model=model, batch=batch)
        file.write_text(text, encoding="utf-8")
        with open_stage(load_recipe(str(file), [f"device={device}", f"runs={folder}"])) as stage:
            windows = stage.feed.windows(0)
            for _ in range(3):
                run_step(stage.runner, windows)
            return time_calls(lambda: run_step(stage.runner, windows), device, samples=samples)


def measure(device: str, size: Size, samples: int, only: list[str] | None) -> dict[str, dict[str, Any]]:
    """Measures time and work of every term, sample weight and router, or only of the names in `only`."""
    results: dict[str, dict[str, Any]] = {}
    for kind, name in names():
        if only and name not in only:
            continue
        part = build(kind, name, size, device)
        part.work()  # warm-up, so that one-time allocations are not measured
        work = count(part.work)
        seconds = time_calls(part.work, device, samples=samples)
        results[f"{kind} {name}"] = {
            "ms": quartiles([1000 * value for value in seconds], 4),
            "operations": work.operations,
            "elements": work.elements,
            "flops": work.flops,
            "largest_tensor": list(work.largest),
            "operands": part.shapes,
        }
    return results


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--samples", type=int, default=15, help="timings of each part")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only these parts")
    args = parser.parse_args()
    model, source_size = ("resnet20", 50_000)
    if args.quick:
        args.batch, args.samples, model, source_size = min(args.batch, 8), 3, "resnet8x4", 500
    result = result_header("cost of every term, sample weight and router as a fraction of a plain step", __file__, args)
    # The plain step is measured before and after the parts, to average over changes of the machine's speed.
    before = plain_step(args.device, args.batch, args.classes, model, args.samples)
    parts = measure(args.device, Size(args.batch, args.classes, source_size), args.samples, args.only)
    after = plain_step(args.device, args.batch, args.classes, model, args.samples)
    step = statistics.median([*before, *after])
    for part in parts.values():
        part["fraction_of_step"] = round(part["ms"]["median"] / 1000 / step, 5)
    result |= {
        "size": {"batch": args.batch, "classes": args.classes, "samples": source_size, "student": model},
        "plain_step_ms": {
            "before": quartiles([1000 * value for value in before], 4),
            "after": quartiles([1000 * value for value in after], 4),
        },
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["fraction_of_step"])),
    }
    print(f"plain step: {1000 * step:.3f} ms on {result['machine']['device']}")
    for name, part in result["parts"].items():
        cost = f"{100 * part['fraction_of_step']:8.2f} %  {part['ms']['median']:9.4f} ms"
        print(f"{name:28}{cost}  {part['operations']:5} operations")
    write_result(result, args.out)
    if args.out is None:
        print(json.dumps({key: result[key] for key in ("command", "machine")}))


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
