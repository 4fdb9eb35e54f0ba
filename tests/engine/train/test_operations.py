"""Numbers of operations in a step of six recipes that differ in kind: counts, equal on every machine, and no times.

The counts are in `operations.json` beside this file, for one version of torch; other versions divide some operations
differently. After a change that is meant to raise or lower them:

    python tests/engine/train/test_operations.py
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # when it runs as a script

from helpers.recipes import StageHarness, build_stage, plugin_registration, with_synthetic_data  # noqa: F401
from kdbench.config.load import load_recipe
from kdbench.experiment.artifacts import reads_artifacts
from kdbench.speed.profiling.profiler import OperationCounter

RECIPES = (
    "digits/kd",  # soft targets
    "digits/fitnets",  # features with an adapter
    "digits/ca_mkd",  # several teachers with routers
    "digits/dfad",  # adversarial updates
    "digits/tgeo_kd",  # a bilevel update
    "digits/lwf",  # continual learning
)
FILE = Path(__file__).with_name("operations.json")
RENEW = (
    "If the change is intended, run `python tests/engine/train/test_operations.py` and give the reason in the commit."
)


def torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def recorded_counts() -> dict[str, dict[str, int]]:
    """Returns recipe -> stage -> operations; skips the test under another version of torch."""
    record = json.loads(FILE.read_text(encoding="utf-8"))
    if record["torch"] != torch_version():
        pytest.skip(f"the counts are for torch {record['torch']}; the installed version is {torch_version()}")
    return record["recipes"]


def build_stages(name: str) -> dict[str, StageHarness]:
    """Builds the stages of a recipe that read no artifact, by name; of the rounds of a loop the first."""
    loaded = with_synthetic_data(load_recipe(name, ["log_every=1000"]), samples=960, batch_size=4)
    stages: dict[str, StageHarness] = {}
    for number, stage in enumerate(loaded.stages):
        base_name = stage.name.partition("@")[0]
        if stage.epochs != 0 and stage.steps != 0 and not reads_artifacts(stage) and base_name not in stages:
            stages[base_name] = build_stage(loaded, stage=number)
    return stages


def count_operations(stage: StageHarness) -> int:
    """Counts the operations of the second step: the optimizer has its state, and nothing is logged."""
    stage.step(1)
    window = next(itertools.islice(stage.windows(), 1))
    stage.runner.begin_step()
    assert not stage.runner.progress.logs_after(stage.runner.progress.steps_done + 1)
    with OperationCounter() as counter:
        stage.runner.step(window)
    return counter.total


def test_record_contains_the_six_recipes():
    assert tuple(recorded_counts()) == RECIPES, RENEW


@pytest.mark.parametrize("name", RECIPES)
def test_step_has_the_recorded_number_of_operations(name):
    counts = {stage_name: count_operations(stage) for stage_name, stage in build_stages(name).items()}
    recorded = recorded_counts()[name]
    differences = {
        stage_name: (recorded.get(stage_name), counts.get(stage_name))
        for stage_name in {**recorded, **counts}
        if recorded.get(stage_name) != counts.get(stage_name)
    }
    assert not differences, (
        f"the operations in a step of {name} changed; (before, now) by stage: {differences}. {RENEW}"
    )


def test_additional_operation_of_a_term_changes_the_count():
    """Negative control of the test above."""
    stage = build_stages("digits/kd")["main"]
    term = stage.network.term("kd").edges[0].term
    forward = term.forward
    term.forward = lambda **operands: forward(**operands) * torch.ones(())
    assert count_operations(stage) > recorded_counts()["digits/kd"]["main"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    from helpers.recipes import register_plugin_parts

    register_plugin_parts()
    new_counts = {
        name: {stage_name: count_operations(stage) for stage_name, stage in build_stages(name).items()}
        for name in RECIPES
    }
    FILE.write_text(json.dumps({"torch": torch_version(), "recipes": new_counts}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote the counts of {len(new_counts)} recipes to {FILE.name}")
