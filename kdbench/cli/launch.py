"""`kdbench train`: a recipe and overrides go through Hydra's own run, multirun, launchers and sweepers."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.config.compose.hydra import job_composer, translate_hydra_errors
from kdbench.config.compose.layers import CONFIG_NAME, ConfigLayers, read_layers
from kdbench.config.compose.overrides import hydra_overrides, is_hydra_override, override_value, sweep_jobs
from kdbench.config.load import validate
from kdbench.config.paths import find_recipe
from kdbench.errors import ConfigError
from kdbench.files import read_json

if TYPE_CHECKING:
    pass
from kdbench.cli.jobs import JOBS_FOLDER, Job, JobFailed

_PRINT_FLAGS = ("cfg", "info", "hydra_help", "shell_completion")
"""Flags that print something instead of running."""


class _SingleRun:
    """A run of one job: where its temporary configs lie, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: BaseException | None = None


_single_run: _SingleRun | None = None


def launch(arguments: Sequence[str]) -> int:
    """Runs the jobs of a command line; returns the exit code.

    Raises:
        UserError: a mistake in the recipe or an override, also in a later job of a multirun, before any job begins.
    """
    from kdbench.cli.arguments import split_recipe

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    if any(is_hydra_override(text) for text in arguments if "=" in text):  # a launcher may be ours
        from kdbench.cli.concurrent_launcher import register_launcher

        register_launcher()
    flags, words = _parse_flags(arguments)
    recipe, overrides = split_recipe(words)
    name, path = find_recipe(recipe)
    given = hydra_overrides(overrides)
    prepared = read_layers(name, path, overrides)
    sweeping = flags.multirun or _hydra_setting(overrides, "hydra.mode") == "MULTIRUN"
    if not any(getattr(flags, flag) for flag in _PRINT_FLAGS):
        _check_jobs(prepared, overrides, sweeping)
    with translate_hydra_errors(overrides):
        return _run_multirun(prepared, overrides, flags, given) if sweeping else _run_single(prepared, flags, given)


def _parse_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags and the other words, in whatever order they came."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def mistake(message: str) -> Any:
        raise ConfigError(f"kdbench train: {message}. See `kdbench train --help`.")

    parser.error = mistake  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(list(arguments))
    for flag in ("config_path", "config_name", "experimental_rerun"):
        if getattr(flags, flag) is not None:
            raise ConfigError(f"kdbench train: --{flag.replace('_', '-')} has no use here; the recipe is the config.")
    asked = [f"--{flag.replace('_', '-')}" for flag in (*_PRINT_FLAGS, "multirun", "run") if getattr(flags, flag)]
    if len(asked) > 1:
        raise ConfigError(f"kdbench train: {' and '.join(asked)} exclude each other.")
    if flags.resolve and not flags.cfg:
        raise ConfigError("kdbench train: --resolve belongs to --cfg.")
    return flags, flags.overrides


def _check_jobs(prepared: ConfigLayers, overrides: Sequence[str], sweeping: bool) -> None:
    """Composes and checks every job, so that a mistake in the seventh is found before the first begins."""
    with job_composer(prepared) as compose:
        if not sweeping:
            validate(compose(overrides))
        elif _hydra_setting(overrides, "hydra/sweeper") in (None, "basic"):
            with translate_hydra_errors(overrides):
                jobs = sweep_jobs(overrides)
            for job in jobs:
                validate(compose(job))


def _hydra_setting(overrides: Sequence[str], key: str) -> str | None:
    """The value of an override of Hydra's own, as text."""
    found = [override_value(text) for text in overrides if is_hydra_override(text) and text.lstrip("+").startswith(f"{key}=")]
    return str(found[-1]) if found else None


def _run_single(prepared: ConfigLayers, flags: argparse.Namespace, hydra_overrides: Sequence[str]) -> int:
    global _single_run
    with tempfile.TemporaryDirectory(prefix="kdbench-", ignore_cleanup_errors=True) as folder:
        prepared.write(Path(folder))
        _single_run = _SingleRun(Path(folder).resolve())
        try:
            _run_hydra(Path(folder).resolve(), flags, hydra_overrides)
            outcome = _single_run
        finally:
            _single_run = None
    if outcome.error is not None:
        raise outcome.error
    return 0


def _run_multirun(prepared: ConfigLayers, overrides: Sequence[str], flags: argparse.Namespace, hydra_overrides: Sequence[str]) -> int:
    """The configs stay in the sweep's folder: joblib and submitit compose again from them, in other processes."""
    digest = hashlib.sha256("\n".join([prepared.digest(), *overrides]).encode()).hexdigest()[:8]
    chosen = _hydra_setting(overrides, "hydra.sweep.dir")
    if chosen is not None and "${" not in chosen:
        sweep = Path(chosen).resolve()
    else:
        sweep = Path(prepared.runs, prepared.name, "multirun", digest).resolve()
    folder = sweep / f"config-{digest}"
    shutil.rmtree(folder / JOBS_FOLDER, ignore_errors=True)
    prepared.write(folder, {"sweep": {"dir": str(sweep), "subdir": "."}})
    code = 0
    try:
        _run_hydra(folder, flags, hydra_overrides)
    except JobFailed as failed:
        print("kdbench: some jobs failed, as told above; the results of the others stay.", file=sys.stderr)
        code = failed.code
    found = [read_json(path) for path in sorted((folder / JOBS_FOLDER).glob("*.json"), key=lambda path: int(path.stem))]
    if len(found) > 1 and any("folder" in note for note in found):
        from kdbench.cli.train import print_jobs

        print_jobs(found)
    return code


def _run_hydra(folder: Path, flags: argparse.Namespace, hydra_overrides: Sequence[str]) -> None:
    import hydra

    words: list[str] = []
    for flag, value in vars(flags).items():
        if flag == "overrides" or value in (None, False):
            continue
        words += [f"--{flag.replace('_', '-')}", *([] if value is True else [value])]
    with _replace_argv([*words, *hydra_overrides]):
        hydra.main(version_base="1.3", config_path=str(folder), config_name=CONFIG_NAME)(run_job)()


@contextmanager
def _replace_argv(words: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        yield
    finally:
        sys.argv = before


def run_job(config: Any) -> float | None:
    """One job, in this process or in a launcher's worker; Hydra calls it with the composed config."""
    from hydra.core.hydra_config import HydraConfig

    from kdbench.cli import train

    told = Job(config, HydraConfig.get())
    if _single_run is not None:
        return _run_single_job(told, _single_run)
    told.start()
    if told.failure is None:
        told.run_training(lambda: train.train_recipe(told.loaded_recipe()))
    if told.failure is not None:
        raise told.failure
    return told.objective()


def _run_single_job(told: Job, single: _SingleRun) -> float | None:
    """The only job of a run that is no multirun."""
    from kdbench.cli import train

    try:
        told.recipe = told.load()
        shutil.rmtree(single.folder, ignore_errors=True)  # nothing is left behind by a run that is killed
        told.outcome = train.train_recipe(told.recipe)
        return told.objective()
    except Exception as error:
        single.error = error  # told by `main`; Hydra would add a line of its own
        return None
