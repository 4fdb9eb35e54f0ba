"""`kdbench train`: one run, and what it prints at its end."""

from __future__ import annotations

from kdbench.config.schema import Recipe


def run(recipe: Recipe) -> int:
    """Trains a recipe to its end; a finished one only prints its summary again."""
    from kdbench.results.experiment import run as run_experiment
    from kdbench.results.summary import print_summary

    outcome = run_experiment(recipe)
    if outcome.is_main:
        if outcome.repeated:
            print(f"{outcome.folder} is finished; this is its summary (fresh=true trains anew).")
        print_summary(outcome.summary)
        print(f"Everything is in {outcome.folder}")
    return 0
