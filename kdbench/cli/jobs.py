"""One job of Hydra's run or multirun: its recipe, its outcome, and the note that it leaves for the sweep."""

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

if TYPE_CHECKING:
    from kdbench.config.schema import Recipe
    from kdbench.experiment.run import Outcome


JOBS_FOLDER = "jobs"
"""Where the notes of a multirun's finished jobs lie, beside its configs."""


class JobFailed(Exception):
    """A job of a multirun that ended with this exit code and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _write_job_note(folder: Path, number: int, overrides: Sequence[str], outcome: Outcome | None) -> None:
    """Leaves a note of a job, which a launcher may run in another process or on another machine.

    Before the job it says what was asked for; after it (with the outcome), where the result lies.
    """
    note = {"label": " ".join(word for text in overrides if not (word := text.lstrip("+")).startswith("seed="))}
    if outcome is not None:
        if not outcome.is_main:
            return
        note |= {"folder": str(outcome.folder.path.resolve()), "role": outcome.summary["export"]}
    (folder / JOBS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / JOBS_FOLDER / f"{number}.json", note)


class Job:
    """One job of Hydra's, from its composed config to what it leaves.

    Args:
        config: without Hydra's node.
        node: Hydra's own node.
    """

    def __init__(self, config: Any, hydra_config: Any) -> None:
        self.config, self.hydra_config = config, hydra_config
        self.overrides = job_overrides(hydra_config)
        self.folder = next(Path(source.path) for source in hydra_config.runtime.config_sources if source.provider == "main")
        self.recipe: Recipe | None = None
        self.outcome: Outcome | None = None
        self.failure: JobFailed | None = None

    @property
    def number(self) -> int:
        """Its place in the sweep."""
        return self.hydra_config.job.num

    def start(self) -> None:
        """Says what was asked for, and loads it."""
        print(f"job {self.number}: {' '.join(text.lstrip('+') for text in self.overrides)}", flush=True)
        _write_job_note(self.folder, self.number, self.overrides, None)
        try:
            self.recipe = self.load()
        except Exception as error:
            self.record_failure(error)

    def load(self) -> Recipe:
        from kdbench.plugins import load_plugins

        load_plugins()
        return load_job(self.config, self.folder, self.hydra_config)

    def loaded_recipe(self) -> Recipe:
        assert self.recipe is not None
        return self.recipe

    def run_training(self, train: Callable[[], Outcome]) -> None:
        """Trains, and notes where the result lies; an error is told, and kept for the sweep's end."""
        try:
            self.outcome = train()
            _write_job_note(self.folder, self.number, self.overrides, self.outcome)
        except Exception as error:
            self.record_failure(error)

    def record_failure(self, error: Exception) -> None:
        mistake = isinstance(error, UserError)
        if mistake:
            print(f"kdbench: job {self.number}: {escape_control_characters(str(error))}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        self.failure = JobFailed(2 if mistake else 1)

    def objective(self) -> float | None:
        """The accuracy that a sweeper may maximise: top-1 on the validation part when there is one, else on test."""
        from kdbench.report.summary import headline_accuracy

        return None if self.outcome is None else headline_accuracy(self.outcome.summary)
