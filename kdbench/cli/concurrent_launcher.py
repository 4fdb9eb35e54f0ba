"""The Hydra launcher `concurrent`, which trains the jobs of a sweep in one process.

The jobs alternate after each step.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

from kdbench.cli import train
from kdbench.cli.jobs import Job
from kdbench.config.identity import identity
from kdbench.config.schema import Recipe
from kdbench.errors import ConfigError, Location
from kdbench.report.console import ConsoleReporter

if TYPE_CHECKING:
    from kdbench.experiment.run import Outcome
    from kdbench.speed.concurrent.dispatcher import ConcurrentRun

NAME = "concurrent"

PLUGIN_MODULE = "hydra_plugins.kdbench_concurrent"
"""Name of the launcher's module. Hydra accepts plug-ins only from the package `hydra_plugins`.

`register_launcher` creates this module at run time. An installed module would make every program that uses Hydra
import kdbench.
"""


@dataclass
class ConcurrentLauncherConfig:
    """Settings of the concurrent launcher, set by `hydra.launcher.KEY=...`.

    Attributes:
        size: maximum number of runs that train at the same time; None: no limit.
        stack: whether equal networks of several runs are merged into one network with grouped layers. True, False, or
            "auto": only if the merged network is faster.
    """

    _target_: str = f"{PLUGIN_MODULE}.ConcurrentLauncher"
    size: Any = None
    stack: Any = "auto"


@dataclass
class _Group:
    """A group of jobs that train concurrently.

    Attributes:
        settings: settings that all jobs of the group have in common.
        identities: hashes of the runs in the group.
        positions: positions of the jobs in the sweep.
    """

    settings: dict[str, Any]
    identities: set[str] = field(default_factory=set)
    positions: list[int] = field(default_factory=list)

    def accepts(self, settings: dict[str, Any], run: str, size: int | None) -> bool:
        """Returns whether a run can be added to the group.

        Args:
            settings: settings of the run. They must equal those of the group.
            run: identity (hash) of the run. It must not be in the group yet.
            size: maximum number of runs in a group; None: no limit.
        """
        return self.settings == settings and run not in self.identities and (size is None or len(self.positions) < size)


class ConcurrentLauncher(Launcher):
    """Hydra launcher that groups jobs by device, precision and data.

    The jobs of a group train concurrently; the groups train one after another.
    """

    def __init__(self, size: Any = None, stack: Any = "auto") -> None:
        self.size, self.stack = size, stack
        self.config: Any = None
        self.context: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Trains all jobs and returns their results in the order of the jobs.

        Raises:
            ConfigError: a setting of the launcher is invalid.
        """
        self._check_settings()
        jobs = [self._compose_job(number, list(texts)) for number, texts in enumerate(job_overrides, initial_job_idx)]
        for job in jobs:
            job.start()
        ready_jobs = [job for job in jobs if job.recipe is not None]
        labels = job_labels([job.overrides for job in ready_jobs])
        for positions in self._group_jobs([job.loaded_recipe() for job in ready_jobs]):
            _train_jobs([ready_jobs[n] for n in positions], [labels[n] for n in positions], self.stack)
        return [_job_return(job) for job in jobs]

    def _check_settings(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            location = Location(override=f"hydra.launcher.size={self.size}")
            raise ConfigError(f"{location}: expected a number from 1, or null for no limit.")
        if self.stack not in ("auto", True, False):
            location = Location(override=f"hydra.launcher.stack={self.stack}")
            raise ConfigError(f"{location}: expected auto, true or false.")

    def _compose_job(self, number: int, overrides: list[str]) -> Job:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            hydra_config = config.pop("hydra")
        return Job(config, hydra_config)

    def _group_jobs(self, recipes: Sequence[Recipe]) -> list[list[int]]:
        """Groups jobs and returns the positions of the jobs of each group.

        Prints the reason if there is more than one group.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _notice("torchrun trains each run in several processes, so the runs train one after another.")
            return [[position] for position in range(len(recipes))]
        groups: list[_Group] = []
        for position, recipe in enumerate(recipes):
            settings, run = _shared_settings(recipe), identity(recipe)
            group = next((group for group in groups if group.accepts(settings, run, self.size)), None)
            if group is None:
                if groups:
                    _notice_new_group(position, settings, run, groups[0])
                group = _Group(settings)
                groups.append(group)
            group.identities.add(run)
            group.positions.append(position)
        return [group.positions for group in groups]


def _notice_new_group(position: int, settings: dict[str, Any], run: str, first_group: _Group) -> None:
    """Prints why a job cannot train with the first group.

    Prints nothing if the only reason is the size of the group.
    """
    differences = [name for name, value in settings.items() if first_group.settings[name] != value]
    if differences:
        _notice(f"job {position} differs from the first job in {' and '.join(differences)}, so it trains afterwards.")
    elif run in first_group.identities:
        _notice(f"job {position} is the same run as an earlier job, so it waits for the result of that job.")


def register_launcher() -> None:
    """Registers the launcher `concurrent` with Hydra in this process."""
    plugins = Plugins.instance()  # scans the installed plug-ins, before the module below exists
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
    """Returns the settings that must be equal in all concurrent runs, as name -> value. Messages show the names."""
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
    """Returns one label per job: the overrides of the job, except for overrides that all jobs have in common."""
    overrides_by_job = [[text.lstrip("+") for text in overrides] for overrides in jobs]
    common = set.intersection(*(set(overrides) for overrides in overrides_by_job)) if overrides_by_job else set()
    labels = [" ".join(text for text in overrides if text not in common) for overrides in overrides_by_job]
    return [label or f"job {number}" for number, label in enumerate(labels)]


def _train_jobs(jobs: Sequence[Job], labels: Sequence[str], stack: Any) -> None:
    """Trains the jobs of one group concurrently. A group of one job trains as in `kdbench train`.

    Args:
        jobs: jobs of the group.
        labels: one label per job, which is shown before its output.
        stack: setting `stack` of the launcher.
    """
    if len(jobs) == 1:
        jobs[0].run_training(lambda: train.train_recipe(jobs[0].loaded_recipe()))
        return
    # Imported here because they import torch, which a mistake in the recipe must not wait for.
    from kdbench.engine.device import resolve_device
    from kdbench.speed.concurrent.dispatcher import Dispatcher

    try:
        device = resolve_device(jobs[0].loaded_recipe().device)
    except ConfigError as error:
        for job in jobs:
            job.record_failure(error)
        return
    dispatcher: Dispatcher[None] = Dispatcher(labels, device, stack=stack, notice=_notice)
    for error in dispatcher.run_all([_task(job, label) for job, label in zip(jobs, labels, strict=True)]):
        if error is not None:
            raise error
    for job, label in zip(jobs, labels, strict=True):
        if job.outcome is not None:
            print(f"\n{label}", flush=True)
            train.print_outcome(job.outcome)


def _task(job: Job, label: str) -> Callable[[ConcurrentRun], None]:
    """Returns a function that trains one job as one of several concurrent runs.

    The function records a failure of the job and does not raise it, so the other jobs continue.
    """
    from kdbench.experiment.run import run as run_experiment  # imports torch

    def train_job(concurrent_run: ConcurrentRun) -> Outcome:
        console = ConsoleReporter(prefix=label, bar=False)
        return run_experiment(job.loaded_recipe(), console=console, on_stage_ready=concurrent_run.join)

    return lambda concurrent_run: job.run_training(lambda: train_job(concurrent_run))


def _job_return(job: Job) -> JobReturn:
    """Returns the result of a job as Hydra's `JobReturn`, which sweepers read."""
    value = job.objective() if job.failure is None else job.failure
    status = JobStatus.COMPLETED if job.failure is None else JobStatus.FAILED
    return JobReturn(job.overrides, job.config, job.hydra_config, os.getcwd(), "kdbench", status, value)


def _notice(text: str) -> None:
    ConsoleReporter(prefix=NAME, bar=False).notice(text)
