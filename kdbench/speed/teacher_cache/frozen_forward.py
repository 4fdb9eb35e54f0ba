"""Execution of frozen roles (networks): inside each step, prefetched for several steps at once, or cached on disk."""

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
"""Name of the folder of all teacher caches, inside the folder of all runs."""


def requested_mode(recipe: Recipe, device: torch.device) -> tuple[str, str]:
    """Returns the mode in which a recipe requests to run frozen roles (networks), and the reason for this mode.

    The modes are `inline` (inside each step), `prefetch` (for several steps at once) and `cache` (cached on disk).
    With `frozen_forward: auto`, the mode is `prefetch` on a CUDA device and `inline` on other devices.
    """
    if recipe.frozen_forward != "auto":
        return recipe.frozen_forward, f"frozen_forward: {recipe.frozen_forward}"
    return ("prefetch", "on a GPU") if device.type == "cuda" else ("inline", f"on {device.type}")


@dataclass
class FrozenForwardPlan:
    """Execution modes of the frozen roles (networks) of a training stage.

    Attributes:
        feed: provider of the batches of the stage, which contain the outputs of prefetched and cached roles.
        requested: mode that the recipe requests.
        modes: role -> `inline` (runs inside each step), `prefetch` (for several steps at once) or `cache` (on disk).
        reasons: role -> reason for the role's mode, or a description of its cache, or the number of prefetched steps.
        cached_sources: cached role -> source that adds the role's features to the batches.
    """

    feed: BatchFeed
    requested: str
    modes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cached_sources: dict[str, CachedSource] = field(default_factory=dict)

    def set_mode(self, name: str, mode: str, reason: str) -> None:
        """Sets the mode of a role (network), and the reason for this mode."""
        self.modes[name], self.reasons[name] = mode, reason

    def manifest_entries(self) -> dict[str, dict[str, Any]]:
        """Returns role -> entries for the run's manifest: mode, reason and, if cached, cache name and row counts."""
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
        """Returns a sentence for the user that lists the mode of each role (network).

        If the recipe requests the mode `inline`, or if there is no frozen role, the sentence is empty.
        """
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
    """Decides when each frozen role (network) of a stage runs; opens teacher caches; sets up prefetching.

    Args:
        feed: provider of the batches of the stage. The function replaces the sources of cached roles in `feed`.
        runner: training loop of the stage.
        recipe: recipe with the keys `frozen_forward` and `frozen_batch_size`.
        folder: folder of all caches.
        on_decision: function that receives the plan when every mode is final. With prefetching, modes are final after
            the first prefetched outputs are checked.

    Returns:
        The plan. The modes in the plan may change until `on_decision` is called.
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
    """Opens the teacher caches of the roles (networks) in `names`; returns role -> reason if a cache is impossible."""
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
    """Sets up prefetching of roles (networks), unless the batch size is too small for the rows of two steps.

    Args:
        plan: plan that receives the modes of the roles and the new feed.
        feed: provider of the batches of the stage, with cached features.
        runner: training loop of the stage.
        batch_size: maximum number of rows on which the prefetched roles run at once.
        names: names of the roles to prefetch.
        cache_problems: role -> reason why the role has no cache. The reason is appended to the reason in the plan.
        on_decision: function that receives the plan when every mode is final.
    """
    suffixes = {name: f"; no cache: {cache_problems[name]}" if name in cache_problems else "" for name in names}

    def set_modes(rejected: dict[str, str]) -> None:
        for name in names:
            if name in rejected:
                plan.set_mode(name, "inline", rejected[name] + suffixes[name])
            else:
                rows = prefetcher.rows_per_block[runner.network.sources[name]]
                reason = f"for {prefetcher.steps_per_block} steps at once, {rows:,} rows"
                plan.set_mode(name, "prefetch", reason + suffixes[name])
        on_decision(plan)

    prefetcher = Prefetcher(feed, runner, names, batch_size, on_check=set_modes)
    if prefetcher.steps_per_block * feed.accumulate == 1:
        for name in names:
            reason = f"two steps have more rows than frozen_batch_size, which is {batch_size}"
            plan.set_mode(name, "inline", reason + suffixes[name])
        on_decision(plan)
        return
    plan.feed = prefetcher


def describe_frozen_roles(plan: StagePlan) -> list[str]:
    """Returns a sentence for each frozen role (network): why it must run inside each step, or the size of its cache."""
    lines = []
    for name, obstacle in prefetch_obstacles(plan).items():
        if obstacle:
            lines.append(f"role {name!r} is frozen, but must run inside the step: {obstacle}.")
            continue
        try:
            samples, variants, size = cache_size(plan, name)
            noun = "variant" if variants == 1 else "variants"
            cache = f"a cache of them has {samples:,} samples x {variants:,} augmented {noun}, {format_bytes(size)}"
        except CacheUnavailable as error:
            cache = f"they cannot be cached: {error}"
        lines.append(f"role {name!r} is frozen, so its outputs can be prefetched; {cache}.")
    return lines
