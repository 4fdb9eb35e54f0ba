"""The stages of a recipe in the order in which they run: loops unrolled, names of earlier stages found.

An entry of `stages` that holds `rounds` and `stages` is a loop. `train` and `query` in two rounds become `train@1`,
`query@1`, `train@2`, `query@2`. A name without its round means the latest earlier one, `previous` the nearest earlier
stage that holds the role, and `initial` is what counts where there is none yet. Every key keeps the one place in the
file where it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdbench.config.compose.merge import merge
from kdbench.config.parse.keys import ParseContext
from kdbench.errors import Location, suggest

ONLY_STAGE = "main"
"""The name of the stage of a recipe without `stages`."""


PREVIOUS = "previous"


LENGTH_KEYS = ("epochs", "steps")


_LOOP = ("rounds", "stages")


_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class UnrolledStage:
    """One stage as it runs.

    name: `train@2`; base: `train`. key: where its fragment stands (`stages.active.stages.train`); empty for `main`.
    fragment: that fragment, with the round's below it. data: laid over the top level. places: of the keys of `data`.
    made: what earlier stages make, by every name that it has here (`query.pool`, `query@1.pool`), and its full name.
    unset: roles that take no weights although they would from an earlier stage; where that was written.
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
    """Lays a stage over the top level: `terms` and `updates` replace, the rest merges."""
    return merge(top, fragment, replaced=("terms", "updates"))


def stage_locations(places: Mapping[str, Location], prefix: str, *, replaces: bool = True) -> dict[str, Location]:
    """The places of the keys below `prefix` as if they stood at the top level, over those of the top level itself."""
    own = {key[len(prefix) + 1 :]: place for key, place in places.items() if key.startswith(f"{prefix}.")}
    replaced = tuple(f"{key}." for key in ("terms", "updates") if key in own) if replaces else ()
    kept = {key: place for key, place in places.items() if not (replaced and key.startswith(replaced))}
    return {**kept, **own}


def unroll_stages(context: ParseContext, value: Any, shared: Mapping[str, Any], own_keys: set[str]) -> list[UnrolledStage]:
    """Reads `stages`.

    Args:
        value: what stands under `stages`; None for a recipe of one stage.
        shared: the keys of the top level that a stage may hold.
        own_keys: those that it may not.
    """
    if value is None:
        stages = [UnrolledStage(ONLY_STAGE, ONLY_STAGE, "", {}, shared, context.locations)]
    elif not isinstance(value, Mapping) or not value:
        context.error("stages", f"must be a mapping of stage names to their keys, got {value!r}.")
        return []
    else:
        stages = list(_stages(_FragmentReader(context, shared, own_keys), value))
        _check_names(context, stages)
    return _linked(context, stages)


@dataclass(frozen=True)
class _FragmentReader:
    context: ParseContext
    shared: Mapping[str, Any]
    own_keys: set[str]

    def fragment(self, value: Any, key: str) -> dict[str, Any] | None:
        """A mapping of keys that a stage may hold; None after a fault."""
        if not isinstance(value, Mapping):
            self.context.error(key, f"must be a mapping of keys, got {value!r}.")
            return None
        for name in value:
            if name in self.own_keys:
                said = f"{name!r} belongs to the top level of the recipe, not to a stage."
                self.context.error(f"{key}.{name}", said)
        return {name: item for name, item in value.items() if name not in self.own_keys}


def _stages(reader: _FragmentReader, value: Mapping[str, Any]) -> Iterator[UnrolledStage]:
    context = reader.context
    for name, fragment in value.items():
        key = f"stages.{name}"
        if fragment is None:
            continue
        if isinstance(fragment, Mapping) and "rounds" in fragment:
            yield from _loop(reader, key, fragment)
            continue
        own = reader.fragment(fragment, key)
        if own is not None:
            places = stage_locations(context.locations, key) | {"": context.location(key)}
            yield UnrolledStage(name, name, key, own, merge_stage(reader.shared, own), places)


def _loop(reader: _FragmentReader, key: str, loop: Mapping[str, Any]) -> Iterator[UnrolledStage]:
    context = reader.context
    for name in loop:
        if name not in _LOOP:
            said = f"unknown key {name!r} in a loop.{suggest(name, _LOOP)} Write it in the stages of the loop."
            context.error(f"{key}.{name}", said)
    rounds = _rounds(reader, f"{key}.rounds", loop.get("rounds"))
    body = loop.get("stages")
    if not isinstance(body, Mapping) or not any(stage is not None for stage in body.values()):
        context.error(f"{key}.stages" if "stages" in loop else key, "a loop needs `stages`, a mapping of its stages.")
        return
    for number, (round_key, below) in enumerate(rounds, 1):
        shared = merge(reader.shared, below)
        around = stage_locations(context.locations, round_key, replaces=False) if round_key else context.locations
        for name, fragment in body.items():
            stage_key = f"{key}.stages.{name}"
            if fragment is None:
                continue
            if isinstance(fragment, Mapping) and "rounds" in fragment:
                context.error(stage_key, "a loop within a loop is not understood; write its rounds out.")
                continue
            own = reader.fragment(fragment, stage_key)
            if own is None:
                continue
            places = stage_locations({**context.locations, **around}, stage_key) | {"": context.location(stage_key)}
            data = merge_stage(shared, own)
            yield UnrolledStage(f"{name}@{number}", name, stage_key, {**below, **own}, data, places)


def _rounds(reader: _FragmentReader, key: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Where each round's fragment stands, and the fragment; empty after a fault."""
    if isinstance(value, list):
        read = [
            (f"{key}.{i}", reader.fragment({} if item is None else item, f"{key}.{i}")) for i, item in enumerate(value)
        ]
        rounds = [(place, fragment) for place, fragment in read if fragment is not None]
        if not value:
            reader.context.error(key, "the list is empty; a loop needs at least one round.")
        return rounds
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = "must be how many rounds there are (1 or more), or a list with what each round changes"
        reader.context.error(key, f"{said}, got {value!r}.")
        return []
    return [("", {})] * value


def _check_names(context: ParseContext, stages: Sequence[UnrolledStage]) -> None:
    """Names are parts of addresses (`artifact: STAGE.NAME`) and of files."""
    seen: dict[str, str] = {}
    for stage in stages:
        if not _NAME.fullmatch(stage.base_name) or stage.base_name == PREVIOUS:
            said = f"{stage.base_name!r} cannot be a stage's name; use letters, digits, `_` and `-`"
            context.error(stage.key, f"{said} (`{PREVIOUS}` means an earlier stage).")
        first = seen.setdefault(stage.base_name, stage.key)
        if first != stage.key:
            context.error(stage.key, f"two stages are called {stage.base_name!r}; the other is {context.location(first)}.")


def _linked(context: ParseContext, stages: Sequence[UnrolledStage]) -> list[UnrolledStage]:
    """The stages with every reference to an earlier one by its full name."""
    makes = {f"{name}.{thing}" for s in stages for name in (s.base_name, s.name) for thing in _makes(s)}
    linked: list[UnrolledStage] = []
    for position, stage in enumerate(stages):
        own = ParseContext(stage.locations, context.errors, context.also_known)
        earlier, made = stages[:position], {}
        for other in earlier:
            for thing in _makes(other):
                made[f"{other.base_name}.{thing}"] = made[f"{other.name}.{thing}"] = f"{other.name}.{thing}"
        _check_first(own, stage.data, makes)
        linked.append(_link_weights(own, replace(stage, made=made), earlier, stages))
    return linked


def _makes(stage: UnrolledStage) -> list[str]:
    make = stage.data.get("artifacts")
    return [name for name, value in make.items() if value is not None] if isinstance(make, Mapping) else []


def _check_first(context: ParseContext, data: Any, makes: set[str], key: str = "") -> None:
    """`{made: ..., first: ...}` must name something that some stage makes: else `initial` would hide the mistake."""
    if isinstance(data, list | tuple):
        for position, item in enumerate(data):
            _check_first(context, item, makes, f"{key}.{position}")
    if not isinstance(data, Mapping):
        return
    name = data.get("artifact")
    if isinstance(name, str) and data.get("initial") is not None and name not in makes:
        hint = suggest(name, makes) if makes else " No stage makes anything."
        context.error(f"{key}.made", f"no stage makes {name!r}.{hint}")
    for inner, value in data.items():
        _check_first(context, value, makes, f"{key}.{inner}" if key else str(inner))


def _roles(data: Mapping[str, Any]) -> dict[str, str]:
    """The roles of a stage, and the keys under which they stand."""
    models = data.get("models")
    models = models if isinstance(models, Mapping) else {}
    found = {name: f"models.{name}" for name, value in models.items() if value is not None}
    short = (name for name in ("teacher", "student") if data.get(name) is not None)
    return found | {name: name for name in short if models.get(name, name) is not None}  # a null in `models` removes


def _link_weights(
    context: ParseContext, stage: UnrolledStage, earlier: Sequence[UnrolledStage], stages: Sequence[UnrolledStage]
) -> UnrolledStage:
    """Finds the stages that `weights: {stage: ...}` mean; takes `initial` where there is none yet."""
    data, places, unset = dict(stage.data), dict(stage.locations), {}
    for name, key in _roles(data).items():
        role = data["models"][name] if key.startswith("models.") else data[name]
        weights = role.get("weights") if isinstance(role, Mapping) else None
        wanted = weights.get("stage") if isinstance(weights, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(wanted, str) or {"recipe", "path"} & set(weights):
            continue  # what is wrong there is told where weights are read
        at = f"{key}.weights"
        found = _find(wanted, weights.get("role") or name, earlier)
        if found is not None:
            linked: Any = {**{k: v for k, v in weights.items() if k != "initial"}, "stage": found}
        elif wanted != PREVIOUS and not any(wanted in (s.base_name, s.name) for s in stages):
            context.error(at, f"stage {wanted!r} does not exist; name an earlier one.{_hint(wanted, earlier)}")
            linked = None
        elif weights.get("initial") is not None:
            linked = weights["initial"]
            _lift(places, at, f"{at}.first")
        else:
            if wanted == PREVIOUS:
                unset[name] = context.location(at)
            else:
                said = f"stage {wanted!r} comes later, or is this one; name an earlier one"
                context.error(at, f"{said}.{_hint(wanted, earlier)}")
            linked = None
        _put(data, name, key, {**role, "weights": linked})
    return replace(stage, data=data, places=places, unset=unset)


def _hint(wanted: str, earlier: Sequence[UnrolledStage]) -> str:
    return suggest(wanted, {s.base_name for s in earlier}) if earlier else " There is no earlier stage."


def _find(wanted: str, roles: Any, earlier: Sequence[UnrolledStage]) -> str | None:
    """The full name of the latest earlier stage that is meant."""
    needed = roles if isinstance(roles, list | tuple) else [roles]
    for other in reversed(earlier):
        if wanted in (other.base_name, other.name):
            return other.name
        if wanted == PREVIOUS and all(role in _roles(other.data) for role in needed):
            return other.name
    return None


def _put(data: dict[str, Any], name: str, key: str, role: Mapping[str, Any]) -> None:
    if key.startswith("models."):
        data["models"] = {**data["models"], name: role}
    else:
        data[name] = role


def _lift(places: dict[str, Location], to: str, prefix: str) -> None:
    """Gives the keys below `prefix` their place also where they now stand."""
    for key in [key for key in places if key == prefix or key.startswith(f"{prefix}.")]:
        places[to + key[len(prefix) :]] = places[key]
