"""What tests of whole recipes share: a recipe from YAML text, its plan, its runner, and a step that must not wait.

`parts` (a fixture) makes the plug-in `helpers.plugin_parts` known while a test module runs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from kdbench.data.loading.build import build_sources
from kdbench.data.loading.source import Source
from kdbench.engine.distributed.world import World
from kdbench.engine.network.build import build_network
from kdbench.engine.network.network import Network
from kdbench.engine.network.operands import Batch
from kdbench.engine.plan.plan import StagePlan, plan_stage
from kdbench.engine.train.loop import Feed
from kdbench.engine.train.runner import Runner
from kdbench.experiment.run import Outcome
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json, read_json_lines
from kdbench.registry import MODELS, REGISTRIES
from kdbench.report.console import ConsoleReporter
from kdbench.report.tracking import TIMING_FIELDS
from kdbench.run_folder import RunFolder

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]

SYNTHETIC_DATA = "dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 64}\n"
"""The data of most recipes here; followed by the recipe's own lines."""


def register_plugin_parts() -> None:
    for registry in REGISTRIES.values():
        registry.add_plugin("helpers.plugin_parts")


@pytest.fixture(scope="module", autouse=True)
def plugin_registration() -> Iterator[None]:
    """Declares the parts of `helpers.plugin_parts` for one test module."""
    register_plugin_parts()
    yield
    for registry in REGISTRIES.values():
        for name, entry in list(registry._plugin_entries.items()):
            if entry.module == "helpers.plugin_parts":
                del registry._plugin_entries[name]


def recipe_from_text(text: str, *overrides: str, name: str = "own", data: str = SYNTHETIC_DATA) -> Recipe:
    """Writes `data` and `text` into `<name>.yaml` of the current folder, and loads it."""
    file = Path(f"{name}.yaml")
    file.write_text(data + textwrap.dedent(text), encoding="utf-8")
    return load_recipe(str(file), list(overrides))


def stage_plan(loaded: Recipe, stage: int = 0, world_size: int = 1) -> StagePlan:
    config = loaded.stages[stage]
    specs = describe_sources(config.data, config.validation, loaded.data_root)
    return plan_stage(config, specs, loaded, world_size=world_size)


def stage_sources(loaded: Recipe, stage: StageConfig, device: torch.device = CPU) -> dict[str, Source]:
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
    """One stage of a recipe, ready to step, without a folder or logs."""

    recipe: Recipe
    plan: StagePlan
    network: Network
    runner: Runner
    sources: dict[str, Source]
    feed: Feed

    def windows(self) -> Iterator[list[Batch]]:
        return self.feed.windows(self.runner.steps_done)

    def step(self, count: int = 1) -> StageHarness:
        for window in itertools.islice(self.windows(), count):
            self.runner.begin_step()
            self.runner.step(window)
        return self

    def model(self, role: str = "student") -> torch.nn.Module:
        return self.network.role(role).model

    def weights(self, role: str = "student") -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model(role).state_dict().items()}


def build_stage(loaded: Recipe | str, *overrides: str, stage: int = 0, device: torch.device = CPU) -> StageHarness:
    """Plans and builds one stage as an experiment does; frozen roles have their initial weights."""
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
    runner = Runner(plan, loaded, network, device, steps_per_epoch=feed.steps_per_epoch, world=World())
    return StageHarness(loaded, plan, network, runner, sources, feed)


def equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_on_fake_tensors(harness: StageHarness, steps: int = 2) -> None:
    """Runs whole steps under FakeTensorMode, where nothing has a value: reading one on the host raises.

    Forward, terms, backward, clipping, optimiser, meters, averages: everything between `begin_step` and the end of
    `step`. The bench is of no use afterwards.
    """
    windows = list(itertools.islice(harness.windows(), steps))
    mode, runner = FakeTensorMode(), harness.runner
    done = runner.steps_done
    fake = _Fake(mode.from_tensor)
    fake.modules(harness.network)
    if runner.average is not None:
        fake.modules(runner.average)
    for group in harness.network.terms.values():
        group.moving = tuple((fake(tensor), schedule) for tensor, schedule in group.moving)  # type: ignore[union-attr]
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
            counted = float(state["step"]) if "step" in state else None
            fake.attributes(state)
            if counted is not None:
                with mode:  # the host's own count of steps, which reading does not wait for
                    state["step"] = torch.tensor(counted)
        update.optimizer.state = defaultdict(dict, {fake(p): s for p, s in update.optimizer.state.items()})
    batches = [[{s: {k: fake(v) for k, v in fields.items()} for s, fields in b.items()} for b in w] for w in windows]
    with mode, NoHostTensors():
        for window in batches:
            runner.begin_step()
            runner.step(window)
    assert runner.steps_done == done + steps


class NoHostTensors(TorchFunctionMode):
    """Raises where a part makes a tensor out of numbers of the host: on CUDA the host waits until they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor):
            caller = sys._getframe(1).f_globals["__name__"]
            if not caller.startswith("torch."):  # an optimiser makes its counts once
                raise RuntimeError(f"{caller} makes a tensor from numbers of the host in a step")
        return func(*args, **(kwargs or {}))


class _Fake:
    """Turns tensors into fake ones, the same tensor always into the same."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.known:
            self.known[id(tensor)] = (tensor, self.make(tensor))  # the original stays alive: an id means one tensor
        return self.known[id(tensor)][1]

    def attributes(self, owned: dict[str, Any]) -> None:
        owned.update({name: self(value) for name, value in owned.items() if isinstance(value, Tensor)})

    def modules(self, root: torch.nn.Module) -> None:
        for module in root.modules():
            for owned in (module._parameters, module._buffers, vars(module)):
                self.attributes(owned)  # scheduled values are plain attributes


def with_synthetic_data(loaded: Recipe, *, samples: int = 96, batch_size: int = 16) -> Recipe:
    """A shipped recipe on synthetic data of the same shape and classes, without anybody's weights or long batches.

    Nothing is downloaded and no teacher is trained; models, terms, optimiser and schedules are the recipe's own.
    """
    stages = []
    for stage in loaded.stages:
        data = {name: _synthetic(source, loaded, samples, batch_size) for name, source in stage.data.items()}
        roles = {name: replace(role, weights=None, accuracy=None) for name, role in stage.roles.items()}
        validation = None if stage.validation is None else 0.5
        stages.append(replace(stage, data=data, roles=roles, validation=validation, eval_batch_size=batch_size))
    return replace(loaded, stages=tuple(stages))


def _synthetic(source: SourceConfig, loaded: Recipe, samples: int, batch_size: int) -> SourceConfig:
    spec = describe_source(source, loaded.data_root)
    if (
        spec.classes is None or source.dataset.type == "synthetic"
    ):  # a bank of images counts the samples that it is told
        return replace(source, batch_size=min(batch_size, source.batch_size))
    from kdbench.registry import DATASETS

    entry = DATASETS.entry(source.dataset.type)
    values = {key: parameter.default for key, parameter in entry.parameters.items()} | dict(source.dataset.params)
    shape = entry.facts.get("shape") or spec.fields["image"][0]
    shape = [values[part] if isinstance(part, str) else part for part in shape]
    count = max(samples, 2 * spec.classes)
    params = {"shape": shape, "classes": spec.classes, "samples": count}
    labels = None if source.label_fraction is None else min(count // 2, max(spec.classes, 8))
    split = "train" if source.split == "train" else "test"
    return replace(
        source,
        dataset=PartConfig(type="synthetic", params=params),
        batch_size=min(batch_size, source.batch_size),
        labels=labels,
        split=split,
    )


class QuietConsole(ConsoleReporter):
    """Prints nothing and keeps the notices."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def train_recipe_text(text: str, *overrides: str, console: QuietConsole | None = None, data: str = SYNTHETIC_DATA) -> Outcome:
    """Runs a recipe of `recipe` to its end in this process."""
    return run_experiment(recipe_from_text(text, *overrides, data=data), console=console or QuietConsole())


def comparable_results(folder: Path | str) -> dict[str, Any]:
    """Everything that two equal runs must agree in, bit for bit: checkpoints, summary, log lines; times left out."""
    run = RunFolder(folder)
    found: dict[str, Any] = {}
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
                found[f"{file.name}:{key}"] = value
    summary = read_json(run.summary)
    for key, value in flatten_tree(summary):
        if key != "wall_seconds" and ".latency_ms" not in key:
            found[f"summary:{key}"] = value
    for number, line in enumerate(read_json_lines(run.metrics)):
        kept = {key: value for key, value in line.items() if key not in TIMING_FIELDS}
        for key, value in flatten_tree(kept):
            found[f"metrics:{number}.{key}"] = value
    return found


def flatten_tree(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists, with dotted keys; a tensor becomes its type, shape and bytes."""
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
    """The keys in which two results differ."""
    return [key for key in {**first, **second} if key not in first or key not in second or first[key] != second[key]]


def train_command(*words: str, processes: int = 1, plugin: bool = True) -> list[str]:
    """The command line of `kdbench train` in a process of its own; under torchrun when there are several."""
    words = ("-m", "kdbench", "train", *words, *(["--plugin", "helpers.plugin_parts"] if plugin else []))
    return [sys.executable, *words] if processes == 1 else torchrun_command(*words, processes=processes)


def torchrun_command(*words: str, processes: int = 2) -> list[str]:
    """A script or module under torchrun."""
    several = ["--nproc-per-node", str(processes), "--master-port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *several, *words]


def two_node_commands(*words: str) -> list[list[str]]:
    """A script or module under torchrun on two nodes with one process each; both nodes are this machine."""
    meeting = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(_free_port()),
    ]
    run = [sys.executable, "-m", "torch.distributed.run"]
    return [[*run, *meeting, "--node-rank", str(node), *words] for node in range(2)]


def rank_commands(*words: str, processes: int = 2) -> list[tuple[list[str], dict[str, str]]]:
    """The same processes without torchrun: each one's words and environment."""
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return [([sys.executable, *words], {**subprocess_environment(), **meeting, **rank}) for rank in ranks]


def subprocess_environment() -> dict[str, str]:
    """For a process of its own: one thread, the tests' folder and the repository on the path."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_command(*words: str, processes: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        train_command(*words, processes=processes), env=subprocess_environment(), capture_output=True, text=True, timeout=timeout
    )


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def model_names(loaded: Recipe) -> Sequence[str]:
    return [role.model.type for stage in loaded.stages for role in stage.roles.values() if role.model is not None]


__all__ = ["MODELS", "plugin_registration"]
