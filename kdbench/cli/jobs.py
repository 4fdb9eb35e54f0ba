"""A job of Hydra's multirun: its recipe, its outcome, and the record that the sweep's table is made from."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.config.compose.hydra import job_overrides
from kdbench.config.load import load_job
from kdbench.errors import UserError, escape_control_characters
from kdbench.files import write_json
from kdbench.plugins import load_plugins
from kdbench.report.summary import headline_accuracy

if TYPE_CHECKING:
    from kdbench.config.schema import Recipe
    from kdbench.experiment.run import Outcome

JOBS_FOLDER = "jobs"
"""Folder with one record per job, in the folder of the multirun's configs."""


class JobFailed(Exception):
    """A job of a multirun failed. Its error has been printed; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Job:
    """One job of Hydra's run or multirun.

    Args:
        config: the composed config without Hydra's node.
        hydra_config: Hydra's node.
    """

    def __init__(self, config: Any, hydra_config: Any) -> None:
        self.config, self.hydra_config = config, hydra_config
        self.overrides = job_overrides(hydra_config)
        sources = hydra_config.runtime.config_sources
        self.folder = next(Path(source.path) for source in sources if source.provider == "main")
        self.recipe: Recipe | None = None
        self.outcome: Outcome | None = None
        self.failure: JobFailed | None = None

    @property
    def number(self) -> int:
        """The index of the job in the sweep."""
        return self.hydra_config.job.num

    def start(self) -> None:
        """Prints the overrides of the job and loads its recipe; records a failure."""
        print(f"job {self.number}: {' '.join(text.lstrip('+') for text in self.overrides)}", flush=True)
        # Written before training too: a job that fails or is killed then has a row in the sweep's table.
        _write_record(self.folder, self.number, self.overrides, None)
        try:
            self.recipe = self.load()
        except Exception as error:
            self.record_failure(error)

    def load(self) -> Recipe:
        """Returns the job's recipe.

        Raises:
            ConfigError: a mistake in the recipe or an override.
        """
        load_plugins()  # a launcher may run the job in another process
        return load_job(self.config, self.folder, self.hydra_config)

    def loaded_recipe(self) -> Recipe:
        """Returns the recipe of a job that started without failure."""
        assert self.recipe is not None
        return self.recipe

    def run_training(self, train: Callable[[], Outcome]) -> None:
        """Trains the job and records its outcome, or its failure."""
        try:
            self.outcome = train()
            _write_record(self.folder, self.number, self.overrides, self.outcome)
        except Exception as error:
            self.record_failure(error)

    def record_failure(self, error: Exception) -> None:
        """Prints an error (a bug with its traceback) and keeps its exit code, so that the other jobs still run."""
        is_user_error = isinstance(error, UserError)
        if is_user_error:
            print(f"kdbench: job {self.number}: {escape_control_characters(str(error))}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        self.failure = JobFailed(2 if is_user_error else 1)

    def objective(self) -> float | None:
        """Returns the value that a sweeper maximizes: top-1 on the validation split if there is one, else on test."""
        return None if self.outcome is None else headline_accuracy(self.outcome.summary)


def _write_record(folder: Path, number: int, overrides: Sequence[str], outcome: Outcome | None) -> None:
    """Writes the record of a job: its label, and after training the run's folder and the exported role.

    The record is a file because a launcher may run the job in another process or on another machine.
    """
    texts = [text.lstrip("+") for text in overrides]
    record = {"label": " ".join(text for text in texts if not text.startswith("seed="))}
    if outcome is not None:
        if not outcome.is_main:
            return
        record |= {"folder": str(outcome.folder.path.resolve()), "role": outcome.summary["export"]}
    (folder / JOBS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / JOBS_FOLDER / f"{number}.json", record)
