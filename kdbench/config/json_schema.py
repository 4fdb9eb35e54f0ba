"""Generates the JSON schema of a recipe from the declared keys and the registries, without importing torch.

The schema describes a recipe file before it is merged with group files: shorthands and references such as
`${vars.width}` are valid, and a group file may complete a mapping. The schema therefore accepts a part without `type`
or without a required parameter. Only the loader rejects such a part.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from kdbench.config.parse.stages import TOP_LEVEL_KEYS
from kdbench.config.parse.terms import ENGINE_OPERANDS
from kdbench.config.schema import (
    ArtifactConfig,
    InnerStepConfig,
    Key,
    Notes,
    OperandConfig,
    OptimizerConfig,
    Published,
    RoleConfig,
    SourceConfig,
    StageConfig,
    TermConfig,
    UpdateConfig,
    WeightsConfig,
    declared_keys,
)
from kdbench.config.schema.data import ARTIFACT_REFERENCE_KEYS, VIEW_KEYS
from kdbench.config.schema.keys import Check, key_table
from kdbench.config.schema.roles import SNAPSHOT_INTERVAL_KEYS
from kdbench.config.schema.stage import CHECKPOINT_KEYS, LOOP_KEYS
from kdbench.config.schema.updates import CHAIN_PART_KEYS, OPTIMIZER_GROUP_KEYS, SCHEDULER_KEYS, SELECTION_KEYS
from kdbench.registry import (
    ADAPTERS,
    ARTIFACTS,
    AUGMENTATIONS,
    COMBINERS,
    DATASETS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    RELABELS,
    ROUTERS,
    SAMPLE_WEIGHTS,
    SCHEDULES,
    SELECTORS,
    SUBSETS,
    TERMS,
    WEIGHT_TRANSFORMS,
    Entry,
    Registry,
)

Schema = dict[str, Any]


DIALECT = "https://json-schema.org/draft/2020-12/schema"


_REFERENCE: Schema = {
    "type": "string",
    "pattern": r"^(.*\$\{[A-Za-z_][\w.-]*\}.*|\?\?\?)$",
    "description": "reference to another key, such as ${vars.width}; ??? requires a value on the command line",
}


_ADDRESS: Schema = {
    "type": "string",
    "pattern": r"^[\w.:@/${}-]*$",
    "description": "address of an operand: ROLE:PATH, ROLE:PATH@CALL, ROLE:PATH/in, SOURCE.FIELD, term:NAME.loss, ...",
}


_PLAIN_TYPES: dict[str, Schema] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
    "list": {"type": "array"},
    "tuple": {"type": "array"},
    "Sequence": {"type": "array"},
    "dict": {"type": "object"},
    "Mapping": {"type": "object"},
    "Any": {},
}


_ARTIFACT_KEY = key_table(Key("artifact", "`STAGE.NAME` of a model that an earlier stage selected", type="str"))


def recipe_schema() -> Schema:
    """Returns the JSON schema (draft 2020-12) of a recipe file."""
    builder = SchemaBuilder()
    schema = builder.mapping(TOP_LEVEL_KEYS)
    return {
        "$schema": DIALECT,
        "title": "kdbench recipe",
        **schema,
        "$defs": dict(sorted(builder.definitions.items())),
    }


class SchemaBuilder:
    """Builds the JSON schemas of keys.

    Attributes:
        definitions: name -> schema. It contains every part and every type with a special syntax (such as `Operand`)
            to which a schema refers.
    """

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {"Reference": _REFERENCE}
        self._forms = self._declare_forms()

    def _declare_forms(self) -> dict[str, Callable[[], Schema]]:
        """Returns name -> function that builds a schema, for each type with a special syntax, such as `Operand`."""
        return {
            "Role": lambda: self._name_or(MODELS, self.mapping(declared_keys(RoleConfig))),
            "Model": lambda: self._part(MODELS, _ARTIFACT_KEY),
            "Weights": lambda: self.mapping(declared_keys(WeightsConfig)),
            "SnapshotInterval": lambda: self.mapping(SNAPSHOT_INTERVAL_KEYS),
            "WeightTransform": lambda: self._part(WEIGHT_TRANSFORMS),
            "Dataset": lambda: self._part(DATASETS),
            "Source": self._source,
            "View": lambda: _any_of([self.type("list[Augmentation]"), self.mapping(VIEW_KEYS)]),
            "Augmentation": lambda: self._part(AUGMENTATIONS, requires_type=True),
            "Subset": lambda: self._part(SUBSETS),
            "Relabelling": lambda: self._part(RELABELS),
            "ArtifactReference": lambda: self.mapping(ARTIFACT_REFERENCE_KEYS, required=("artifact",)),
            "Term": lambda: self._part(TERMS, declared_keys(TermConfig)),
            "Operand": lambda: _any_of([_ADDRESS, self._operand_mapping()]),
            "Adapter": lambda: self._part(ADAPTERS),
            "Combiner": lambda: self._part(COMBINERS),
            "SampleWeight": lambda: self._part(SAMPLE_WEIGHTS),
            "Router": lambda: self._part(ROUTERS),
            "Schedule": lambda: self._part(SCHEDULES),
            "Scheduler": lambda: self._part(SCHEDULES, SCHEDULER_KEYS),
            "ChainPart": lambda: self._part(SCHEDULES, CHAIN_PART_KEYS),
            "Optimizer": lambda: self._part(OPTIMIZERS, declared_keys(OptimizerConfig)),
            "OptimizerGroup": self._optimizer_group,
            "Update": lambda: self.mapping(declared_keys(UpdateConfig), required=("models", "terms")),
            "InnerStep": lambda: self.mapping(declared_keys(InnerStepConfig), required=("models", "terms")),
            "Selector": lambda: self._part(SELECTORS),
            "Selection": lambda: self._part(SELECTORS, SELECTION_KEYS),
            "Artifact": lambda: self._part(ARTIFACTS, declared_keys(ArtifactConfig)),
            "Stage": lambda: self.mapping(declared_keys(StageConfig)),
            "Round": lambda: self.type("Stage"),
            "Loop": lambda: self.mapping(LOOP_KEYS, required=tuple(LOOP_KEYS)),
            "Metric": lambda: self._part(METRICS, requires_type=True),
            "CheckpointInterval": lambda: self.mapping(CHECKPOINT_KEYS),
            "Published": lambda: self.mapping(declared_keys(Published)),
            "Notes": lambda: self.mapping(declared_keys(Notes), required=("basis",)),
        }

    def mapping(self, keys: Mapping[str, Key], required: Iterable[str] = ()) -> Schema:
        """Returns the schema of a mapping that may have only the declared keys.

        Args:
            required: required keys, for a mapping that no group file can complete.
        """
        schema: Schema = {
            "type": "object",
            "properties": {name: self.key(declared) for name, declared in keys.items()},
            "additionalProperties": False,
        }
        return {**schema, "required": list(required)} if required else schema

    def key(self, declared: Key) -> Schema:
        """Returns the schema of the value of a key. The value may be null, which means the default."""
        schema = _with_reference(self.type(declared.type, declared.check), nullable=True)
        schema["description"] = declared.doc
        if isinstance(declared.default, str | int | float):
            schema["default"] = declared.default
        if declared.example:
            schema["examples"] = [yaml.safe_load(declared.example)[declared.name]]
        return schema

    def type(self, annotation: str, check: Check | None = None) -> Schema:
        """Returns the schema of a type that is written as a Python annotation, such as `int | list[str]`.

        Args:
            check: condition that numbers and texts must satisfy, in addition to their type.
        """
        return self._node(ast.parse(annotation, mode="eval").body, check) if annotation else {}

    def _node(self, node: ast.expr, check: Check | None = None) -> Schema:
        if isinstance(node, ast.BinOp):
            return _any_of([self._node(node.left, check), self._node(node.right, check)])
        if isinstance(node, ast.Constant):
            return {"type": "null"} if node.value is None else self.type(str(node.value), check)
        if isinstance(node, ast.Name):
            return self._name(node.id, check)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return self._generic(node.value.id, items, check)
        return {}  # a type that the loader does not check either

    def _name(self, name: str, check: Check | None) -> Schema:
        if name == "Number":
            return _any_of([self._name("float", check), self._name("Schedule", None)])
        if name in _PLAIN_TYPES:
            applies = check is not None and name in ("int", "float", "str")
            return {**_PLAIN_TYPES[name], **(check.json_schema if applies and check is not None else {})}
        if name not in self._forms:
            return {}
        if name not in self.definitions:
            self.definitions[name] = {}  # a form may refer to itself
            self.definitions[name] = self._forms[name]()
        return {"$ref": f"#/$defs/{name}"}

    def _generic(self, name: str, items: list[ast.expr], check: Check | None) -> Schema:
        if name == "Literal":
            return {"enum": [item.value for item in items if isinstance(item, ast.Constant)]}
        if name in ("dict", "Mapping"):
            return {
                "type": "object",
                "additionalProperties": _with_reference(self._node(items[-1], check), nullable=True),
            }
        is_fixed = name == "tuple" and not (isinstance(items[-1], ast.Constant) and items[-1].value is ...)
        if is_fixed:
            prefix = [_with_reference(self._node(item, check)) for item in items]
            return {"type": "array", "prefixItems": prefix, "minItems": len(items), "maxItems": len(items)}
        if name in ("list", "tuple", "Sequence"):
            return {"type": "array", "items": _with_reference(self._node(items[0], check))}
        return {}

    def _part(
        self, registry: Registry, keys: Mapping[str, Key] | None = None, *, requires_type: bool = False
    ) -> Schema:
        """Returns the schema of a registered part: its name, or a mapping.

        Args:
            keys: keys of the mapping that are not parameters of the part.
            requires_type: whether the mapping must have the key `type`, because no group file can complete it.
        """
        return self._name_or(registry, self._part_mapping(registry, keys or {}, requires_type=requires_type))

    def _part_mapping(
        self, registry: Registry, keys: Mapping[str, Key], *, type_key: str = "type", requires_type: bool = False
    ) -> Schema:
        """Returns the schema of a mapping that contains the name of a part, its parameters, and further keys.

        Args:
            keys: declarations of the further keys.
            type_key: key that contains the name of the part.
            requires_type: whether the mapping must have `type_key`.
        """
        properties = {name: self.key(declared) for name, declared in keys.items()}
        names = _with_reference(_names(registry), nullable=True)
        schema: Schema = {
            "type": "object",
            "properties": {**properties, type_key: {**names, "description": f"name of the {registry.kind}"}},
            "allOf": [
                *self._parameters_by_name(registry, keys, type_key),
                self._parameters_without_name(registry, keys, type_key),
            ],
            "unevaluatedProperties": False,
        }
        return {**schema, "required": [type_key]} if requires_type else schema

    def _parameters_by_name(self, registry: Registry, keys: Mapping[str, Key], type_key: str) -> list[Schema]:
        """Returns one if-then schema per part: if `type_key` is the name of the part, its parameters are allowed."""
        conditions = [
            {"if": _has_value(type_key, {"const": name}), "then": self._parameters_of(registry, entry, keys)}
            for name, entry in _entries(registry).items()
        ]
        for family in registry.families:
            if family.prefix:
                names = family.names()
                # All parts of a library have the same parameters; they are unknown if it is not installed.
                parameters: Schema = {"additionalProperties": True}
                if names:
                    library = family.prefix.rstrip("/")
                    parameters = self._parameters_of(registry, family.entry(names[0]), keys, library)
                conditions.append({"if": _has_value(type_key, {"pattern": f"^{family.prefix}"}), "then": parameters})
        # A reference hides the name.
        reference = _has_value(type_key, {"pattern": r"^\$\{"})
        return [*conditions, {"if": reference, "then": {"additionalProperties": True}}]

    def _parameters_without_name(self, registry: Registry, keys: Mapping[str, Key], type_key: str) -> Schema:
        """Returns the schema of a mapping without the name of a part, which a group file may contain.

        The mapping may have the parameters of all parts.
        """
        names = sorted({name for entry in _entries(registry).values() for name in self._parameters(registry, entry)})
        # `dataset: NAME` and `artifact: STAGE.NAME` in place of `type` leave no parameter to write.
        kinds = [type_key, *(name for name in ("dataset", "artifact") if name in keys)]
        is_partial = {"not": {"anyOf": [{"required": [kind]} for kind in kinds]}}
        return {"if": is_partial, "then": {"properties": {name: {} for name in names if name not in keys}}}

    def _parameters_of(self, registry: Registry, entry: Entry, keys: Mapping[str, Key], name: str = "") -> Schema:
        """Returns a reference to the schema of a part's parameters and operands, and adds this schema to `definitions`.

        Args:
            keys: other keys of the mapping. A parameter with the name of such a key is left out.
            name: name of the definition; empty: the name of the part.
        """
        definition = f"{registry.variable.lower()}.{name or entry.name}"
        if definition not in self.definitions:
            self.definitions[definition] = {}  # the schedule `chain` contains schedules
            self.definitions[definition] = {
                "description": entry.summary,
                "properties": {key: _with_reference(value) for key, value in self._parameters(registry, entry).items()},
            }
        properties = self.definitions[definition].get("properties", {})
        if keys.keys() & properties:
            return {"properties": {key: value for key, value in properties.items() if key not in keys}}
        return {"$ref": f"#/$defs/{definition}"}

    def _parameters(self, registry: Registry, entry: Entry) -> dict[str, Schema]:
        """Returns name -> schema for the parameters and operands of a part."""
        hidden = entry.facts.get("injected", ())
        schemas = {
            parameter.name: self.type(parameter.annotation)
            for parameter in entry.parameters.values()
            if parameter.name not in hidden
        }
        for name in entry.facts.get("operands", ()):
            if registry is TERMS or name not in ENGINE_OPERANDS or registry not in (SAMPLE_WEIGHTS, ROUTERS):
                schemas[name] = self.type("Operand")
        # Parameters with a grammar of their own, by the facts that declare them.
        for fact, annotation in (
            ("selector", "Selector"),
            ("candidates", "dict[str, Model]"),
            ("operand_list", "Operand | list[Operand]"),
        ):
            if fact in entry.facts:
                schemas[entry.facts[fact]] = self.type(annotation)
        if registry is SCHEDULES and entry.name == "chain":
            schemas["parts"] = self.type("list[ChainPart]")
        return schemas

    def _name_or(self, registry: Registry, mapping: Schema) -> Schema:
        return _any_of([_names(registry), mapping])

    def _source(self) -> Schema:
        """Returns the schema of a source: the name of a dataset, or a mapping.

        The mapping may have the keys of a source and the parameters of its dataset.
        """
        keys = {name: declared for name, declared in declared_keys(SourceConfig).items() if name != "type"}
        return self._part(DATASETS, keys)

    def _operand_mapping(self) -> Schema:
        keys = {name: declared for name, declared in declared_keys(OperandConfig).items() if name != "combine"}
        schema = self._part_mapping(COMBINERS, keys, type_key="combine")
        schema["properties"]["combine"] = self.key(declared_keys(OperandConfig)["combine"])
        return schema

    def _optimizer_group(self) -> Schema:
        """Returns the schema of an optimizer group.

        The group may have keys that select trained parameters, and the settings of all optimizers.
        """
        schema = self.mapping(OPTIMIZER_GROUP_KEYS)
        for entry in _entries(OPTIMIZERS).values():
            schema["properties"] |= {name: {} for name in self._parameters(OPTIMIZERS, entry)}
        return {**schema, "anyOf": [{"required": [name]} for name in OPTIMIZER_GROUP_KEYS]}


def _entries(registry: Registry) -> dict[str, Entry]:
    """Returns name -> declaration for the parts of a registry, without parts with a prefix such as `torchvision/`."""
    entries = dict(registry.entries)  # reading them adds the families
    families = [family for family in registry.families if not family.prefix]
    return entries | {name: family.entry(name) for family in families for name in family.names()}


def _names(registry: Registry) -> Schema:
    """Returns the schema of a name of a part in a registry."""
    names: Schema = {"enum": sorted(_entries(registry))}
    prefixes = [family.prefix for family in registry.families if family.prefix]
    return _any_of([names, *({"type": "string", "pattern": f"^{prefix}"} for prefix in prefixes)])


def _has_value(key: str, schema: Schema) -> Schema:
    """Returns the schema of a mapping that has a string under `key`, where the string satisfies `schema`."""
    return {"properties": {key: {"type": "string", **schema}}, "required": [key]}


def _any_of(schemas: Iterable[Schema]) -> Schema:
    """Returns a schema that accepts what at least one of `schemas` accepts. Nested unions are flattened."""
    flat: list[Schema] = []
    for schema in schemas:
        flat += schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
    return {"anyOf": flat} if len(flat) > 1 else flat[0]


def _with_reference(schema: Schema, *, nullable: bool = False) -> Schema:
    """Returns a schema that also accepts a reference such as `${vars.width}`, and null if `nullable` is True."""
    alternatives = [schema, {"$ref": "#/$defs/Reference"}, *([{"type": "null"}] if nullable else [])]
    return dict(_any_of(alternatives)) if schema else {}
