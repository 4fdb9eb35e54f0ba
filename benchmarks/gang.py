"""How much faster do several runs train as a gang? G seeds of one recipe together, against one run alone.

Contenders, in one process, each in a thread of its own, one at a time, in a new order each round:

    alone               one run, as `kdbench train` does it
    gang, unstacked     G runs that take turns by steps (on CUDA on streams of their own)
    gang, stacked       the same with their students as one network of grouped convolutions

A turn is a number of rounds; in a round every run of a gang does one step. What counts is the time of a round over
that of a step alone, taken within a round of turns: 1 is a gang for free, G is no gain at all.

To repeat it (CIFAR-100 as for benchmarks/step.py):

    python benchmarks/gang.py --data DATA --members 4 --out benchmarks/results/gang.json
    python benchmarks/gang.py --data DATA --members 4 --device cuda --set precision=bf16 --set compile=capture
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdbench
from kdbench.config.load import load_recipe
from kdbench.config.schema import Recipe
from kdbench.engine.device import choose_device, describe_device
from kdbench.engine.gang import Gang, Member, Stack
from kdbench.engine.runner import Runner
from kdbench.registry import MODELS
from kdbench.results.console import ConsoleView
from kdbench.results.experiment import run

RECIPE = """
dataset: cifar100
batch_size: 64
augment: [{type: crop, padding: 4}, flip]
teacher: {model: TEACHER, weights: {path: WEIGHTS}}
student: STUDENT
terms:
  ce: {type: cross_entropy, weight: 0.1}
  kd: {type: kd, temperature: 4, weight: 0.9}
optimizer: {type: SGD, lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4}
epochs: 240
eval_every: 240
tensorboard: false
"""


class Enough(BaseException):
    """Ends a training that has no end."""


class Turns:
    """Something that trains in a thread of its own and goes on a number of rounds at a time."""

    def __init__(self, training: Callable[[Callable[[], None]], None], threads: int) -> None:
        self.left, self.over = 0, False
        self.error: BaseException | None = None
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(training, threads), daemon=True)
        self.thread.start()

    def rounds(self, count: int) -> None:
        self.left = count
        self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join(timeout=60)

    def tick(self) -> None:
        """Called after every round."""
        self.left -= 1
        if self.left <= 0:
            self.paused.release()
            self.go.acquire()
        if self.over:
            raise Enough

    def _run(self, training: Callable[[Callable[[], None]], None], threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
        self.go.acquire()
        try:
            training(self.tick)
        except Enough:
            pass
        except BaseException as error:
            self.error = error
            self.paused.release()


def ticking(runner: Runner, tick: Callable[[], None]) -> None:
    """Calls `tick` after each of a runner's steps."""
    step = runner.step

    def stepping(window: Sequence[Any]) -> None:
        step(window)
        tick()

    runner.step = stepping  # type: ignore[method-assign]


def alone(recipe: Recipe) -> Callable[[Callable[[], None]], None]:
    return lambda tick: run(recipe, console=ConsoleView(quiet=True), attend=lambda runner: ticking(runner, tick)) and None


def together(recipes: Sequence[Recipe], stack: Stack, said: list[str]) -> Callable[[Callable[[], None]], None]:
    """A gang; the first member's step begins a round, so it ticks for all."""

    def train(tick: Callable[[], None]) -> None:
        gang: Gang[None] = Gang(
            [f"seed={recipe.seed}" for recipe in recipes],
            choose_device(recipes[0].device),
            stack=stack,
            say=said.append,
        )

        def task(recipe: Recipe) -> Callable[[Member], None]:
            def attend(member: Member, runner: Runner) -> None:
                member.attend(runner)
                if member is gang.members[0]:
                    ticking(runner, tick)

            def train_one(member: Member) -> None:
                run(recipe, console=ConsoleView(quiet=True), attend=lambda runner: attend(member, runner))

            return train_one

        for ended in gang.run([task(recipe) for recipe in recipes]):
            if isinstance(ended, BaseException):
                gang.stopped = True
                raise ended

    return train


def recipes_in(scratch: Path, args: argparse.Namespace, folder: str) -> list[Recipe]:
    torch.manual_seed(0)
    weights = scratch / "teacher.pt"
    if not weights.exists():
        torch.save(MODELS.build(args.teacher, {}, num_classes=100).state_dict(), weights)
    text = RECIPE.replace("TEACHER", args.teacher).replace("STUDENT", args.student).replace("WEIGHTS", str(weights))
    file = scratch / "gang.yaml"
    file.write_text(text)
    settings = [f"device={args.device}", f"data_root={args.data.resolve()}", f"runs={scratch / folder}", *args.set]
    return [load_recipe(str(file), [f"seed={seed}", *settings]) for seed in range(1, args.members + 1)]


def measure(contenders: dict[str, Turns], turns: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of one round, of every turn, by contender; the first turns warm up and are left out."""
    shuffled = random.Random(0)
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(turns + 1):
        order = list(contenders)
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contenders[name].rounds(rounds)
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                spent[name].append((time.perf_counter() - start) / rounds)
        shown = ", ".join(f"{name} {1000 * seconds[-1]:.1f} ms" for name, seconds in spent.items() if seconds)
        print(f"turn {number}: {shown}", flush=True)
    return spent


def quartiles(values: Sequence[float], digits: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "q1": round(low, digits), "q3": round(high, digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-100")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=8, help="rounds per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="an override of the recipe")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = [round(value, 2) for value in os.getloadavg()]
    said: dict[str, list[str]] = {"gang, unstacked": [], "gang, stacked": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        trainings = {"alone": alone(recipes_in(scratch, args, "alone")[0])}
        for form, told in said.items():
            stack = form == "gang, stacked"
            trainings[form] = together(recipes_in(scratch, args, form[6:]), stack, told)
        contenders = {form: Turns(training, args.threads) for form, training in trainings.items()}
        spent = measure(contenders, args.turns, args.rounds, args.device)
        for contender in contenders.values():
            contender.end()

    one = spent["alone"]
    result = {
        "what": f"{args.teacher} -> {args.student} on CIFAR-100, batch 64: a round of {args.members} runs over a step alone",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": f"python benchmarks/gang.py --members {args.members} --teacher {args.teacher} --student {args.student} "
        f"--turns {args.turns} --rounds {args.rounds} --threads {args.threads} --device {args.device}"
        + "".join(f" --set {text}" for text in args.set),
        "machine": {
            "device": describe_device(choose_device(args.device)),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "load_average_before": load,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kdbench": kdbench.__version__,
        },
        "said": said,
        "milliseconds": {form: quartiles([1000 * value for value in values], 2) for form, values in spent.items()},
        "over_one_run": {
            form: quartiles([value / base for value, base in zip(values, one, strict=True)], 3)
            for form, values in spent.items()
            if form != "alone"
        },
        "turns": {form: [round(1000 * value, 2) for value in values] for form, values in spent.items()},
    }
    print(json.dumps({key: result[key] for key in ("said", "milliseconds", "over_one_run")}, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
