"""How much faster do several runs train as a gang? G seeds of one recipe together, against one run alone.

Contenders, in one process, each in a thread of its own, one at a time, in a new order each round:

    alone               the steps of one run, as `kdbench train` does them, without logs and evaluations
    gang, unstacked     G runs that take turns by steps (on CUDA on streams of their own)
    gang, stacked       the same with their students as one network of grouped convolutions

For a gang a step is a step of each of its runs. What counts is the time of that over a step alone, within a round:
1 is a gang for free, G is no gain at all. Weights are those of the seed: they do not change the time.

To repeat it (CIFAR-100 as for benchmarks/step.py):

    python benchmarks/gang.py --data DATA --out benchmarks/results/gang.json
    python benchmarks/gang.py --data DATA --device cuda --set precision=bf16 --set compile=cuda_graph
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import PacedTraining, Training, argument_parser, measure, quartiles, result_header, write_result

from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.engine.device import resolve_device
from kdbench.engine.train.runner import Runner
from kdbench.experiment.reopened import open_stage
from kdbench.speed.concurrent.dispatcher import ConcurrentRun, Dispatcher, Stack

BATCH = 64
RECIPE = """
dataset: cifar100
batch_size: 64
augment: [{type: crop, padding: 4}, flip]
teacher: TEACHER
student: STUDENT
terms:
  ce: {type: cross_entropy, weight: 0.1}
  kd: {type: kd, temperature: 4, weight: 0.9}
optimizer: {type: SGD, lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4}
epochs: 240
"""


def steps(recipe: Recipe, attend: Callable[[Runner], None], tick: Callable[[], None]) -> None:
    """Trains without end."""
    with open_stage(recipe) as stage:
        attend(stage.runner)
        for window in stage.feed.windows(0):
            stage.runner.begin_step()
            stage.runner.step(window)
            tick()


def alone(recipe: Recipe) -> Training:
    return lambda tick: steps(recipe, lambda runner: None, tick)


def together(recipes: Sequence[Recipe], stack: Stack, said: list[str]) -> Training:
    def train(tick: Callable[[], None]) -> None:
        device = resolve_device(recipes[0].device)
        gang: Dispatcher[None] = Dispatcher([f"seed={r.seed}" for r in recipes], device, stack=stack, say=said.append)

        def task(recipe: Recipe, own: Callable[[], None]) -> Callable[[ConcurrentRun], None]:
            def trained(member: ConcurrentRun) -> None:
                try:
                    steps(recipe, member.attend, own)
                except BaseException:
                    gang.stopped = True
                    raise

            return trained

        # The last member's step ends a round; whatever ends it ends all.
        ticks = [*itertools.repeat(lambda: None, len(recipes) - 1), tick]
        ended = gang.run([task(recipe, own) for recipe, own in zip(recipes, ticks, strict=True)])
        raise next(one for one in ended if isinstance(one, BaseException) and not isinstance(one, KeyboardInterrupt))

    return train


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-100")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="an override of the recipe")
    args = parser.parse_args()
    if args.quick:
        args.members, args.rounds, args.steps, args.teacher = 2, 2, 2, args.student
    pair = f"{args.teacher} -> {args.student}"
    result = result_header(f"{pair} on CIFAR-100, batch 64: a step of {args.members} runs over a step alone", __file__, args)
    torch.set_num_threads(args.threads)
    said: dict[str, list[str]] = {"gang, unstacked": [], "gang, stacked": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        file = Path(scratch, "gang.yaml")
        file.write_text(RECIPE.replace("TEACHER", args.teacher).replace("STUDENT", args.student))
        settings = [f"device={args.device}", f"data_root={args.data.resolve()}", f"runs={scratch}", *args.set]
        recipes = [load_recipe(str(file), [f"seed={seed}", *settings]) for seed in range(1, args.members + 1)]
        trainings: dict[str, Training] = {"alone": alone(recipes[0])}
        for form, told in said.items():
            trainings[form] = together(recipes, form == "gang, stacked", told)
        contenders = {form: PacedTraining(training, args.threads) for form, training in trainings.items()}
        speeds = measure(contenders, args.rounds, args.steps, args.device, batch=BATCH)
        for contender in contenders.values():
            contender.stop()

    spent = {form: [1000 * BATCH / speed for speed in values] for form, values in speeds.items()}
    over: dict[str, Any] = {
        form: quartiles([value / base for value, base in zip(values, spent["alone"], strict=True)], 3)
        for form, values in spent.items()
        if form != "alone"
    }
    result |= {
        "said": said,
        "milliseconds_per_step": {form: quartiles(values, 2) for form, values in spent.items()},
        "over_one_run": over,
        "turns": {form: [round(value, 2) for value in values] for form, values in spent.items()},
    }
    print(json.dumps({key: result[key] for key in ("said", "milliseconds_per_step", "over_one_run")}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
