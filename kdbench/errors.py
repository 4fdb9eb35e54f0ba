"""Exceptions for users' mistakes, and the parts of their messages.

A message is one paragraph: the location, what is wrong, what was expected, and the nearest right name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """The origin of a value of the recipe: a line of a file, or an override on the command line."""

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
    """A condition that ends training, such as a loss that is not finite or a full disk. Saved files stay."""


def escape_control_characters(text: str) -> str:
    """Escapes control characters, since names of files and classes may contain commands to a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def suggest(name: str, names: Iterable[str], *, limit: int = 12) -> str:
    """Returns a hint for a name that is not among `names`: " Did you mean 'x'? Known: ...".

    Args:
        limit: a longer list of names is cut to the nearest ones.
    """
    names = sorted(names)
    # Upper and lower case count alike: `Sgd` is nearer to `SGD` than a comparison of letters says.
    names_by_lower_case = {known_name.lower(): known_name for known_name in names}

    def matches(count: int, cutoff: float) -> list[str]:
        keys = difflib.get_close_matches(str(name).lower(), names_by_lower_case, n=count, cutoff=cutoff)
        return [names_by_lower_case[key] for key in keys]

    closest = matches(1, 0.5)
    hint = f" Did you mean {closest[0]!r}?" if closest else ""
    if not names:
        return hint
    if len(names) > limit:
        similar = matches(limit, 0.3)
        examples = f"Similar: {', '.join(similar)}" if similar else f"Known: {', '.join(names[:limit])}, ..."
        return f"{hint} {examples} ({len(names)} in all)."
    return f"{hint} Known: {', '.join(names)}."
