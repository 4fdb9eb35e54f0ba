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

from kdbench.config.compose.hydra import composing, saying
from kdbench.config.compose.layers import CONFIG_NAME, Prepared, read_layers
from kdbench.config.compose.overrides import combinations, for_hydra, parsed_value, prepare
from kdbench.config.load import validated
from kdbench.config.paths import find_recipe
from kdbench.errors import ConfigError
from kdbench.files import read_json

if TYPE_CHECKING:
    pass
from kdbench.cli.jobs import JOBS, Job, JobFailed

_TELLING = ("cfg", "info", "hydra_help", "shell_completion")
"""Flags that print something instead of running."""


class _Single:
    """A run of one job: where its temporary configs lie, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: BaseException | None = None


_single: _Single | None = None


def launch(arguments: Sequence[str]) -> int:
    """Runs the jobs of a command line; returns the exit code.

    Raises:
        UserError: a mistake in the recipe or an override, also in a later job of a multirun, before any job begins.
    """
    from kdbench.cli.arguments import split_recipe

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    if any(for_hydra(text) for text in arguments if "=" in text):  # a launcher may be ours
        from kdbench.cli.concurrent_launcher import register

        register()
    flags, words = _flags(arguments)
    recipe, overrides = split_recipe(words)
    name, path = find_recipe(recipe)
    given = prepare(overrides)
    prepared = read_layers(name, path, overrides)
    sweeping = flags.multirun or _setting(overrides, "hydra.mode") == "MULTIRUN"
    if not any(getattr(flags, flag) for flag in _TELLING):
        _check_jobs(prepared, overrides, sweeping)
    with saying(overrides):
        return _multirun(prepared, overrides, flags, given) if sweeping else _run(prepared, flags, given)


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
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
    asked = [f"--{flag.replace('_', '-')}" for flag in (*_TELLING, "multirun", "run") if getattr(flags, flag)]
    if len(asked) > 1:
        raise ConfigError(f"kdbench train: {' and '.join(asked)} exclude each other.")
    if flags.resolve and not flags.cfg:
        raise ConfigError("kdbench train: --resolve belongs to --cfg.")
    return flags, flags.overrides


def _check_jobs(prepared: Prepared, overrides: Sequence[str], sweeping: bool) -> None:
    """Composes and checks every job, so that a mistake in the seventh is found before the first begins."""
    with composing(prepared) as compose:
        if not sweeping:
            validated(compose(overrides))
        elif _setting(overrides, "hydra/sweeper") in (None, "basic"):
            with saying(overrides):
                jobs = combinations(overrides)
            for job in jobs:
                validated(compose(job))


def _setting(overrides: Sequence[str], key: str) -> str | None:
    """The value of an override of Hydra's own, as text."""
    found = [parsed_value(text) for text in overrides if for_hydra(text) and text.lstrip("+").startswith(f"{key}=")]
    return str(found[-1]) if found else None


def _run(prepared: Prepared, flags: argparse.Namespace, given: Sequence[str]) -> int:
    global _single
    with tempfile.TemporaryDirectory(prefix="kdbench-", ignore_cleanup_errors=True) as folder:
        prepared.write(Path(folder))
        _single = _Single(Path(folder).resolve())
        try:
            _hydra(Path(folder).resolve(), flags, given)
            outcome = _single
        finally:
            _single = None
    if outcome.error is not None:
        raise outcome.error
    return 0


def _multirun(prepared: Prepared, overrides: Sequence[str], flags: argparse.Namespace, given: Sequence[str]) -> int:
    """The configs stay in the sweep's folder: joblib and submitit compose again from them, in other processes."""
    digest = hashlib.sha256("\n".join([prepared.digest(), *overrides]).encode()).hexdigest()[:8]
    chosen = _setting(overrides, "hydra.sweep.dir")
    if chosen is not None and "${" not in chosen:
        sweep = Path(chosen).resolve()
    else:
        sweep = Path(prepared.runs, prepared.name, "multirun", digest).resolve()
    folder = sweep / f"config-{digest}"
    shutil.rmtree(folder / JOBS, ignore_errors=True)
    prepared.write(folder, {"sweep": {"dir": str(sweep), "subdir": "."}})
    code = 0
    try:
        _hydra(folder, flags, given)
    except JobFailed as failed:
        print("kdbench: some jobs failed, as told above; the results of the others stay.", file=sys.stderr)
        code = failed.code
    found = [read_json(path) for path in sorted((folder / JOBS).glob("*.json"), key=lambda path: int(path.stem))]
    if len(found) > 1 and any("folder" in note for note in found):
        from kdbench.cli.train import print_jobs

        print_jobs(found)
    return code


def _hydra(folder: Path, flags: argparse.Namespace, given: Sequence[str]) -> None:
    import hydra

    words: list[str] = []
    for flag, value in vars(flags).items():
        if flag == "overrides" or value in (None, False):
            continue
        words += [f"--{flag.replace('_', '-')}", *([] if value is True else [value])]
    with _command_line([*words, *given]):
        hydra.main(version_base="1.3", config_path=str(folder), config_name=CONFIG_NAME)(job)()


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        yield
    finally:
        sys.argv = before


def job(config: Any) -> float | None:
    """One job, in this process or in a launcher's worker; Hydra calls it with the composed config."""
    from hydra.core.hydra_config import HydraConfig

    from kdbench.cli import train

    told = Job(config, HydraConfig.get())
    if _single is not None:
        return _alone(told, _single)
    told.begin()
    if told.failed is None:
        told.keep(lambda: train.run(told.given()))
    if told.failed is not None:
        raise told.failed
    return told.headline()


def _alone(told: Job, single: _Single) -> float | None:
    """The only job of a run that is no multirun."""
    from kdbench.cli import train

    try:
        told.recipe = told.load()
        shutil.rmtree(single.folder, ignore_errors=True)  # nothing is left behind by a run that is killed
        told.outcome = train.run(told.recipe)
        return told.headline()
    except Exception as error:
        single.error = error  # told by `main`; Hydra would add a line of its own
        return None
