"""Each role of a stage built and run once without computing: its features' shapes, its FLOPs, what overwrites what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdbench.config.schema import StageConfig
from kdbench.data.source_spec import SourceSpec
from kdbench.engine.network.build import build_model, shared_module, transform
from kdbench.engine.network.features import Capture, Feature, find_module, model_output, module_state
from kdbench.engine.network.operands import feature_of
from kdbench.engine.network.resolved_stage import Layout, SampleFacts
from kdbench.engine.network.roles import input_feature, inputs_of
from kdbench.engine.plan.meta import META, ROWS, in_words, meta_field
from kdbench.engine.plan.trace import ModuleCall, trace
from kdbench.errors import ConfigError, DataError, Location


def survey(stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], seed: int) -> Survey:
    """Builds all models on meta (where one cannot live there, all on the CPU), and runs each once in eval mode.

    Raises:
        ConfigError: a model cannot take what it sees, or holds no module of that name.
    """
    for device in (META, torch.device("cpu")):
        found = Survey(stage, layout, specs, seed, device)
        try:
            for name in layout.order:
                found.add(name)
        except _CannotBuild as error:
            if device != META:
                told = " ".join(str(error.reason).split())[:300] or type(error.reason).__name__
                raise ConfigError(
                    f"{error.place}: the model cannot be built with these parameters ({told})"
                ) from error.reason
            continue
        return found
    raise AssertionError("unreachable")


class _CannotBuild(Exception):
    """A model cannot be built on this device."""

    def __init__(self, place: Location, reason: Exception) -> None:
        super().__init__(str(reason))
        self.place, self.reason = place, reason


class Survey:
    """The models of a stage, one after the other: what each is built from, and what its features look like.

    Args:
        layout: what is known of the stage before any model is built.
    """

    def __init__(
        self, stage: StageConfig, layout: Layout, specs: Mapping[str, SourceSpec], seed: int, device: torch.device
    ) -> None:
        self.stage, self.layout, self.specs, self.seed, self.device = stage, layout, specs, seed, device
        self.facts: dict[str, SampleFacts] = {}
        self.models: dict[str, nn.Module] = {}
        self.calls: dict[str, list[ModuleCall]] = {}
        self.whole_flops: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.values: dict[tuple[str, Feature], Tensor] = {}
        self.shapes: dict[tuple[str, Feature], tuple[int, ...]] = {}
        self.overwritten: dict[str, frozenset[Feature]] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}

    def layout_of(self, *, last: bool) -> Layout:
        """The layout with what was found out.

        Args:
            last: whether it is the recipe's last stage, whose exported role has to be measured.
        """
        found = replace(self.layout, facts=self.facts, shapes=self.shapes, overwritten=self.overwritten)
        return replace(found, unmeasured=self._unmeasured(last))

    def _unmeasured(self, last: bool) -> frozenset[str]:
        """The roles that cannot be evaluated, because they do not give a value for each class.

        Raises:
            ConfigError: the result of the recipe is one of them.
        """
        spec, stage = self.specs.get("eval"), self.stage
        if spec is None or spec.classes is None:
            return frozenset()
        shapes = self.outputs.items()
        found = frozenset(name for name, shape in shapes if len(shape) != 1 or shape[0] < spec.classes)
        for name in (stage.export, *stage.evaluate):
            if name in found and (last or name in stage.evaluate):
                raise ConfigError(
                    f"{stage.roles[name].location}: role {name!r} gives {list(self.outputs[name])} per sample, but what "
                    f"is evaluated has to give a value for each of the {spec.classes} classes of source 'eval'. Name "
                    f"another role in `{'export' if name == stage.export else 'evaluate'}`."
                )
        return found

    def add(self, name: str) -> None:
        """Builds a role on what the roles before it give, and runs it."""
        stage, config = self.stage, self.stage.roles[name]
        inputs = [self._value(address) for address in inputs_of(config)]
        source = self.layout.sources[name]
        self.facts[name] = _sample_facts(source, tuple(inputs[0].shape[1:]), self.specs)
        model = self.models[name] = self._model(name).eval()
        for feature in self.layout.features[name]:
            if not feature.is_output:
                find_module(model, feature.path, _operand_place(stage, name, feature) or config.location)
        seen = " and ".join(str(list(value.shape[1:])) for value in inputs)
        with in_words(f"{config.location}: role {name!r} cannot take an input of shape {seen}"):
            with torch.no_grad():
                self.calls[name] = trace(model, *inputs)
            with FlopCounterMode(display=False) as whole, torch.no_grad():
                output = model(*inputs)
        self.outputs[name] = tuple(model_output(output).shape[1:])
        spoiled = set()
        for feature in self.layout.features[name]:
            tensor = model_output(output, feature.path) if feature.is_output else None
            if tensor is None:
                tensor, overwritten = self._inner(name, feature)
                spoiled |= {feature} if overwritten else set()
            self.shapes[name, feature] = tuple(tensor.shape[1:])
            self.values[name, feature] = tensor
        self.overwritten[name] = frozenset(spoiled)
        self.whole_flops[name] = whole.get_total_flops() // ROWS
        self.flops[name] = self._flops_in_step(name, inputs)
        for operand in stage.read_operands(self.layout.terms):
            if operand.kind == "role" and operand.role == name and operand.is_state:
                try:
                    self.shapes[name, feature_of(operand)] = tuple(module_state(model, feature_of(operand)).shape)
                except ConfigError as error:
                    raise ConfigError(f"{operand.location}: {operand}: {error}") from None

    def _flops_in_step(self, name: str, inputs: list[Tensor]) -> int:
        """FLOPs of one sample as far as the step runs the role: to the last feature that is read, as captured there."""
        capture = Capture(self.models[name], self.layout.features[name], stop=True)
        if not capture.stop:
            return self.whole_flops[name]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            capture(*inputs)
        capture.remove()
        return counter.get_total_flops() // ROWS

    def _model(self, name: str) -> nn.Module:
        config = self.stage.roles[name]
        if config.mode == "reuse":
            return shared_module(config, self.models[config.source_role or ""])
        try:
            with self.device:
                return transform(config, build_model(config, self.stage.roles, self.facts[name], self.seed))
        except ConfigError:
            missing = next((spec.problem for spec in self.specs.values() if spec.problem), None)
            if self.facts[name].classes is None and missing is not None:  # what it lacks, the data would have told
                raise DataError(missing) from None
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise _CannotBuild(config.model.location if config.model else config.location, error) from error

    def _value(self, address: str) -> Tensor:
        if ":" in address:
            return self.values[input_feature(address)]
        source, name = address.split(".", 1)
        return meta_field(self.specs[source], name, ROWS, self.device)

    def _inner(self, name: str, feature: Feature) -> tuple[Tensor, bool]:
        """A tensor like the feature, and whether something overwrites it later in the forward."""
        path = find_module(self.models[name], feature.path)[0]
        found = [c for c in self.calls[name] if c.path == path and c.call == feature.call]
        signal = (found[0].input if feature.side == "in" else found[0].output) if found else None
        if signal is None:
            times = sum(1 for c in self.calls[name] if c.path == path)
            place = _operand_place(self.stage, name, feature) or self.stage.roles[name].location
            raise ConfigError(
                f"{place}: {feature} of role {name!r} never comes: module {path!r} is called {times} time(s) in a "
                "forward"
            )
        return torch.zeros(signal.shape, dtype=signal.dtype, device=self.device), signal.overwritten


def _sample_facts(source: str, seen: tuple[int, ...], specs: Mapping[str, SourceSpec]) -> SampleFacts:
    """Classes and shapes for a role; where its own source has no classes or images, those of the evaluation source."""
    own, evaluation = specs[source], specs.get("eval", specs[source])
    spec = own if own.classes is not None else evaluation
    image = (evaluation.fields.get("image") or own.fields.get("image") or ((), ""))[0]
    return SampleFacts(spec.classes, tuple(seen), tuple(image) or None)


def _operand_place(stage: StageConfig, role: str, feature: Feature) -> Any:
    for operand in stage.read_operands():
        if operand.kind == "role" and operand.role == role and operand.path == feature.path:
            return f"{operand.location}"
    return None
