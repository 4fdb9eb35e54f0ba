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
from kdbench.engine.network.build import apply_weight_transforms, build_model, reused_module
from kdbench.engine.network.features import Feature, FeatureExtractor, find_module, model_output, module_state
from kdbench.engine.network.operands import operand_feature
from kdbench.engine.network.resolved_stage import ResolvedStage, SampleFacts
from kdbench.engine.network.roles import input_addresses, parse_role_input
from kdbench.engine.plan.meta import DRY_RUN_ROWS, META, failures_as_config_errors, meta_field
from kdbench.engine.plan.trace import ModuleCall, trace_modules
from kdbench.errors import ConfigError, DataError, Location


def infer_shapes(stage: StageConfig, layout: ResolvedStage, specs: Mapping[str, SourceSpec], seed: int) -> ShapeInference:
    """Builds all models on meta (where one cannot live there, all on the CPU), and runs each once in eval mode.

    Raises:
        ConfigError: a model cannot take what it sees, or holds no module of that name.
    """
    for device in (META, torch.device("cpu")):
        found = ShapeInference(stage, layout, specs, seed, device)
        try:
            for name in layout.order:
                found.add_role(name)
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


class ShapeInference:
    """The models of a stage, one after the other: what each is built from, and what its features look like.

    Args:
        layout: what is known of the stage before any model is built.
    """

    def __init__(
        self, stage: StageConfig, layout: ResolvedStage, specs: Mapping[str, SourceSpec], seed: int, device: torch.device
    ) -> None:
        self.stage, self.layout, self.specs, self.seed, self.device = stage, layout, specs, seed, device
        self.sample_facts: dict[str, SampleFacts] = {}
        self.models: dict[str, nn.Module] = {}
        self.calls: dict[str, list[ModuleCall]] = {}
        self.full_forward_flops: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.values: dict[tuple[str, Feature], Tensor] = {}
        self.shapes: dict[tuple[str, Feature], tuple[int, ...]] = {}
        self.overwritten_features: dict[str, frozenset[Feature]] = {}
        self.output_shapes: dict[str, tuple[int, ...]] = {}

    def resolve(self, *, is_last_stage: bool) -> ResolvedStage:
        """The layout with what was found out.

        Args:
            last: whether it is the recipe's last stage, whose exported role has to be measured.
        """
        found = replace(self.layout, facts=self.sample_facts, shapes=self.shapes, overwritten=self.overwritten_features)
        return replace(found, unmeasured=self._unmeasured(is_last_stage))

    def _unmeasured(self, last: bool) -> frozenset[str]:
        """The roles that cannot be evaluated, because they do not give a value for each class.

        Raises:
            ConfigError: the result of the recipe is one of them.
        """
        spec, stage = self.specs.get("eval"), self.stage
        if spec is None or spec.classes is None:
            return frozenset()
        shapes = self.output_shapes.items()
        found = frozenset(name for name, shape in shapes if len(shape) != 1 or shape[0] < spec.classes)
        for name in (stage.export, *stage.evaluate):
            if name in found and (last or name in stage.evaluate):
                raise ConfigError(
                    f"{stage.roles[name].location}: role {name!r} gives {list(self.output_shapes[name])} per sample, but what "
                    f"is evaluated has to give a value for each of the {spec.classes} classes of source 'eval'. Name "
                    f"another role in `{'export' if name == stage.export else 'evaluate'}`."
                )
        return found

    def add_role(self, name: str) -> None:
        """Builds a role on what the roles before it give, and runs it."""
        stage, config = self.stage, self.stage.roles[name]
        inputs = [self._value(address) for address in input_addresses(config)]
        source = self.layout.sources[name]
        self.sample_facts[name] = _sample_facts(source, tuple(inputs[0].shape[1:]), self.specs)
        model = self.models[name] = self._model(name).eval()
        for feature in self.layout.features[name]:
            if not feature.is_output:
                find_module(model, feature.path, _operand_place(stage, name, feature) or config.location)
        seen = " and ".join(str(list(value.shape[1:])) for value in inputs)
        with failures_as_config_errors(f"{config.location}: role {name!r} cannot take an input of shape {seen}"):
            with torch.no_grad():
                self.calls[name] = trace_modules(model, *inputs)
            with FlopCounterMode(display=False) as whole, torch.no_grad():
                output = model(*inputs)
        self.output_shapes[name] = tuple(model_output(output).shape[1:])
        spoiled = set()
        for feature in self.layout.features[name]:
            tensor = model_output(output, feature.path) if feature.is_output else None
            if tensor is None:
                tensor, overwritten = self._inner(name, feature)
                spoiled |= {feature} if overwritten else set()
            self.shapes[name, feature] = tuple(tensor.shape[1:])
            self.values[name, feature] = tensor
        self.overwritten_features[name] = frozenset(spoiled)
        self.full_forward_flops[name] = whole.get_total_flops() // DRY_RUN_ROWS
        self.flops[name] = self._flops_in_step(name, inputs)
        for operand in stage.read_operands(self.layout.terms):
            if operand.kind == "role" and operand.role == name and operand.is_state:
                try:
                    self.shapes[name, operand_feature(operand)] = tuple(module_state(model, operand_feature(operand)).shape)
                except ConfigError as error:
                    raise ConfigError(f"{operand.location}: {operand}: {error}") from None

    def _flops_in_step(self, name: str, inputs: list[Tensor]) -> int:
        """FLOPs of one sample as far as the step runs the role: to the last feature that is read, as captured there."""
        capture = FeatureExtractor(self.models[name], self.layout.features[name], stop=True)
        if not capture.stop:
            return self.full_forward_flops[name]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            capture(*inputs)
        capture.remove()
        return counter.get_total_flops() // DRY_RUN_ROWS

    def _model(self, name: str) -> nn.Module:
        config = self.stage.roles[name]
        if config.mode == "reuse":
            return reused_module(config, self.models[config.source_role or ""])
        try:
            with self.device:
                return apply_weight_transforms(config, build_model(config, self.stage.roles, self.sample_facts[name], self.seed))
        except ConfigError:
            missing = next((spec.problem for spec in self.specs.values() if spec.problem), None)
            if self.sample_facts[name].classes is None and missing is not None:  # what it lacks, the data would have told
                raise DataError(missing) from None
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise _CannotBuild(config.model.location if config.model else config.location, error) from error

    def _value(self, address: str) -> Tensor:
        if ":" in address:
            return self.values[parse_role_input(address)]
        source, name = address.split(".", 1)
        return meta_field(self.specs[source], name, DRY_RUN_ROWS, self.device)

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
