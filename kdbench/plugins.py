"""Plug-ins: Python modules of users that register parts (terms, adapters, networks, ...).

A plug-in registers parts with `@TERMS.register("name", ...)` or the decorator of another registry. Plug-ins are named
on the command line, or are entry points of installed packages. A recipe cannot name a plug-in, so that the person at
the command line decides which code runs, and not a file from another person.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from kdbench.errors import ConfigError
from kdbench.registry import REGISTRIES

ENTRY_POINT_GROUP = "kdbench.plugins"

_ENVIRONMENT_VARIABLE = "KDBENCH_PLUGINS"
"""Passes the modules of the command line to the worker processes of a multirun."""

_loaded_modules: set[str] = set()


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Adds the parts of the given modules and of installed plug-ins to the registries.

    Each module is read once per process, and is imported only when one of its parts is built.

    Args:
        modules: names of the modules on the command line.

    Raises:
        ConfigError: a module does not exist, cannot be parsed, or declares a name that exists already.
    """
    requested = [*(name for name in os.environ.get(_ENVIRONMENT_VARIABLE, "").split(",") if name), *modules]
    if requested and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # finds a module in the current folder, as `python -m` does
    for module in dict.fromkeys([*(point.value for point in entry_points(group=ENTRY_POINT_GROUP)), *requested]):
        if module in _loaded_modules:
            continue
        try:
            for registry in REGISTRIES.values():
                registry.add_plugin(module)
        except (ImportError, SyntaxError) as error:
            raise ConfigError(f"plug-in {module!r} cannot be read: {error}") from error
        _loaded_modules.add(module)
    if requested:
        os.environ[_ENVIRONMENT_VARIABLE] = ",".join(dict.fromkeys(requested))
