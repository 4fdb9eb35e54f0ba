"""A user's mistake, said in one paragraph: what, where, what was expected, the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """Where a value of the recipe was written: a line of a file, or an override of the command line."""

    key: str = ""
    file: str | None = None
    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        if self.override is not None:
            source = f"override '{self.override}'"
        elif self.file is not None:
            source = self.file if self.line is None else f"{self.file}:{self.line}"
        else:
            source = ""
        told = self.override is not None and self.override.lstrip("+~").split("=", 1)[0] == self.key
        return " ".join(part for part in (source, "" if told else self.key) if part)


class UserError(Exception):
    """Something that the user can mend. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A mistake in a recipe or an override."""


class DataError(UserError):
    """A missing, damaged or unsuitable dataset."""


class CheckpointError(UserError):
    """A missing, damaged or unsuitable checkpoint."""


class TrainingError(UserError):
    """Training cannot go on (a loss that is not finite, no space left); what was saved stays."""


def escape_control_characters(text: str) -> str:
    """The text with control characters spelled out: names of files and classes may hold commands to a terminal."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def suggest(name: str, names: Iterable[str], *, limit: int = 12) -> str:
    """Returns " Did you mean 'x'? Known: ..." for a name that is not among `known`."""
    names = sorted(names)
    folded = {other.lower(): other for other in names}  # `Sgd` is nearer to `SGD` than its letters say

    def matches(n: int, cutoff: float) -> list[str]:
        return [folded[key] for key in difflib.get_close_matches(str(name).lower(), folded, n=n, cutoff=cutoff)]

    close = matches(1, 0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if not names:
        return hint
    if len(names) > limit:
        close_ones = matches(limit, 0.3) or names[:limit]
        return f"{hint} Near it: {', '.join(close_ones)} ({len(names)} in all)."
    return f"{hint} Known: {', '.join(names)}."
