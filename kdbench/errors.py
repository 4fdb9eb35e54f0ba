"""Exceptions for users' mistakes, and helpers that format their messages.

A message is one paragraph: the location, the mistake, the expected value, and the nearest valid name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """The place where a key of the recipe was written: a line of a file, or an override on the command line."""

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
        override_has_key = self.override is not None and self.override.lstrip("+~").split("=", 1)[0] == self.key
        return " ".join(part for part in (source, "" if override_has_key else self.key) if part)


class UserError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A mistake in a recipe or an override."""


class DataError(UserError):
    """A missing, damaged or unsuitable dataset."""


class CheckpointError(UserError):
    """A missing, damaged or unsuitable checkpoint."""


class TrainingError(UserError):
    """A condition that ends training, such as a loss that is not finite or a full disk. Saved files are kept."""


def escape_control_characters(text: str) -> str:
    """Escapes control characters, since names of files and classes may contain escape sequences of a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns the hint " Did you mean 'x'?", where 'x' is the name nearest to `name`; empty if no name is near."""
    closest = _similar_names(name, names, count=1, cutoff=0.5)
    return f" Did you mean {closest[0]!r}?" if closest else ""


def suggest(name: str, names: Iterable[str], *, limit: int = 12, listing: str = "") -> str:
    """Returns a hint for a name that is not among `names`: " Did you mean 'x'? Valid names: x, y."

    Args:
        limit: maximum number of names that the hint lists.
        listing: sentence that names a command or page with all names. It is added if there are more than `limit` names.
    """
    names = sorted(names)
    hint = did_you_mean(name, names)
    if len(names) <= limit:
        return f"{hint} Valid names: {', '.join(names)}." if names else hint
    similar = _similar_names(name, names, count=5, cutoff=0.75)[1:]
    if similar:
        hint += f" Similar names: {', '.join(similar)}."
    elif not hint and not listing:
        hint = f" Some of the {len(names)} valid names: {', '.join(names[:limit])}."
    return f"{hint} {listing}" if listing else hint


def _similar_names(name: str, names: Iterable[str], *, count: int, cutoff: float) -> list[str]:
    """Returns at most `count` names whose similarity to `name` is at least `cutoff`, the nearest name first."""
    # Upper and lower case count alike: `Sgd` is nearer to `SGD` than a comparison of letters says.
    names_by_lower_case = {valid_name.lower(): valid_name for valid_name in names}
    keys = difflib.get_close_matches(str(name).lower(), names_by_lower_case, n=count, cutoff=cutoff)
    return [names_by_lower_case[key] for key in keys]
