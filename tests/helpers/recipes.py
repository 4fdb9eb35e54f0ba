"""Loads recipes from YAML text, plans and builds their stages, runs them, and compares their results.

The fixture `plugin_registration` registers the plug-in `helpers.plugin_parts` for one test module.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kdbench.config.load import load_recipe
from kdbench.config.schema import PartConfig, Recipe, SourceConfig, StageConfig
from kdbench.data.describe import describe_source, describe_sources
from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.data.loading.build import build_sources
from kdbench.data.loading.source import Source
from kdbench.engine.network.build import build_network
from kdbench.engine.network.network import Network
from kdbench.engine.plan.plan import StagePlan, plan_stage
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.notices import CollectedNotices
from kdbench.engine.train.runner import Runner
from kdbench.experiment.run import Outcome
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json, read_json_lines
from kdbench.registry import REGISTRIES
from kdbench.report.console import ConsoleReporter
from kdbench.report.tracking import TIMING_FIELDS
from kdbench.run_folder import RunFolder

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]

SYNTHETIC_DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 64}\n"
"""The data of most recipes in tests; the recipe's own lines follow."""


def register_plugin_parts() -> None:
    """Registers the parts of `helpers.plugin_parts`."""
    for registry in REGISTRIES.values():
        registry.add_plugin("helpers.plugin_parts")


@pytest.fixture(scope="module", autouse=True)
def plugin_registration() -> Iterator[None]:
    """Registers the parts of `helpers.plugin_parts` for one test module."""
    register_plugin_parts()
    yield
    for registry in REGISTRIES.values():
        for name, entry in list(registry._plugin_entries.items()):
            if entry.module == "helpers.plugin_parts":
                del registry._plugin_entries[name]


def recipe_from_text(text: str, *overrides: str, name: str = "own", data: str = SYNTHETIC_DATA) -> Recipe:
    """Writes `data` and `text` to `<name>.yaml` in the working folder and loads this recipe."""
    file = Path(f"{name}.yaml")
    file.write_text(data + textwrap.dedent(text), encoding="utf-8")
    return load_recipe(str(file), list(overrides))


def stage_plan(loaded: Recipe, stage: int = 0, world_size: int = 1) -> StagePlan:
    """Plans one stage of a recipe."""
    config = loaded.stages[stage]
    specs = describe_sources(config.data, config.validation, loaded.data_root)
    return plan_stage(config, specs, loaded, world_size=world_size)


def stage_sources(loaded: Recipe, stage: StageConfig, device: torch.device = CPU) -> dict[str, Source]:
    """Builds the sources of one stage."""
    dtype = torch.float64 if stage.precision == "float64" else torch.float32
    return build_sources(
        stage.data,
        validation=stage.validation,
        seed=loaded.seed,
        device=device,
        data_root=loaded.data_root,
        dtype=dtype,
    )


@dataclass
class StageHarness:
    """One stage of a recipe, ready to step, without a run folder or logs."""

    recipe: Recipe
    plan: StagePlan
    network: Network
    runner: Runner
    sources: dict[str, Source]
    feed: Feed

    @property
    def notices(self) -> list[str]:
        """The notices of the runner so far."""
        notices = self.runner.notices
        assert isinstance(notices, CollectedNotices)
        return notices.texts

    def windows(self) -> Iterator[list[MicroBatch]]:
        """Yields the batches of each step, from the next step on."""
        return self.feed.windows(self.runner.progress.steps_done)

    def step(self, count: int = 1) -> StageHarness:
        """Takes training steps."""
        for window in itertools.islice(self.windows(), count):
            self.runner.begin_step()
            self.runner.step(window)
        return self

    def model(self, role: str = "student") -> torch.nn.Module:
        return self.network.role(role).model

    def weights(self, role: str = "student") -> dict[str, Tensor]:
        """Copies the state dict of a role."""
        return {name: value.clone() for name, value in self.model(role).state_dict().items()}


def build_stage(loaded: Recipe | str, *overrides: str, stage: int = 0, device: torch.device = CPU) -> StageHarness:
    """Plans and builds one stage as an experiment does. Frozen roles keep their initial weights."""
    if isinstance(loaded, str):
        loaded = recipe_from_text(loaded, *overrides)
    plan = stage_plan(loaded, stage)
    config = loaded.stages[stage]
    sources = stage_sources(loaded, config, device)
    network = build_network(config, plan.resolved_stage, seed=loaded.seed, device=device)
    if config.precision == "float64":
        network.double()
    feed = Feed(
        {name: sources[name] for name in plan.resolved_stage.step_sources(config)},
        plan.train_source,
        config.accumulate,
    )
    runner = Runner(plan, loaded, network, device, steps_per_epoch=feed.steps_per_epoch, notices=CollectedNotices())
    return StageHarness(loaded, plan, network, runner, sources, feed)


def equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Returns True if two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_on_fake_tensors(harness: StageHarness, steps: int = 2) -> None:
    """Takes whole steps under FakeTensorMode, in which reading a tensor's value on the host raises.

    Covers forward, terms, backward, clipping, optimizer, meters and averages: everything between `begin_step` and the
    end of `step`. The harness cannot be used afterwards.
    """
    windows = list(itertools.islice(harness.windows(), steps))
    mode, runner = FakeTensorMode(), harness.runner
    steps_before = runner.progress.steps_done
    fake = _FakeConverter(mode.from_tensor)
    fake.modules(harness.network)
    if runner.average is not None:
        fake.modules(runner.average)
    for group in harness.network.terms.values():
        group.scheduled = tuple((fake(tensor), schedule) for tensor, schedule in group.scheduled)  # type: ignore[union-attr]
    fake.attributes(vars(runner.meters))
    for update in runner.updates:
        update.parameters = [fake(parameter) for parameter in update.parameters]  # type: ignore[misc]
        update.meter_indices = fake(update.meter_indices)
        if update.inner_step is not None:
            update.inner_step.parameters = [fake(parameter) for parameter in update.inner_step.parameters]  # type: ignore[misc]
            fake.attributes(vars(update.inner_step))
        for group in update.optimizer.param_groups:
            group["params"] = [fake(parameter) for parameter in group["params"]]
        for state in list(update.optimizer.state.values()):
            step_count = float(state["step"]) if "step" in state else None
            fake.attributes(state)
            if step_count is not None:
                with mode:  # the optimizer counts steps on the host, so that reading this value does not synchronize
                    state["step"] = torch.tensor(step_count)
        update.optimizer.state = defaultdict(dict, {fake(p): s for p, s in update.optimizer.state.items()})
    batches = [
        [{source: Batch({k: fake(v) for k, v in batch.fields.items()}) for source, batch in m.items()} for m in window]
        for window in windows
    ]
    with mode, NoHostTensors():
        for window in batches:
            runner.begin_step()
            runner.step(window)
    assert runner.progress.steps_done == steps_before + steps


class NoHostTensors(TorchFunctionMode):
    """Raises if a part creates a tensor from host numbers: on CUDA, the copy synchronises host and device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor):
            caller = sys._getframe(1).f_globals["__name__"]
            if not caller.startswith("torch."):  # an optimizer creates its step counts once
                raise RuntimeError(f"{caller} creates a tensor from host numbers in a step")
        return func(*args, **(kwargs or {}))


class _FakeConverter:
    """Converts tensors to fake tensors, the same tensor always to the same fake tensor."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self.convert = convert
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.cache:
            # The cache keeps the original alive, so that its id stays unique.
            self.cache[id(tensor)] = (tensor, self.convert(tensor))
        return self.cache[id(tensor)][1]

    def attributes(self, namespace: dict[str, Any]) -> None:
        namespace.update({name: self(value) for name, value in namespace.items() if isinstance(value, Tensor)})

    def modules(self, root: torch.nn.Module) -> None:
        for module in root.modules():
            for namespace in (module._parameters, module._buffers, vars(module)):
                self.attributes(namespace)  # scheduled values are plain attributes


def with_synthetic_data(loaded: Recipe, *, samples: int = 96, batch_size: int = 16) -> Recipe:
    """Replaces a shipped recipe's data by synthetic data of the same shape and classes, with small batches.

    Initial weights are dropped: nothing is downloaded and no teacher is trained. Models, terms, optimizer and schedules
    remain those of the recipe.
    """
    stages = []
    for stage in loaded.stages:
        data = {name: _synthetic(source, loaded, samples, batch_size) for name, source in stage.data.items()}
        roles = {name: replace(role, weights=None, require={}) for name, role in stage.roles.items()}
        validation = None if stage.validation is None else 0.5
        stages.append(replace(stage, data=data, roles=roles, validation=validation, eval_batch_size=batch_size))
    return replace(loaded, stages=tuple(stages))


def _synthetic(source: SourceConfig, loaded: Recipe, samples: int, batch_size: int) -> SourceConfig:
    spec = describe_source(source, loaded.data_root)
    if spec.classes is None or source.dataset.type == "synthetic":
        # The number of samples stays: the size of an image bank depends on it.
        return replace(source, batch_size=min(batch_size, source.batch_size))
    from kdbench.registry import DATASETS

    entry = DATASETS.entry(source.dataset.type)
    values = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(source.dataset.params)
    shape = entry.facts.get("shape") or spec.fields["image"][0]
    shape = [values[size] if isinstance(size, str) else size for size in shape]
    count = max(samples, 2 * spec.classes)
    params = {"shape": shape, "classes": spec.classes, "samples": count}
    label_fraction = None if source.label_fraction is None else min(count // 2, max(spec.classes, 8))
    split = "train" if source.split == "train" else "test"
    return replace(
        source,
        dataset=PartConfig(type="synthetic", params=params),
        batch_size=min(batch_size, source.batch_size),
        label_fraction=label_fraction,
        split=split,
    )


class QuietConsole(ConsoleReporter):
    """Prints nothing and collects the notices."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def train_recipe_text(
    text: str, *overrides: str, console: QuietConsole | None = None, data: str = SYNTHETIC_DATA
) -> Outcome:
    """Loads a recipe from text and runs it to its end in this process."""
    return run_experiment(recipe_from_text(text, *overrides, data=data), console=console or QuietConsole())


def comparable_results(folder: Path | str) -> dict[str, Any]:
    """Collects the results that two equal runs share bit for bit: checkpoints, summary and log lines, no times."""
    run = RunFolder(folder)
    results: dict[str, Any] = {}
    for file in (
        run.last,
        run.best,
        *sorted(run.checkpoints.glob("stage_*.pt")),
        *sorted(run.checkpoints.glob("e*.pt")),
    ):
        if file.exists():
            tree = torch.load(file, weights_only=True)
            tree.pop("tracker", None)
            tree.get("history", {}).pop("seconds", None)
            for key, value in flatten_tree(tree):
                results[f"{file.name}:{key}"] = value
    summary = read_json(run.summary)
    for key, value in flatten_tree(summary):
        if key != "wall_seconds" and ".latency_ms" not in key:
            results[f"summary:{key}"] = value
    for number, line in enumerate(read_json_lines(run.metrics)):
        timeless = {key: value for key, value in line.items() if key not in TIMING_FIELDS}
        for key, value in flatten_tree(timeless):
            results[f"metrics:{number}.{key}"] = value
    return results


def flatten_tree(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings and lists with dotted keys; a tensor becomes its type, shape and bytes."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten_tree(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from flatten_tree(value, f"{prefix}.{key}")
    elif isinstance(tree, Tensor):
        yield (
            prefix,
            (str(tree.dtype), tuple(tree.shape), tree.contiguous().flatten().view(torch.uint8).numpy().tobytes()),
        )
    else:
        yield prefix, repr(tree)


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values differ between two results."""
    return [key for key in {**first, **second} if key not in first or key not in second or first[key] != second[key]]


def train_command(*arguments: str, processes: int = 1, plugin: bool = True) -> list[str]:
    """Returns the command line of `kdbench train` for a new process, under torchrun for several processes."""
    command = ("-m", "kdbench", "train", *arguments, *(["--plugin", "helpers.plugin_parts"] if plugin else []))
    return [sys.executable, *command] if processes == 1 else torchrun_command(*command, processes=processes)


def torchrun_command(*arguments: str, processes: int = 2) -> list[str]:
    """Returns the command line of a script or module under torchrun."""
    options = ["--nproc-per-node", str(processes), "--master-port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]


def two_node_commands(*arguments: str) -> list[list[str]]:
    """Returns the torchrun command lines of two nodes with one process each; this machine is both nodes."""
    options = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(_free_port()),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [[*torchrun, *options, "--node-rank", str(node), *arguments] for node in range(2)]


def rank_commands(*arguments: str, processes: int = 2) -> list[tuple[list[str], dict[str, str]]]:
    """Returns the command line and the environment of each process, without torchrun."""
    rendezvous = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return [([sys.executable, *arguments], {**subprocess_environment(), **rendezvous, **rank}) for rank in ranks]


def subprocess_environment() -> dict[str, str]:
    """Returns the environment of a new process: one thread, with the tests' folder and the repository on the path."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_command(*arguments: str, processes: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs `kdbench train` in a new process."""
    return subprocess.run(
        train_command(*arguments, processes=processes),
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
