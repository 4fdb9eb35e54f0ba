"""Decides for each frozen role of a stage: inline in the step, prefetched for several steps, or cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
"""Folder of all teacher caches, inside the folder of all runs."""


def requested_mode(recipe: Recipe, device: torch.device) -> tuple[str, str]:
    """Returns the mode of `frozen_forward:` on a device, and the reason for it; `auto` is prefetch on a GPU only."""
    if recipe.frozen_forward != "auto":
        return recipe.frozen_forward, f"frozen_forward: {recipe.frozen_forward}"
    return ("prefetch", "on a GPU") if device.type == "cuda" else ("inline", f"on {device.type}")


@dataclass
class FrozenForwardPlan:
    """Modes of the frozen roles of a stage.

    Attributes:
        feed: the stage's batches, with precomputed features of prefetched and cached roles.
        requested: the mode of the recipe.
        modes: role -> `inline`, `prefetch` or `cache`.
        reasons: role -> why it has this mode, or a description of the block or the cache.
        cached_sources: role -> its source, for cached roles.
    """

    feed: BatchFeed
    requested: str
    modes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cached_sources: dict[str, CachedSource] = field(default_factory=dict)

    def set_mode(self, name: str, mode: str, reason: str) -> None:
        """Sets the mode of a role and the reason for it."""
        self.modes[name], self.reasons[name] = mode, reason

    def manifest_entries(self) -> dict[str, dict[str, Any]]:
        """Returns role -> mode and reason, and for a cached role the cache and the rows computed and read so far."""
        entries: dict[str, dict[str, Any]] = {}
        for name, mode in self.modes.items():
            entries[name] = {"mode": mode, "reason": self.reasons[name]}
            if name in self.cached_sources:
                source = self.cached_sources[name]
                entries[name] |= {
                    "cache": source.cache.path.name,
                    "rows_computed": source.cache.rows_computed,
                    "rows_read": source.rows_read,
                }
        return entries

    def describe(self) -> str:
        """Returns a sentence for the user; empty if every frozen role runs inline as requested."""
        if self.requested == "inline" or not self.modes:
            return ""
        verbs = {"inline": "runs inside the step", "prefetch": "is prefetched", "cache": "is cached"}
        roles = (f"{name} {verbs[mode]} ({self.reasons[name]})" for name, mode in self.modes.items())
        return f"frozen roles: {'; '.join(roles)}."


def plan_frozen_forward(
    feed: Feed,
    runner: Runner,
    recipe: Recipe,
    folder: Path,
    on_decision: Callable[[FrozenForwardPlan], None] = lambda plan: None,
) -> FrozenForwardPlan:
    """Decides the mode of each frozen role of a stage, opens caches, and sets up prefetching.

    Args:
        feed: the stage's batches; the sources of cached roles are replaced in it.
        runner: of the stage.
        recipe: supplies `frozen_forward` and `frozen_batch_size`.
        folder: folder of all caches.
        on_decision: called when every mode is final: at the latest after the first block of prefetching.
    """
    mode, mode_reason = requested_mode(recipe, runner.device)
    plan = FrozenForwardPlan(feed, mode)
    obstacles = prefetch_obstacles(runner.plan)
    for name in runner.network.sharded:
        # All ranks gather sharded weights together, but each rank misses other rows of a cache.
        if obstacles.get(name) == "":
            obstacles[name] = "its weights are sharded"
    for name, obstacle in obstacles.items():
        plan.set_mode(name, "inline", obstacle or mode_reason)
    names = [name for name, obstacle in obstacles.items() if not obstacle]
    if mode == "inline" or not names or runner.progress.steps_done >= runner.progress.total_steps:
        on_decision(plan)
        return plan
    cache_problems = _open_caches(plan, feed, runner, recipe, folder, names) if mode == "cache" else {}
    names = [name for name in names if name not in plan.cached_sources]
    if names:
        _start_prefetching(plan, feed, runner, recipe.frozen_batch_size, names, cache_problems, on_decision)
    else:
        on_decision(plan)
    return plan


def _open_caches(
    plan: FrozenForwardPlan, feed: Feed, runner: Runner, recipe: Recipe, folder: Path, names: Sequence[str]
) -> dict[str, str]:
    """Opens the caches of the given roles, as far as possible; returns role -> reason for the others."""
    problems: dict[str, str] = {}
    cached_sources: dict[str, CachedSource] = {}
    for name in names:
        source = feed.sources[runner.network.sources[name]]
        epoch = feed.first_microbatch(runner.progress.steps_done) // source.steps_per_epoch
        try:
            cached_sources[name] = open_cached_source(
                runner,
                name,
                source,
                epoch=epoch,
                batch_size=recipe.frozen_batch_size,
                folder=folder,
                notice=runner.notices.notice,
            )
        except CacheUnavailable as error:
            problems[name] = str(error)
    problems = union_over_ranks(problems, names, runner.world, runner.device)
    # Only now, when all ranks agree: a source is wrapped once for each of its cached roles.
    for name in (name for name in names if name not in problems):
        source = cached_sources[name]
        source.inner = feed.sources[source.name]
        feed.sources[source.name] = source
        plan.cached_sources[name] = source
        num_filled, num_rows = int(source.cache.filled.sum()), source.cache.num_rows
        plan.set_mode(name, "cache", f"{source.cache.name}, {num_filled:,} of {num_rows:,} rows filled")
    return problems


def _start_prefetching(
    plan: FrozenForwardPlan,
    feed: Feed,
    runner: Runner,
    batch_size: int,
    names: Sequence[str],
    cache_problems: dict[str, str],
    on_decision: Callable[[FrozenForwardPlan], None],
) -> None:
    """Prefetches roles, unless a block of the requested size would contain a single step.

    Args:
        plan: receives modes and the new feed.
        feed: the batches, with cached sources.
        runner: of the stage.
        batch_size: of the prefetched roles.
        names: the roles.
        cache_problems: role -> why it has no cache; part of the reasons.
        on_decision: called when every mode is final.
    """
    suffixes = {name: f"; no cache: {cache_problems[name]}" if name in cache_problems else "" for name in names}

    def set_modes(rejected: dict[str, str]) -> None:
        for name in names:
            if name in rejected:
                plan.set_mode(name, "inline", rejected[name] + suffixes[name])
            else:
                rows = prefetcher.rows_per_block[runner.network.sources[name]]
                reason = f"{prefetcher.steps_per_block} steps, {rows:,} rows"
                plan.set_mode(name, "prefetch", reason + suffixes[name])
        on_decision(plan)

    prefetcher = Prefetcher(feed, runner, names, batch_size, on_check=set_modes)
    if prefetcher.steps_per_block * feed.accumulate == 1:
        for name in names:
            plan.set_mode(name, "inline", f"two steps have more than {batch_size} rows{suffixes[name]}")
        on_decision(plan)
        return
    plan.feed = prefetcher


def describe_frozen_roles(plan: StagePlan) -> list[str]:
    """Returns a sentence for each frozen role that a step runs: prefetching possible or not, and the cache's size."""
    lines = []
    for name, obstacle in prefetch_obstacles(plan).items():
        if obstacle:
            lines.append(f"{name} is frozen, but must run inside the step: {obstacle}.")
            continue
        try:
            samples, variants, size = cache_size(plan, name)
            cache = f"its cache has {samples:,} x {variants:,} rows, {format_bytes(size)}"
        except CacheUnavailable as error:
            cache = f"no cache: {error}"
        lines.append(f"{name} is frozen and can be prefetched; {cache}.")
    return lines
