"""Shape inference: builds and runs each role of a stage on meta tensors.

The results are the shapes of features, FLOPs, and the features that a later operation overwrites in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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


def infer_shapes(
    stage: StageConfig, resolved_stage: ResolvedStage, specs: Mapping[str, SourceSpec], seed: int
) -> ShapeInference:
    """Infers all shapes of a stage: builds its models on the meta device and runs each model in eval mode.

    If a model cannot be built on the meta device, all models are built on the CPU instead.

    Raises:
        ConfigError: a model cannot be built, rejects the shape of its input, or does not have the module that a
            feature names.
    """
    for device in (META, torch.device("cpu")):
        inference = ShapeInference(stage, resolved_stage, specs, seed, device)
        try:
            for name in resolved_stage.order:
                inference.add_role(name)
        except _BuildError as error:
            if device != META:
                reason = " ".join(str(error.cause).split())[:300] or type(error.cause).__name__
                raise ConfigError(
                    f"{error.location}: the model cannot be built with these parameters ({reason})"
                ) from error.cause
            continue
        return inference
    raise AssertionError("unreachable")


class _BuildError(Exception):
    """Raised if a model cannot be built on the meta device."""

    def __init__(self, location: Location, cause: Exception) -> None:
        super().__init__(str(cause))
        self.location, self.cause = location, cause


class ShapeInference:
    """Shapes, FLOPs and models of a stage's roles. `add_role` adds the results of one role.

    Roles are added in the order of the resolved stage, in which each role comes after the roles whose outputs it
    reads.

    Args:
        stage: the stage.
        resolved_stage: the stage with the order of its roles and their features, still without shapes.
        specs: source -> specification of its fields.
        seed: the recipe's seed, for the initial weights of models on the CPU.
        device: the meta device or the CPU.

    Attributes:
        sample_facts: role -> number of classes and shapes, for the constructor of its model.
        models: role -> model.
        calls: role -> module calls in one forward pass.
        full_forward_flops: role -> FLOPs per sample of the full forward pass. A multiply-add counts as two.
        flops: role -> FLOPs per sample up to the last feature that a step reads.
        shapes: (role, feature) -> shape of one sample.
        overwritten_features: role -> features that a later in-place operation overwrites.
        output_shapes: role -> shape of the model's output for one sample.
    """

    def __init__(
        self,
        stage: StageConfig,
        resolved_stage: ResolvedStage,
        specs: Mapping[str, SourceSpec],
        seed: int,
        device: torch.device,
    ) -> None:
        self.stage, self.resolved_stage, self.specs, self.seed, self.device = stage, resolved_stage, specs, seed, device
        self.sample_facts: dict[str, SampleFacts] = {}
        self.models: dict[str, nn.Module] = {}
        self.calls: dict[str, list[ModuleCall]] = {}
        self.full_forward_flops: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.shapes: dict[tuple[str, Feature], tuple[int, ...]] = {}
        self.overwritten_features: dict[str, frozenset[Feature]] = {}
        self.output_shapes: dict[str, tuple[int, ...]] = {}
        self._values: dict[tuple[str, Feature], Tensor] = {}

    def resolve(self, *, is_last_stage: bool) -> ResolvedStage:
        """Returns the resolved stage with the inferred shapes.

        Args:
            is_last_stage: whether this is the recipe's last stage. Its exported role is the recipe's result and must
                return one value per class.

        Raises:
            ConfigError: a role that must be evaluated does not return one value per class.
        """
        return replace(
            self.resolved_stage,
            facts=self.sample_facts,
            shapes=self.shapes,
            overwritten=self.overwritten_features,
            unmeasured=self._unmeasured_roles(is_last_stage),
        )

    def _unmeasured_roles(self, is_last_stage: bool) -> frozenset[str]:
        """Returns the roles whose output is not one value per class of the evaluation source.

        These roles cannot be evaluated.

        Raises:
            ConfigError: such a role is the recipe's result, or the recipe lists it in `evaluate`.
        """
        spec, stage = self.specs.get("eval"), self.stage
        if spec is None or spec.classes is None:
            return frozenset()
        shapes = self.output_shapes.items()
        unmeasured = frozenset(name for name, shape in shapes if len(shape) != 1 or shape[0] < spec.classes)
        for name in (stage.export, *stage.evaluate):
            if name in unmeasured and (is_last_stage or name in stage.evaluate):
                key = "export" if name == stage.export else "evaluate"
                raise ConfigError(
                    f"{stage.roles[name].location}: role {name!r} returns {list(self.output_shapes[name])} for one "
                    f"sample, but an evaluated role must return a value for each of the {spec.classes} classes of "
                    f"source 'eval'. Name another role in `{key}`."
                )
        return unmeasured

    def add_role(self, name: str) -> None:
        """Builds a role's model from the shapes of earlier roles, runs the model, and stores its shapes and FLOPs."""
        config, features = self.stage.roles[name], self.resolved_stage.features[name]
        inputs = [self._input(address) for address in input_addresses(config)]
        source = self.resolved_stage.sources[name]
        self.sample_facts[name] = _sample_facts(source, tuple(inputs[0].shape[1:]), self.specs)
        model = self.models[name] = self._build_model(name).eval()
        for feature in features:
            if not feature.is_output:
                find_module(model, feature.path, self._operand_location(name, feature))
        shapes_text = " and ".join(str(list(value.shape[1:])) for value in inputs)
        with failures_as_config_errors(f"{config.location}: role {name!r} rejects an input of shape {shapes_text}"):
            with torch.no_grad():
                self.calls[name] = trace_modules(model, *inputs)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                output = model(*inputs)
        self.full_forward_flops[name] = counter.get_total_flops() // DRY_RUN_ROWS
        self.output_shapes[name] = tuple(model_output(output).shape[1:])
        self._add_features(name, features, output)
        self.flops[name] = self._step_flops(name, inputs)
        self._add_states(name, model)

    def _add_features(self, name: str, features: tuple[Feature, ...], output: object) -> None:
        overwritten = set()
        for feature in features:
            value = model_output(output, feature.path) if feature.is_output else None
            if value is None:
                value, is_overwritten = self._inner_feature(name, feature)
                overwritten |= {feature} if is_overwritten else set()
            self.shapes[name, feature] = tuple(value.shape[1:])
            self._values[name, feature] = value
        self.overwritten_features[name] = frozenset(overwritten)

    def _add_states(self, name: str, model: nn.Module) -> None:
        """Stores the shapes of the BatchNorm statistics and weight vectors that operands read from a role."""
        for operand in self.stage.read_operands(self.resolved_stage.terms):
            if operand.kind == "role" and operand.role == name and operand.is_state:
                feature = operand_feature(operand)
                try:
                    self.shapes[name, feature] = tuple(module_state(model, feature).shape)
                except ConfigError as error:
                    raise ConfigError(f"{operand.location}: {operand}: {error}") from None

    def _step_flops(self, name: str, inputs: list[Tensor]) -> int:
        """Returns the FLOPs per sample of a role's forward pass in a step.

        The forward pass of a step stops after the last feature that is read.
        """
        extractor = FeatureExtractor(self.models[name], self.resolved_stage.features[name], stop=True)
        if not extractor.stop:
            return self.full_forward_flops[name]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            extractor(*inputs)
        extractor.remove()
        return counter.get_total_flops() // DRY_RUN_ROWS

    def _build_model(self, name: str) -> nn.Module:
        config = self.stage.roles[name]
        if config.mode == "reuse":
            return reused_module(config, self.models[config.source_role or ""])
        try:
            with self.device:
                model = build_model(config, self.stage.roles, self.sample_facts[name], self.seed)
                return apply_weight_transforms(config, model)
        except ConfigError:
            # A model without `num_classes` is the consequence of a dataset that is not prepared: report the cause.
            problem = next((spec.problem for spec in self.specs.values() if spec.problem), None)
            if self.sample_facts[name].classes is None and problem is not None:
                raise DataError(problem) from None
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise _BuildError(config.model.location if config.model else config.location, error) from error

    def _input(self, address: str) -> Tensor:
        if ":" in address:
            return self._values[parse_role_input(address)]
        source, name = address.split(".", 1)
        return meta_field(self.specs[source], name, DRY_RUN_ROWS, self.device)

    def _inner_feature(self, name: str, feature: Feature) -> tuple[Tensor, bool]:
        """Returns a zero tensor with the shape of a feature, and whether a later operation overwrites the feature."""
        path = find_module(self.models[name], feature.path)[0]
        calls = [call for call in self.calls[name] if call.path == path]
        call = next((call for call in calls if call.call == feature.call), None)
        traced = None if call is None else call.input if feature.side == "in" else call.output
        if traced is None:
            location = self._operand_location(name, feature)
            raise ConfigError(
                f"{location}: {feature} of role {name!r} does not exist: the forward pass calls module {path!r} "
                f"{len(calls)} time(s)"
            )
        return torch.zeros(traced.shape, dtype=traced.dtype, device=self.device), traced.overwritten

    def _operand_location(self, role: str, feature: Feature) -> Location:
        """Returns the location (in the recipe) of the first operand that reads a feature.

        If no operand reads the feature, the location of the role is returned.
        """
        for operand in self.stage.read_operands():
            if (
                operand.kind == "role"
                and operand.role == role
                and operand.path == feature.path
                and str(operand.location)
            ):
                return operand.location
        return self.stage.roles[role].location


def _sample_facts(source: str, input_shape: tuple[int, ...], specs: Mapping[str, SourceSpec]) -> SampleFacts:
    """Returns the number of classes and the shapes from which a role's model is built.

    If the role's source (such as noise) has no classes or no images, those of the evaluation source are used.
    """
    role_spec, evaluation_spec = specs[source], specs.get("eval", specs[source])
    classes = role_spec.classes if role_spec.classes is not None else evaluation_spec.classes
    image = (evaluation_spec.fields.get("image") or role_spec.fields.get("image") or ((), ""))[0]
    return SampleFacts(classes, input_shape, tuple(image) or None)
