"""Reads `subset` and `label_fraction` of a source, and references to artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdbench.config.parse.keys import KeyReader, ParseContext
from kdbench.config.parse.operands import artifact_hint
from kdbench.config.parse.parts import read_part
from kdbench.config.schema import PartConfig
from kdbench.config.schema.data import ARTIFACT_REFERENCE_KEYS
from kdbench.config.schema.keys import FRACTION_OR_COUNT
from kdbench.registry import SUBSETS, type_mismatch

SubsetStep = float | int | str | PartConfig


def read_subset(reader: KeyReader, artifact_names: Mapping[str, str]) -> SubsetStep | tuple[SubsetStep, ...] | None:
    """Reads `subset`: a number, `{type: NAME, ...}`, `{artifact: STAGE.NAME, initial: ...}`, or a list of these.

    Args:
        artifact_names: `STAGE.NAME` as this stage may write it -> `STAGE.NAME` in full.
    """
    return _read_steps(reader.context, reader.get_raw("subset"), reader.subkey("subset"), artifact_names)


def _read_steps(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> SubsetStep | tuple[SubsetStep, ...] | None:
    if not isinstance(value, list):
        return _read_step(context, value, key, artifact_names)
    if not value:
        context.error(key, "must not be an empty list; remove it to keep every sample.")
    steps: list[SubsetStep] = []
    for index, item in enumerate(value):
        step = _read_step(context, item, f"{key}.{index}", artifact_names)
        steps += step if isinstance(step, tuple) else () if step is None else (step,)
    return tuple(steps) if steps else None


def _read_step(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> SubsetStep | tuple[SubsetStep, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "artifact" in value:
        artifact, initial = _read_artifact_subset(context, value, key, artifact_names)
        return artifact if artifact is not None else _read_steps(context, initial, f"{key}.initial", artifact_names)
    if isinstance(value, Mapping | str):
        return read_part(context, SUBSETS, value, key)
    return _read_amount(
        context, value, key, "a number, {type: SUBSET, ...}, {artifact: STAGE.NAME}, or a list of these"
    )


def read_label_fraction(reader: KeyReader, artifact_names: Mapping[str, str]) -> float | int | str | None:
    """Reads `label_fraction`: a number, or `{artifact: STAGE.NAME, initial: ...}`."""
    key = reader.subkey("label_fraction")
    return _read_label_fraction(reader.context, reader.get_raw("label_fraction"), key, artifact_names)


def _read_label_fraction(
    context: ParseContext, value: Any, key: str, artifact_names: Mapping[str, str]
) -> float | int | str | None:
    forms = "a number or {artifact: STAGE.NAME, initial: NUMBER}"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _read_amount(context, value, key, forms)
    if "artifact" not in value:
        context.error(key, f"must be {forms}, got {value!r}.")
        return None
    artifact, initial = _read_artifact_subset(context, value, key, artifact_names)
    return (
        artifact if artifact is not None else _read_label_fraction(context, initial, f"{key}.initial", artifact_names)
    )


def _read_artifact_subset(
    context: ParseContext, value: Mapping[str, Any], key: str, artifact_names: Mapping[str, str]
) -> tuple[str | None, Any]:
    """Returns the artifact's full name, or None and the value of `initial`."""
    reader = KeyReader(context, value, key, "an artifact reference", ARTIFACT_REFERENCE_KEYS)
    return read_artifact_reference(reader, artifact_names), reader.get_raw("initial")


def read_artifact_reference(reader: KeyReader, artifact_names: Mapping[str, str]) -> str | None:
    """Reads `artifact: STAGE.NAME`; returns the full name, or None while no earlier stage produces it."""
    name = reader.get_raw("artifact")
    if not isinstance(name, str) or "." not in name:
        reader.error("artifact", f"must be STAGE.NAME, an artifact of an earlier stage, got {name!r}.")
        return None
    if name in artifact_names:
        return artifact_names[name]
    if not reader.has("initial"):
        advice = "write `initial:` beside it for the time before"
        hint = artifact_hint(name, artifact_names)
        reader.error("artifact", f"no earlier stage produces {name!r}; {advice}.{hint}")
    return None


def _read_amount(context: ParseContext, value: Any, key: str, forms: str) -> float | int | None:
    if type_mismatch("float", value):
        context.error(key, f"must be {forms}, got {value!r}.")
        return None
    if not FRACTION_OR_COUNT.holds(value):
        context.error(key, f"must be {FRACTION_OR_COUNT.text}, got {value!r}.")
        return None
    return value
