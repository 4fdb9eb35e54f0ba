"""Jobs of a Hydra multirun. Each job has a recipe, an outcome, and a record on the disk for the sweep's table."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.config.compose.hydra import job_overrides
from kdbench.config.load import load_job
from kdbench.entries import EntryError, read_entries
from kdbench.errors import UserError, escape_control_characters
from kdbench.files import read_json, write_json
from kdbench.plugins import load_plugins
from kdbench.report.summary import headline_accuracy

if TYPE_CHECKING:
    from kdbench.config.schema import Recipe
    from kdbench.experiment.run import Outcome

JOBS_FOLDER = "jobs"
"""Name of the folder with one record per job. It is in the folder of the multirun's config files."""


@dataclass(frozen=True)
class JobRecord:
    """The record of one job of a multirun, a JSON file.

    Attributes:
        label: overrides of the job without the seed.
        folder: run folder; None: the job has not finished.
        role: name of the role (network) that the run exports.
    """

    label: str
    folder: str | None = None
    role: str = "student"


class JobFailed(Exception):
    """Raised if a job of a multirun failed. The error of the job is already printed; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Job:
    """One training of a command line: the only job of Hydra's run, or one job of a multirun.

    Args:
        config: the composed config without the key `hydra`.
        hydra_config: the config under the key `hydra`.
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
        """The position of the job in the sweep, from 0."""
        return self.hydra_config.job.num

    def start(self) -> None:
        """Prints the overrides of the job and loads its recipe. An error is recorded, not raised."""
        print(f"job {self.number}: {' '.join(text.lstrip('+') for text in self.overrides)}", flush=True)
        # Written before training too, so that a job that fails or is killed has a row in the sweep's table.
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
        """Returns the recipe that `start` loaded. Must not be called if `start` recorded a failure."""
        assert self.recipe is not None
        return self.recipe

    def run_training(self, train: Callable[[], Outcome]) -> None:
        """Trains the recipe and records the outcome or the failure."""
        try:
            self.outcome = train()
            _write_record(self.folder, self.number, self.overrides, self.outcome)
        except Exception as error:
            self.record_failure(error)

    def record_failure(self, error: Exception) -> None:
        """Prints an error (with a traceback if it is a bug) and stores the exit code.

        The sweep continues with the next job.
        """
        is_user_error = isinstance(error, UserError)
        if is_user_error:
            print(f"kdbench: job {self.number}: {escape_control_characters(str(error))}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        self.failure = JobFailed(2 if is_user_error else 1)

    def objective(self) -> float | None:
        """Returns the value that a sweeper maximizes, or None if the job has not finished.

        The value is the top-1 accuracy on the validation split, or on the test split if there is no validation split.
        """
        return None if self.outcome is None else headline_accuracy(self.outcome.summary)


def _write_record(folder: Path, number: int, overrides: Sequence[str], outcome: Outcome | None) -> None:
    """Writes the `JobRecord` of a job. `outcome` is None before training.

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


def read_records(folder: Path) -> list[JobRecord]:
    """Reads the records of all jobs of a multirun, in the order of the jobs.

    For a damaged record, a line with the name of the file is printed, and the job is left out.

    Args:
        folder: folder of the multirun's config files.
    """
    paths = [path for path in (folder / JOBS_FOLDER).glob("*.json") if path.stem.isdecimal()]
    records = []
    for path in sorted(paths, key=lambda path: int(path.stem)):
        try:
            records.append(read_entries(JobRecord, read_json(path)))
        except (UserError, EntryError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{path} is damaged: {error}"
            message = f"{reason}; the table does not contain job {path.stem}."
            print(f"kdbench: {escape_control_characters(message)}", file=sys.stderr)
    return records
