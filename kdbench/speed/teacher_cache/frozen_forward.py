"""When the networks that do not move are run: in the step, some steps ahead of it, or once for every image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdbench.config.schema import Recipe
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.loop import BatchFeed, Feed
from kdbench.engine.train.runner import Runner
from kdbench.speed.teacher_cache.cache_file import CacheUnavailable, format_bytes
from kdbench.speed.teacher_cache.cached_source import CachedSource, cache_size, open_cached_source
from kdbench.speed.teacher_cache.prefetch import Prefetcher, prefetch_obstacles, union_over_ranks

CACHE_FOLDER = "teacher_cache"
"""The folder of all tables, in the folder of all runs."""


def requested_mode(recipe: Recipe, device: torch.device) -> tuple[str, str]:
    """The mode that a recipe asks for on a device, and why."""
    if recipe.frozen_forward != "auto":
        return recipe.frozen_forward, f"frozen_forward: {recipe.frozen_forward}"
    return ("prefetch", "on a GPU") if device.type == "cuda" else ("inline", f"on {device.type}")


@dataclass
class FrozenForwardPlan:
    """How each role that does not move is run in a stage.

    windows: the stage's batches, with what runs outside the step in them.
    modes: role -> `inline`, `ahead` or `table`; why: role -> the reason, in words.
    tables: role -> its source with the table, and what that has done.
    """

    feed: BatchFeed
    requested: str
    modes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cached_sources: dict[str, CachedSource] = field(default_factory=dict)

    def set_mode(self, name: str, mode: str, why: str) -> None:
        self.modes[name], self.reasons[name] = mode, why

    def manifest_entries(self) -> dict[str, dict[str, Any]]:
        """For the manifest: each role's mode and reason; of a table its name, and rows computed and read so far."""
        facts: dict[str, dict[str, Any]] = {}
        for name, mode in self.modes.items():
            facts[name] = {"mode": mode, "why": self.reasons[name]}
            if name in self.cached_sources:
                tabled = self.cached_sources[name]
                facts[name] |= {
                    "table": tabled.cache.path.name,
                    "computed": tabled.cache.rows_computed,
                    "read": tabled.rows_read,
                }
        return facts

    def describe(self) -> str:
        """One line for people; empty where all is as it would be without this."""
        if self.requested == "inline" or not self.modes:
            return ""
        how = {"inline": "in the step", "prefetch": "ahead of it", "cache": "from the cache"}
        told = "; ".join(f"{name} {how[mode]} ({self.reasons[name]})" for name, mode in self.modes.items())
        return f"networks that do not move run: {told}."


def plan_frozen_forward(
    feed: Feed,
    runner: Runner,
    recipe: Recipe,
    folder: Path,
    on_decision: Callable[[FrozenForwardPlan], None] = lambda arrangement: None,
) -> FrozenForwardPlan:
    """Decides for each role of a stage that does not move, and sees to it.

    Args:
        feed: the stage's batches; sources of it are replaced by ones with tables.
        folder: of all tables.
        told: called when all is decided: at the latest when the first block has run.
    """
    plan = runner.plan
    mode, why = requested_mode(recipe, runner.device)
    result = FrozenForwardPlan(feed, mode)
    reasons = prefetch_obstacles(plan)
    for name in runner.network.sharded:  # all ranks gather its weights at once, and a table's misses differ
        if not reasons.get(name, "no"):
            reasons[name] = "its weights lie in parts"
    for name, reason in reasons.items():
        result.set_mode(name, "inline", reason or why)
    free = [name for name, reason in reasons.items() if not reason]
    if mode == "inline" or not free or runner.steps_done >= runner.total_steps:
        on_decision(result)
        return result
    without = {}
    if mode == "cache":
        without = _from_tables(result, feed, runner, recipe, folder, free)
    ahead = [name for name in free if name not in result.cached_sources]
    _run_ahead(result, feed, runner, recipe, ahead, without, on_decision)
    return result


def _from_tables(
    result: FrozenForwardPlan, feed: Feed, runner: Runner, recipe: Recipe, folder: Path, names: list[str]
) -> dict[str, str]:
    """Gives each role that can have one its table; returns the others, and why they have none."""
    refused: dict[str, str] = {}
    opened: dict[str, CachedSource] = {}
    say = runner.say
    for name in names:
        source = runner.network.sources[name]
        epoch = feed.first_microbatch(runner.steps_done) // feed.sources[source].steps_per_epoch
        try:
            opened[name] = open_cached_source(
                runner, name, feed.sources[source], epoch=epoch, batch_size=recipe.frozen_batch_size, folder=folder, notice=say
            )
        except CacheUnavailable as reason:
            refused[name] = str(reason)
    refused = union_over_ranks(refused, names, runner.world, runner.device)
    for name in (name for name in names if name not in refused):
        tabled = opened[name]
        tabled.inner = feed.sources[tabled.name]
        feed.sources[tabled.name] = tabled
        result.cached_sources[name] = tabled
        rows, filled = tabled.cache.num_rows, int(tabled.cache.filled.sum())
        result.set_mode(name, "cache", f"{tabled.cache.name}, {filled:,} of {rows:,} rows filled")
    return refused


def _run_ahead(
    result: FrozenForwardPlan,
    feed: Feed,
    runner: Runner,
    recipe: Recipe,
    names: list[str],
    without: dict[str, str],
    told: Callable[[FrozenForwardPlan], None],
) -> None:
    """Lets the rest run ahead, where that makes their batch larger."""
    no_table = {name: f"; no table: {without[name]}" if name in without else "" for name in names}
    look = Prefetcher(feed, runner, names, recipe.frozen_batch_size) if names else None
    if look is None or look.steps_per_block * feed.accumulate == 1:
        for name in names:
            result.set_mode(name, "inline", f"a step has {recipe.frozen_batch_size} rows already{no_table[name]}")
        told(result)
        return

    def decided(refused: dict[str, str]) -> None:
        for name in names:
            rows = look.rows_per_block[runner.network.sources[name]]
            how = ("inline", refused[name]) if name in refused else ("prefetch", f"{look.steps_per_block} steps, {rows:,} rows")
            result.set_mode(name, how[0], how[1] + no_table[name])
        told(result)

    look.on_decision = decided
    result.feed = look


def describe_frozen_roles(plan: StagePlan) -> list[str]:
    """Says of each role that does not move whether it may run ahead of the step, and how large its table would be."""
    lines = []
    for name, reason in prefetch_obstacles(plan).items():
        if reason:
            lines.append(f"{name} does not move, but has to run inside the step: {reason}.")
            continue
        try:
            samples, variants, size = cache_size(plan, name)
            table = f"a table of it has {samples:,} x {variants:,} rows, {format_bytes(size)}"
        except CacheUnavailable as refused:
            table = f"no table: {refused}"
        lines.append(f"{name} does not move, and may run ahead of the step; {table}.")
    return lines
