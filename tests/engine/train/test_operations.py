"""How many operations the step of each shipped recipe takes: a count, the same on every machine, never a time.

The counts lie in `operations.json` beside this file, for one version of torch (others break some operations up
differently). After a change that is meant to raise or lower them:

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
from kdbench.config.load import load_recipe, recipe_names
from kdbench.experiment.artifacts import reads_artifacts
from kdbench.speed.profiling.profiler import OperationCounter

FILE = Path(__file__).with_name("operations.json")
RENEW = (
    f"If that is meant, renew the counts with `python tests/engine/{Path(__file__).name}`, and say why in the commit."
)


def version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def counted() -> dict[str, dict[str, int]]:
    told = json.loads(FILE.read_text(encoding="utf-8"))
    if told["torch"] != version():
        pytest.skip(f"the counts are those of torch {told['torch']}, this is {version()}")
    return told["recipes"]


def benches(name: str) -> dict[str, StageHarness]:
    """The stages that read nothing that an earlier one makes, by name; of the rounds of a loop the first."""
    loaded = with_synthetic_data(load_recipe(name, ["log_every=1000"]), samples=960, batch_size=4)
    found: dict[str, StageHarness] = {}
    for number, stage in enumerate(loaded.stages):
        plain = stage.name.partition("@")[0]
        if stage.epochs != 0 and stage.steps != 0 and not reads_artifacts(stage) and plain not in found:
            found[plain] = build_stage(loaded, stage=number)
    return found


def operations(run: StageHarness) -> int:
    """Of the second step: the optimiser has its state, and nothing is logged."""
    run.step(1)
    window = next(itertools.islice(run.windows(), 1))
    run.runner.begin_step()
    assert not run.runner.progress.logs_after(run.runner.progress.steps_done + 1)
    with OperationCounter() as found:
        run.runner.step(window)
    return found.total


def test_every_recipe_is_counted():
    assert sorted(counted()) == recipe_names(), f"recipes came or went. {RENEW}"


@pytest.mark.parametrize("name", recipe_names())
def test_the_step_of_a_recipe_takes_as_many_operations_as_before(name):
    if name not in counted():
        pytest.fail(f"{name} has no count yet. {RENEW}")
    found = {stage: operations(run) for stage, run in benches(name).items()}
    before = counted()[name]
    changed = {stage: (before.get(stage), found.get(stage)) for stage in {**before, **found}}
    changed = {stage: pair for stage, pair in changed.items() if pair[0] != pair[1]}
    told = "; ".join(f"stage {stage}: {old} before, {new} now" for stage, (old, new) in changed.items())
    assert not changed, f"the operations of a step of {name} changed ({told}). {RENEW}"


def test_one_operation_more_would_be_noticed():
    """Negative control: a term that does one thing more."""
    run = benches("digits/kd")["main"]
    term = run.network.term("kd").edges[0].term
    forward = term.forward
    term.forward = lambda **given: forward(**given) * torch.ones(())
    assert operations(run) > counted()["digits/kd"]["main"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    from helpers.recipes import register_plugin_parts

    register_plugin_parts()
    new = {name: {stage: operations(run) for stage, run in benches(name).items()} for name in recipe_names()}
    FILE.write_text(json.dumps({"torch": version(), "recipes": new}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(new)} recipes counted in {FILE.name}")
