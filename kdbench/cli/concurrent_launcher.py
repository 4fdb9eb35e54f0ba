"""The launcher `hydra/launcher=gang`: the jobs of a sweep train in one process, taking turns by steps."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from kdbench.cli.jobs import Job
from kdbench.config.identity import identity
from kdbench.config.schema import Recipe
from kdbench.errors import ConfigError, Location

if TYPE_CHECKING:
    from kdbench.experiment.run import Outcome
    from kdbench.speed.concurrent.dispatcher import Member


NAME = "concurrent"


PLACE = "hydra_plugins.kdbench_concurrent"
"""Hydra takes plug-ins from `hydra_plugins` only. The module is made when kdbench asks for it, so that no other program
of Hydra's finds it installed and loads kdbench."""


@dataclass
class GangConfig:
    """What `hydra.launcher.KEY=...` sets.

    size: how many runs train at a time; None: all that fit together.
    stack: whether runs of one architecture step as one stack of channels: auto (the faster form), true, false.
    """

    _target_: str = f"{PLACE}.GangLauncher"
    size: Any = None
    stack: Any = "auto"


class GangLauncher(Launcher):
    """Trains jobs that share device, number formats and data as a gang; the others in gangs of their own, or alone."""

    def __init__(self, size: Any = None, stack: Any = "auto") -> None:
        self.size, self.stack = size, stack
        self.config: Any = None
        self.context: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check()
        jobs = [self._job(number, list(words)) for number, words in enumerate(job_overrides, initial_job_idx)]
        for job in jobs:
            job.begin()
        ready = [job for job in jobs if job.recipe is not None]
        labels = labels_of([job.words for job in ready])
        for numbers in self._gangs([job.recipe for job in ready if job.recipe is not None]):
            _train([ready[n] for n in numbers], [labels[n] for n in numbers], self.stack)
        return [_told(job) for job in jobs]

    def _check(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            place = Location(override=f"hydra.launcher.size={self.size}")
            raise ConfigError(f"{place}: how many runs train at a time is a number from 1, or null for all.")
        if self.stack not in ("auto", True, False):
            place = Location(override=f"hydra.launcher.stack={self.stack}")
            raise ConfigError(f"{place}: expected auto, true or false.")

    def _job(self, number: int, words: list[str]) -> Job:
        from omegaconf import open_dict

        config = self.context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            node = config.pop("hydra")
        return Job(config, node)

    def _gangs(self, recipes: Sequence[Recipe]) -> list[list[int]]:
        """Which jobs train together, in the order in which the gangs do; says why not all of them."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _say("several processes train each run (torchrun): the runs train one after another.")
            return [[number] for number in range(len(recipes))]
        gangs: list[tuple[dict[str, Any], set[str], list[int]]] = []
        for number, recipe in enumerate(recipes):
            facts, run = _facts(recipe), identity(recipe)
            fitting = (gang for gang in gangs if gang[0] == facts and run not in gang[1])
            found = next((gang for gang in fitting if self.size is None or len(gang[2]) < self.size), None)
            if found is None:
                if gangs:
                    self._say_apart(number, facts, run, gangs)
                gangs.append(found := (facts, set(), []))
            found[1].add(run)
            found[2].append(number)
        return [numbers for _, _, numbers in gangs]

    def _say_apart(self, number: int, facts: dict[str, Any], run: str, gangs: Sequence[Any]) -> None:
        first, runs, _ = gangs[0]
        other = [what for what, value in facts.items() if first[what] != value]
        if other:
            _say(f"job {number} has other {' and '.join(other)} than the first: it trains after it, not beside it.")
        elif run in runs:
            _say(f"job {number} is the same run as an earlier one: it waits for that one's result.")


def register() -> None:
    """Makes the launcher known to Hydra, in this process."""
    plugins = Plugins.instance()  # by now it has looked for installed ones
    try:
        importlib.import_module("hydra_plugins")
    except ImportError:
        sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        sys.modules["hydra_plugins"].__path__ = []
    module = sys.modules.setdefault(PLACE, ModuleType(PLACE))
    vars(module)[GangLauncher.__name__] = GangLauncher
    GangLauncher.__module__ = PLACE
    plugins.register(GangLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name=NAME, node=GangConfig, provider="kdbench")


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What runs must share to train together, by what it is called."""
    data = [
        [(name, source.dataset, source.split, source.artifact) for name, source in stage.data.items()]
        for stage in recipe.stages
    ]
    return {
        "device": recipe.device,
        "data": (recipe.data_root, data),
        "precision": [stage.precision for stage in recipe.stages],
    }


def labels_of(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What sets each job apart: its overrides that not all others have too."""
    given = [[word.lstrip("+") for word in words] for words in jobs]
    common = set.intersection(*(set(words) for words in given)) if given else set()
    labels = [" ".join(word for word in words if word not in common) for words in given]
    return [label or f"job {number}" for number, label in enumerate(labels)]


def _train(jobs: Sequence[Job], labels: Sequence[str], stack: Any) -> None:
    """Trains a gang, or a job alone."""
    from kdbench.cli.train import run, tell

    if len(jobs) == 1:
        jobs[0].keep(lambda: run(jobs[0].given()))
        return
    from kdbench.engine.device import choose_device
    from kdbench.speed.concurrent.dispatcher import Gang

    try:
        device = choose_device(jobs[0].given().device)
    except ConfigError as error:
        for job in jobs:
            job.fail(error)
        return
    gang: Gang[None] = Gang(labels, device, stack=stack, say=_say)
    for ended in gang.run([_task(job, label) for job, label in zip(jobs, labels, strict=True)]):
        if ended is not None:
            raise ended
    for job, label in zip(jobs, labels, strict=True):
        if job.outcome is not None:
            print(f"\n{label}", flush=True)
            tell(job.outcome)


def _task(job: Job, label: str) -> Callable[[Member], None]:
    """Trains one job as a member; what fails is told at once, and the others go on."""
    from kdbench.experiment.run import run
    from kdbench.report.console import ConsoleView

    def trained(member: Member) -> Outcome:
        return run(job.given(), console=ConsoleView(prefix=label, bar=False), attend=member.attend)

    return lambda member: job.keep(lambda: trained(member))


def _told(job: Job) -> JobReturn:
    """How a job ended, as a sweeper wants to know it."""
    failed = job.failed is not None
    value = job.failed if failed else job.headline()
    status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    return JobReturn(job.words, job.config, job.node, os.getcwd(), "kdbench", status, value)


def _say(text: str) -> None:
    from kdbench.report.console import ConsoleView

    ConsoleView(prefix=NAME, bar=False).notice(text)
