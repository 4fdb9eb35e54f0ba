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
    from kdbench.speed.concurrent.dispatcher import ConcurrentRun


NAME = "concurrent"


PLUGIN_MODULE = "hydra_plugins.kdbench_concurrent"
"""Hydra takes plug-ins from `hydra_plugins` only. The module is made when kdbench asks for it, so that no other program
of Hydra's finds it installed and loads kdbench."""


@dataclass
class ConcurrentLauncherConfig:
    """What `hydra.launcher.KEY=...` sets.

    size: how many runs train at a time; None: all that fit together.
    stack: whether runs of one architecture step as one stack of channels: auto (the faster form), true, false.
    """

    _target_: str = f"{PLUGIN_MODULE}.ConcurrentLauncher"
    size: Any = None
    stack: Any = "auto"


class ConcurrentLauncher(Launcher):
    """Trains jobs that share device, number formats and data as a gang; the others in gangs of their own, or alone."""

    def __init__(self, size: Any = None, stack: Any = "auto") -> None:
        self.size, self.stack = size, stack
        self.config: Any = None
        self.context: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check()
        jobs = [self._compose_job(number, list(words)) for number, words in enumerate(job_overrides, initial_job_idx)]
        for job in jobs:
            job.start()
        ready = [job for job in jobs if job.recipe is not None]
        labels = job_labels([job.overrides for job in ready])
        for numbers in self._group_jobs([job.recipe for job in ready if job.recipe is not None]):
            _train_jobs([ready[n] for n in numbers], [labels[n] for n in numbers], self.stack)
        return [_job_return(job) for job in jobs]

    def _check(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            place = Location(override=f"hydra.launcher.size={self.size}")
            raise ConfigError(f"{place}: how many runs train at a time is a number from 1, or null for all.")
        if self.stack not in ("auto", True, False):
            place = Location(override=f"hydra.launcher.stack={self.stack}")
            raise ConfigError(f"{place}: expected auto, true or false.")

    def _compose_job(self, number: int, words: list[str]) -> Job:
        from omegaconf import open_dict

        config = self.context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            node = config.pop("hydra")
        return Job(config, node)

    def _group_jobs(self, recipes: Sequence[Recipe]) -> list[list[int]]:
        """Which jobs train together, in the order in which the gangs do; says why not all of them."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _notice("several processes train each run (torchrun): the runs train one after another.")
            return [[number] for number in range(len(recipes))]
        gangs: list[tuple[dict[str, Any], set[str], list[int]]] = []
        for number, recipe in enumerate(recipes):
            facts, run = _shared_settings(recipe), identity(recipe)
            fitting = (gang for gang in gangs if gang[0] == facts and run not in gang[1])
            found = next((gang for gang in fitting if self.size is None or len(gang[2]) < self.size), None)
            if found is None:
                if gangs:
                    self._notice_separation(number, facts, run, gangs)
                gangs.append(found := (facts, set(), []))
            found[1].add(run)
            found[2].append(number)
        return [numbers for _, _, numbers in gangs]

    def _notice_separation(self, number: int, facts: dict[str, Any], run: str, gangs: Sequence[Any]) -> None:
        first, runs, _ = gangs[0]
        other = [what for what, value in facts.items() if first[what] != value]
        if other:
            _notice(f"job {number} has other {' and '.join(other)} than the first: it trains after it, not beside it.")
        elif run in runs:
            _notice(f"job {number} is the same run as an earlier one: it waits for that one's result.")


def register_launcher() -> None:
    """Makes the launcher known to Hydra, in this process."""
    plugins = Plugins.instance()  # by now it has looked for installed ones
    try:
        importlib.import_module("hydra_plugins")
    except ImportError:
        sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        sys.modules["hydra_plugins"].__path__ = []
    module = sys.modules.setdefault(PLUGIN_MODULE, ModuleType(PLUGIN_MODULE))
    vars(module)[ConcurrentLauncher.__name__] = ConcurrentLauncher
    ConcurrentLauncher.__module__ = PLUGIN_MODULE
    plugins.register(ConcurrentLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name=NAME, node=ConcurrentLauncherConfig, provider="kdbench")


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
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


def job_labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What sets each job apart: its overrides that not all others have too."""
    given = [[word.lstrip("+") for word in words] for words in jobs]
    common = set.intersection(*(set(words) for words in given)) if given else set()
    labels = [" ".join(word for word in words if word not in common) for words in given]
    return [label or f"job {number}" for number, label in enumerate(labels)]


def _train_jobs(jobs: Sequence[Job], labels: Sequence[str], stack: Any) -> None:
    """Trains a gang, or a job alone."""
    from kdbench.cli.train import print_outcome, train_recipe

    if len(jobs) == 1:
        jobs[0].run_training(lambda: train_recipe(jobs[0].loaded_recipe()))
        return
    from kdbench.engine.device import resolve_device
    from kdbench.speed.concurrent.dispatcher import Dispatcher

    try:
        device = resolve_device(jobs[0].loaded_recipe().device)
    except ConfigError as error:
        for job in jobs:
            job.record_failure(error)
        return
    gang: Dispatcher[None] = Dispatcher(labels, device, stack=stack, say=_notice)
    for ended in gang.run([_task(job, label) for job, label in zip(jobs, labels, strict=True)]):
        if ended is not None:
            raise ended
    for job, label in zip(jobs, labels, strict=True):
        if job.outcome is not None:
            print(f"\n{label}", flush=True)
            print_outcome(job.outcome)


def _task(job: Job, label: str) -> Callable[[ConcurrentRun], None]:
    """Trains one job as a member; what fails is told at once, and the others go on."""
    from kdbench.experiment.run import run
    from kdbench.report.console import ConsoleReporter

    def trained(member: ConcurrentRun) -> Outcome:
        return run(job.loaded_recipe(), console=ConsoleReporter(prefix=label, bar=False), on_stage_ready=member.attend)

    return lambda member: job.run_training(lambda: trained(member))


def _job_return(job: Job) -> JobReturn:
    """How a job ended, as a sweeper wants to know it."""
    failed = job.failure is not None
    value = job.failure if failed else job.objective()
    status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    return JobReturn(job.overrides, job.config, job.hydra_config, os.getcwd(), "kdbench", status, value)


def _notice(text: str) -> None:
    from kdbench.report.console import ConsoleReporter

    ConsoleReporter(prefix=NAME, bar=False).notice(text)
