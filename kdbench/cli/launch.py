"""`kdbench train`: composes a recipe and its overrides with Hydra, and runs one job or a multirun."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kdbench.cli import train
from kdbench.cli.arguments import split_recipe
from kdbench.cli.jobs import JOBS_FOLDER, Job, JobFailed, read_records
from kdbench.config.compose.hydra import job_composer, translate_hydra_errors
from kdbench.config.compose.layers import CONFIG_NAME, ConfigLayers, read_layers
from kdbench.config.compose.overrides import hydra_overrides, is_hydra_override, override_value, sweep_jobs
from kdbench.config.load import validate
from kdbench.config.paths import find_recipe
from kdbench.errors import ConfigError

_PRINT_FLAGS = ("cfg", "info", "hydra_help", "shell_completion")
"""Flags of Hydra with which `kdbench train` prints text and does not train."""


def launch(arguments: Sequence[str]) -> int:
    """Runs all jobs (trainings) of a `kdbench train` command line and returns the exit code.

    Raises:
        UserError: the recipe or an override has a mistake. In a multirun, all jobs are checked before the first one
            starts.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them and exiting with 1
    if any(is_hydra_override(text) for text in arguments if "=" in text):
        # Imported here because it imports Hydra's plug-in classes (0.2 s), which only `hydra/launcher=...` needs.
        from kdbench.cli.concurrent_launcher import register_launcher

        register_launcher()
    flags, words = _parse_flags(arguments)
    recipe, overrides = split_recipe(words)
    name, path = find_recipe(recipe)
    hydra_arguments = hydra_overrides(overrides)
    layers = read_layers(name, path, overrides)
    is_sweep = flags.multirun or _hydra_setting(overrides, "hydra.mode") == "MULTIRUN"
    if not any(getattr(flags, flag) for flag in _PRINT_FLAGS):
        _check_jobs(layers, overrides, is_sweep)
    with translate_hydra_errors(overrides):
        if is_sweep:
            return _run_multirun(layers, overrides, flags, hydra_arguments)
        return _run_single(layers, flags, hydra_arguments)


class _TrainParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"train: {message}. See `kdbench train --help`.")


def _parse_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into Hydra's flags and all other words, in any order."""
    from hydra._internal.utils import get_args_parser  # keeps Hydra out of the start-up of other commands

    parser = _TrainParser(parents=[get_args_parser()], add_help=False)
    flags = parser.parse_intermixed_args(list(arguments))
    for flag in ("config_path", "config_name", "experimental_rerun"):
        if getattr(flags, flag) is not None:
            raise ConfigError(f"train: --{flag.replace('_', '-')} is not supported; the recipe is the config.")
    modes = [f"--{flag.replace('_', '-')}" for flag in (*_PRINT_FLAGS, "multirun", "run") if getattr(flags, flag)]
    if len(modes) > 1:
        raise ConfigError(f"train: {' and '.join(modes)} exclude each other.")
    if flags.resolve and not flags.cfg:
        raise ConfigError("train: --resolve needs --cfg.")
    return flags, flags.overrides


def _check_jobs(layers: ConfigLayers, overrides: Sequence[str], is_sweep: bool) -> None:
    """Composes and validates the recipe of every job. A mistake in a later job is thus reported before any training."""
    with job_composer(layers) as compose:
        if not is_sweep:
            validate(compose(overrides))
        elif _hydra_setting(overrides, "hydra/sweeper") in (None, "basic"):
            with translate_hydra_errors(overrides):
                jobs = sweep_jobs(overrides)
            for job in jobs:
                validate(compose(job))


def _hydra_setting(overrides: Sequence[str], key: str) -> str | None:
    """Returns the value of a key under `hydra` in the last override of this key, or None without such an override."""
    texts = [text for text in overrides if is_hydra_override(text) and text.lstrip("+").startswith(f"{key}=")]
    return str(override_value(texts[-1])) if texts else None


class _SingleRun:
    """Task function that Hydra calls for a single run.

    An error is stored in `exception`, because Hydra would print an additional line for a raised error.
    """

    def __init__(self, config_folder: Path) -> None:
        self.config_folder = config_folder
        self.exception: Exception | None = None

    def run(self, config: Any) -> float | None:
        """Trains the job. Hydra calls this method with the composed config."""
        from hydra.core.hydra_config import HydraConfig  # keeps Hydra out of the start-up of other commands

        job = Job(config, HydraConfig.get())
        try:
            job.recipe = job.load()
            # Deleted before training, so that a killed run leaves no temporary folder.
            shutil.rmtree(self.config_folder, ignore_errors=True)
            job.outcome = train.train_recipe(job.recipe)
            return job.objective()
        except Exception as error:
            self.exception = error
            return None


def _run_single(layers: ConfigLayers, flags: argparse.Namespace, hydra_arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="kdbench-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        layers.write(folder)
        task = _SingleRun(folder)
        _run_hydra(folder, flags, hydra_arguments, task.run)
    if task.exception is not None:
        raise task.exception
    return 0


def _run_multirun(
    layers: ConfigLayers, overrides: Sequence[str], flags: argparse.Namespace, hydra_arguments: Sequence[str]
) -> int:
    """Runs all jobs of a sweep, prints a table with the results of the jobs, and returns the exit code.

    The config files stay in the sweep's folder, because worker processes (of joblib or submitit) compose their jobs
    from these files.
    """
    digest = hashlib.sha256("\n".join([layers.digest(), *overrides]).encode()).hexdigest()[:8]
    sweep_dir = _hydra_setting(overrides, "hydra.sweep.dir")
    if sweep_dir is not None and "${" not in sweep_dir:
        sweep_folder = Path(sweep_dir).resolve()
    else:
        sweep_folder = Path(layers.runs, layers.name, "multirun", digest).resolve()
    folder = sweep_folder / f"config-{digest}"
    shutil.rmtree(folder / JOBS_FOLDER, ignore_errors=True)
    layers.write(folder, {"sweep": {"dir": str(sweep_folder), "subdir": "."}})
    code = 0
    try:
        _run_hydra(folder, flags, hydra_arguments, run_job)
    except JobFailed as failure:
        print("kdbench: some jobs failed (see the errors above); all other jobs are complete.", file=sys.stderr)
        code = failure.code
    records = read_records(folder)
    if len(records) > 1 and any(record.folder is not None for record in records):
        train.print_jobs(records)
    return code


def _run_hydra(
    folder: Path, flags: argparse.Namespace, hydra_arguments: Sequence[str], task: Callable[[Any], float | None]
) -> None:
    """Runs a task function through `hydra.main`, which composes the config from the files in `folder`."""
    import hydra  # keeps Hydra out of the start-up of other commands

    words: list[str] = []
    for flag, value in vars(flags).items():
        if flag != "overrides" and value not in (None, False):
            words += [f"--{flag.replace('_', '-')}", *([] if value is True else [value])]
    with _replace_argv([*words, *hydra_arguments]):
        hydra.main(version_base="1.3", config_path=str(folder), config_name=CONFIG_NAME)(task)()


@contextmanager
def _replace_argv(words: Sequence[str]) -> Iterator[None]:
    """Context manager: replaces `sys.argv`, from which `hydra.main` reads its arguments."""
    argv = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        yield
    finally:
        sys.argv = argv


def run_job(config: Any) -> float | None:
    """Runs one job of a multirun and returns its objective.

    Hydra calls this function with the composed config, in this process or in a worker process.

    Raises:
        JobFailed: the job failed. The error of the job is already printed.
    """
    from hydra.core.hydra_config import HydraConfig  # keeps Hydra out of the start-up of other commands

    job = Job(config, HydraConfig.get())
    job.start()
    if job.failure is None:
        job.run_training(lambda: train.train_recipe(job.loaded_recipe()))
    if job.failure is not None:
        raise job.failure
    return job.objective()
