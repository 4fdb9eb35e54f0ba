"""Training speed of several concurrent runs in one process: N seeds of one recipe against a single run.

Contenders, which alternate in one process in a new order each round:

    single                  the steps of one run, as in `kdbench train`, without logs and evaluations
    concurrent              N runs that alternate by steps (on CUDA in separate streams)
    concurrent, stacked     the same, with all students stacked into one network of grouped convolutions

A step of concurrent runs consists of one step of each run. The result is the time of this step divided by the time of
a single run's step in the same round: 1 means that the additional runs are free, N means that there is no gain. All
weights are random, which does not change the time.

To reproduce (CIFAR-100 as for benchmarks/step.py):

    python benchmarks/concurrent_runs.py --data DATA --out benchmarks/results/concurrent_runs.json
    python benchmarks/concurrent_runs.py --data DATA --device cuda --set precision=bf16 --set compile=cuda_graph
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import PacedTraining, Training, argument_parser, measure, quartiles, result_header, write_result

from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.engine.device import resolve_device
from kdbench.engine.train.runner import Runner
from kdbench.experiment.reopened import open_stage
from kdbench.speed.concurrent.dispatcher import ConcurrentRun, Dispatcher, StackOption

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


def train_steps(recipe: Recipe, on_start: Callable[[Runner], None], tick: Callable[[], None]) -> None:
    """Trains until `tick` raises an exception.

    Calls `on_start` with the runner before the first step and `tick` after every step.
    """
    with open_stage(recipe) as stage:
        on_start(stage.runner)
        for window in stage.feed.windows(0):
            stage.runner.begin_step()
            stage.runner.step(window)
            tick()


def single_run(recipe: Recipe) -> Training:
    return lambda tick: train_steps(recipe, lambda runner: None, tick)


def concurrent_runs(recipes: Sequence[Recipe], stack: StackOption, notices: list[str]) -> Training:
    """Returns a training of several concurrent runs. Messages of the runs are appended to `notices`."""

    def train(tick: Callable[[], None]) -> None:
        labels = [f"seed={recipe.seed}" for recipe in recipes]
        device = resolve_device(recipes[0].device)
        dispatcher: Dispatcher[None] = Dispatcher(labels, device, stack=stack, notice=notices.append)

        def build_task(recipe: Recipe, run_tick: Callable[[], None]) -> Callable[[ConcurrentRun], None]:
            def task(run: ConcurrentRun) -> None:
                try:
                    train_steps(recipe, run.join, run_tick)
                except BaseException:
                    dispatcher.stopped = True
                    raise

            return task

        # The last run's step completes a round; an error of one run ends all.
        ticks = [*itertools.repeat(lambda: None, len(recipes) - 1), tick]
        tasks = [build_task(recipe, run_tick) for recipe, run_tick in zip(recipes, ticks, strict=True)]
        results = dispatcher.run_all(tasks)
        raise next(
            result
            for result in results
            if isinstance(result, BaseException) and not isinstance(result, KeyboardInterrupt)
        )

    return train


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-100")
    parser.add_argument("--runs", type=int, default=4, help="number of concurrent runs")
    parser.add_argument("--teacher", default="resnet56", help="model of the teacher")
    parser.add_argument("--student", default="resnet20", help="model of the student")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds")
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="override of the recipe")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.rounds, args.steps, args.teacher = 2, 2, 2, args.student
    pair = f"{args.teacher} -> {args.student}"
    title = f"{pair} on CIFAR-100, batch {BATCH}: step time of {args.runs} concurrent runs over a single run"
    result = result_header(title, __file__, args)
    notices: dict[str, list[str]] = {"concurrent": [], "concurrent, stacked": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        file = Path(scratch, "recipe.yaml")
        file.write_text(RECIPE.replace("TEACHER", args.teacher).replace("STUDENT", args.student))
        settings = [f"device={args.device}", f"data_root={args.data.resolve()}", f"runs={scratch}", *args.set]
        recipes = [load_recipe(str(file), [f"seed={seed}", *settings]) for seed in range(1, args.runs + 1)]
        # All contenders stay in this process and alternate, so that the load of other processes affects all alike.
        trainings: dict[str, Training] = {"single": single_run(recipes[0])}
        for name, messages in notices.items():
            trainings[name] = concurrent_runs(recipes, name == "concurrent, stacked", messages)
        contenders = {name: PacedTraining(training, args.threads) for name, training in trainings.items()}
        speeds = measure(contenders, args.rounds, args.steps, args.device, batch=BATCH)
        for contender in contenders.values():
            contender.stop()

    step_ms = {name: [1000 * BATCH / speed for speed in values] for name, values in speeds.items()}
    # Ratios are computed within a round, in which the load of other processes is similar.
    ratios: dict[str, Any] = {
        name: quartiles([value / single for value, single in zip(values, step_ms["single"], strict=True)], 3)
        for name, values in step_ms.items()
        if name != "single"
    }
    result |= {
        "notices": notices,
        "milliseconds_per_step": {name: quartiles(values, 2) for name, values in step_ms.items()},
        "over_one_run": ratios,
        "turns": {name: [round(value, 2) for value in values] for name, values in step_ms.items()},
    }
    print(json.dumps({key: result[key] for key in ("notices", "milliseconds_per_step", "over_one_run")}, indent=1))
    write_result(result, args.out)


if __name__ == "__main__":
    main()
