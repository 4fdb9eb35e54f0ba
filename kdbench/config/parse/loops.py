"""Unrolls loops of stages into a list in the order of running, and resolves references to earlier stages.

An entry of `stages` with `rounds` and `stages` is a loop: `train` and `query` in two rounds become `train@1`,
`query@1`, `train@2`, `query@2`. In a reference, a name without round means the latest earlier stage of that
name, `previous` means the nearest earlier stage that has the role, and `initial` is the value if there is no
such stage. Every key keeps its location in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdbench.config.compose.merge import merge
from kdbench.config.parse.keys import ParseContext
from kdbench.config.parse.operands import artifact_hint
from kdbench.config.schema import Recipe, declared_keys
from kdbench.config.schema.stage import LOOP_KEYS
from kdbench.errors import Location, suggest

ONLY_STAGE = "main"
"""The name of the stage of a recipe without `stages`."""


PREVIOUS = "previous"


LENGTH_KEYS = ("epochs", "steps")


_REPLACED_BY_STAGE = ("terms", "updates")
"""Keys of the top level that a stage replaces. All other keys of a stage are merged with those of the top level."""


_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class UnrolledStage:
    """One stage after loops were unrolled: a stage of a loop with three rounds becomes three such stages.

    Attributes:
        name: name with the round, such as `train@2`.
        base_name: name without the round, such as `train`.
        key: dotted key of the stage, such as `stages.active.stages.train`; empty for a recipe without `stages`.
        fragment: keys of the stage, merged over the keys of the round.
        data: keys of the stage and the round, merged over the keys of the recipe's top level.
        locations: key of `data` -> location in the file.
        artifact_names: name of an earlier artifact in the recipe (such as `query.labels`) -> full name with the round
            (`query@2.labels`).
        roles_without_weights: role -> location of its `weights`, for roles with `weights: {stage: previous}` that do
            not exist in any earlier stage.
    """

    name: str
    base_name: str
    key: str
    fragment: Mapping[str, Any]
    data: Mapping[str, Any]
    locations: Mapping[str, Location]
    artifact_names: Mapping[str, str] = field(default_factory=dict)
    roles_without_weights: Mapping[str, Location] = field(default_factory=dict)


def merge_stage(top: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the keys of a stage over the keys of the top level.

    The stage's `terms` and `updates` replace those of the top level.
    """
    return merge(top, fragment, replaced=_REPLACED_BY_STAGE)


def stage_locations(locations: Mapping[str, Location], prefix: str, *, replaces: bool = True) -> dict[str, Location]:
    """Returns key -> location for a stage.

    The key of a location below `prefix` is stored without the prefix, and replaces an equal key of the top level.

    Args:
        prefix: dotted key of the stage.
        replaces: whether `terms` and `updates` of the stage replace those of the top level.
    """
    inner = {key[len(prefix) + 1 :]: loc for key, loc in locations.items() if key.startswith(f"{prefix}.")}
    replaced = tuple(f"{key}." for key in _REPLACED_BY_STAGE if key in inner) if replaces else ()
    outer = {key: loc for key, loc in locations.items() if not (replaced and key.startswith(replaced))}
    return {**outer, **inner}


def unroll_stages(context: ParseContext, stages: Any, shared: Mapping[str, Any]) -> list[UnrolledStage]:
    """Converts the key `stages` of a recipe to a list of stages, with all loops unrolled.

    Args:
        stages: value of the key `stages`; None for a recipe without stages.
        shared: keys of the recipe's top level that also a stage may have.
    """
    if stages is None:
        unrolled = [UnrolledStage(ONLY_STAGE, ONLY_STAGE, "", {}, shared, context.locations)]
    elif not isinstance(stages, Mapping) or not stages:
        context.error(
            "stages", f"must be a non-empty mapping of stage names to the keys of each stage, got {stages!r}."
        )
        return []
    else:
        unrolled = list(_unroll(_FragmentReader(context, shared), stages))
        _check_names(context, unrolled)
    return _link_stages(context, unrolled)


@dataclass(frozen=True)
class _FragmentReader:
    context: ParseContext
    shared: Mapping[str, Any]

    def read(self, value: Any, key: str) -> dict[str, Any] | None:
        """Returns the keys of a stage or a round, or None after an error.

        Reports keys that only the top level of a recipe may have.
        """
        if not isinstance(value, Mapping):
            self.context.error(key, f"must be a mapping of keys, got {value!r}.")
            return None
        recipe_keys = declared_keys(Recipe)
        for name in value:
            if name in recipe_keys:
                message = f"{name!r} belongs to the top level of the recipe, not to a stage."
                self.context.error(f"{key}.{name}", message)
        return {name: item for name, item in value.items() if name not in recipe_keys}


def _is_loop(fragment: Any) -> bool:
    return isinstance(fragment, Mapping) and "rounds" in fragment


def _unroll(reader: _FragmentReader, stages: Mapping[str, Any]) -> Iterator[UnrolledStage]:
    context = reader.context
    for name, value in stages.items():
        key = f"stages.{name}"
        if value is None:
            continue
        if _is_loop(value):
            yield from _unroll_loop(reader, key, value)
            continue
        fragment = reader.read(value, key)
        if fragment is not None:
            locations = stage_locations(context.locations, key) | {"": context.location(key)}
            yield UnrolledStage(name, name, key, fragment, merge_stage(reader.shared, fragment), locations)


def _unroll_loop(reader: _FragmentReader, key: str, loop: Mapping[str, Any]) -> Iterator[UnrolledStage]:
    context = reader.context
    for name in loop:
        if name not in LOOP_KEYS:
            hint = f"{suggest(name, LOOP_KEYS)} Keys of a stage belong to the stages of the loop."
            context.error(f"{key}.{name}", f"unknown key {name!r} in a loop.{hint}")
    rounds = _read_rounds(reader, f"{key}.rounds", loop.get("rounds"))
    stages = loop.get("stages")
    if not isinstance(stages, Mapping) or not any(stage is not None for stage in stages.values()):
        context.error(
            f"{key}.stages" if "stages" in loop else key,
            "a loop needs `stages`, a mapping of stage names to the keys of each stage.",
        )
        return
    for number, (round_key, round_fragment) in enumerate(rounds, 1):
        shared = merge(reader.shared, round_fragment)
        outer = context.locations
        if round_key:
            outer = {**outer, **stage_locations(outer, round_key, replaces=False)}
        for name, value in stages.items():
            stage_key = f"{key}.stages.{name}"
            if value is None:
                continue
            if _is_loop(value):
                context.error(stage_key, "a loop cannot contain a loop; write the rounds of the inner loop as stages.")
                continue
            fragment = reader.read(value, stage_key)
            if fragment is not None:
                locations = stage_locations(outer, stage_key) | {"": context.location(stage_key)}
                data = merge_stage(shared, fragment)
                yield UnrolledStage(
                    f"{name}@{number}", name, stage_key, {**round_fragment, **fragment}, data, locations
                )


def _read_rounds(reader: _FragmentReader, key: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Returns a pair for each round of a loop: the round's dotted key (empty if `rounds` is a number) and keys."""
    if isinstance(value, list):
        if not value:
            reader.context.error(key, "the list is empty; a loop needs at least one round.")
        fragments = [
            (f"{key}.{index}", reader.read({} if item is None else item, f"{key}.{index}"))
            for index, item in enumerate(value)
        ]
        return [(round_key, fragment) for round_key, fragment in fragments if fragment is not None]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        expected = "must be the number of rounds (1 or more), or a list with the keys that each round changes"
        reader.context.error(key, f"{expected}, got {value!r}.")
        return []
    return [("", {})] * value


def _check_names(context: ParseContext, stages: Sequence[UnrolledStage]) -> None:
    """Reports duplicate names, and names with characters that addresses and file names cannot contain."""
    key_of_name: dict[str, str] = {}
    for stage in stages:
        if not _NAME.fullmatch(stage.base_name) or stage.base_name == PREVIOUS:
            message = f"{stage.base_name!r} cannot be the name of a stage; use letters, digits, `_` and `-`"
            context.error(stage.key, f"{message} (`{PREVIOUS}` means an earlier stage).")
        first_key = key_of_name.setdefault(stage.base_name, stage.key)
        if first_key != stage.key:
            location = context.location(first_key)
            context.error(
                stage.key, f"two stages are called {stage.base_name!r}; rename this stage or the stage at {location}."
            )


def _link_stages(context: ParseContext, stages: Sequence[UnrolledStage]) -> list[UnrolledStage]:
    """Replaces each reference to an earlier stage by the full name of the stage, such as `train@2`."""
    all_artifacts = {f"{name}.{item}" for s in stages for name in (s.base_name, s.name) for item in _artifacts_of(s)}
    linked: list[UnrolledStage] = []
    for index, stage in enumerate(stages):
        stage_context = ParseContext(stage.locations, context.errors)
        earlier, artifact_names = stages[:index], {}
        for producer in earlier:
            for item in _artifacts_of(producer):
                # In a loop the base name is overwritten, so that it means the latest round.
                artifact_names[f"{producer.base_name}.{item}"] = f"{producer.name}.{item}"
                artifact_names[f"{producer.name}.{item}"] = f"{producer.name}.{item}"
        _check_artifacts_with_initial(stage_context, stage.data, all_artifacts)
        linker = _WeightsLinker(stage_context, earlier, stages)
        linked.append(linker.link(replace(stage, artifact_names=artifact_names)))
    return linked


def _artifacts_of(stage: UnrolledStage) -> list[str]:
    artifacts = stage.data.get("artifacts")
    return [name for name, value in artifacts.items() if value is not None] if isinstance(artifacts, Mapping) else []


def _check_artifacts_with_initial(context: ParseContext, data: Any, all_artifacts: set[str], key: str = "") -> None:
    """Reports a reference `{artifact: NAME, initial: ...}` to an artifact that no stage at all produces.

    Without this check, `initial` would always be used, and a misspelt name would not be noticed.
    """
    if isinstance(data, list | tuple):
        for index, item in enumerate(data):
            _check_artifacts_with_initial(context, item, all_artifacts, f"{key}.{index}")
    if not isinstance(data, Mapping):
        return
    name = data.get("artifact")
    if isinstance(name, str) and data.get("initial") is not None and name not in all_artifacts:
        context.error(
            f"{key}.artifact", f"no stage produces the artifact {name!r}.{artifact_hint(name, all_artifacts)}"
        )
    for inner_name, value in data.items():
        _check_artifacts_with_initial(context, value, all_artifacts, f"{key}.{inner_name}" if key else str(inner_name))


def _role_keys(data: Mapping[str, Any]) -> dict[str, str]:
    """Returns role -> dotted key, such as `models.student` or the shorthand `student`, at which the role is defined."""
    models = data.get("models")
    models = models if isinstance(models, Mapping) else {}
    keys = {name: f"models.{name}" for name, value in models.items() if value is not None}
    # `models: {student: null}` removes also the shorthand `student`.
    shorthands = (name for name in ("teacher", "student") if data.get(name) is not None)
    return keys | {name: name for name in shorthands if models.get(name, name) is not None}


@dataclass(frozen=True)
class _WeightsLinker:
    """Resolves `weights: {stage: NAME}` in one stage: to the full name of an earlier stage, or else to `initial`."""

    context: ParseContext
    earlier: Sequence[UnrolledStage]
    stages: Sequence[UnrolledStage]

    def link(self, stage: UnrolledStage) -> UnrolledStage:
        data, locations, without_weights = dict(stage.data), dict(stage.locations), {}
        for name, key in _role_keys(data).items():
            role = data["models"][name] if key.startswith("models.") else data[name]
            weights = role.get("weights") if isinstance(role, Mapping) else None
            target = weights.get("stage") if isinstance(weights, Mapping) else None
            if not isinstance(weights, Mapping) or not isinstance(target, str) or {"recipe", "path"} & set(weights):
                continue  # an invalid `weights` is reported where weights are read
            weights_key = f"{key}.weights"
            full_name = self._find_stage(target, weights.get("role") or name)
            linked: Any = None
            if full_name is not None:
                linked = {**{k: v for k, v in weights.items() if k != "initial"}, "stage": full_name}
            elif self._is_missing(target, weights_key):
                pass
            elif weights.get("initial") is not None:
                linked = weights["initial"]
                _copy_locations(locations, f"{weights_key}.initial", weights_key)
            elif target == PREVIOUS:
                without_weights[name] = self.context.location(weights_key)
            else:
                message = f"stage {target!r} does not run before this stage; name an earlier stage"
                self.context.error(weights_key, f"{message}.{self._hint(target)}")
            _set_role(data, name, key, {**role, "weights": linked})
        return replace(stage, data=data, locations=locations, roles_without_weights=without_weights)

    def _is_missing(self, target: str, key: str) -> bool:
        """Returns whether the recipe has no stage called `target`, and reports this as an error."""
        missing = target != PREVIOUS and not any(target in (s.base_name, s.name) for s in self.stages)
        if missing:
            self.context.error(key, f"stage {target!r} does not exist; name an earlier stage.{self._hint(target)}")
        return missing

    def _hint(self, target: str) -> str:
        names = {stage.base_name for stage in self.earlier}
        return suggest(target, names) if names else " There is no earlier stage."

    def _find_stage(self, target: str, roles: Any) -> str | None:
        """Returns the full name of the earlier stage to which `target` refers."""
        role_names = roles if isinstance(roles, list | tuple) else [roles]
        for stage in reversed(self.earlier):
            if target in (stage.base_name, stage.name):
                return stage.name
            if target == PREVIOUS and all(role in _role_keys(stage.data) for role in role_names):
                return stage.name
        return None


def _set_role(data: dict[str, Any], name: str, key: str, role: Mapping[str, Any]) -> None:
    if key.startswith("models."):
        data["models"] = {**data["models"], name: role}
    else:
        data[name] = role


def _copy_locations(locations: dict[str, Location], source: str, target: str) -> None:
    """Copies the location of the key `source` to the key `target`, and does the same for all keys below `source`."""
    for key in [key for key in locations if key == source or key.startswith(f"{source}.")]:
        locations[target + key[len(source) :]] = locations[key]
