"""Plug-ins: registered parts of users, from modules named on the command line and entry points of installed packages.

A plug-in is a module that declares parts with `@TERMS.register("name", ...)` or another registry's decorator. A recipe
cannot name a plug-in: the person at the command line decides which code runs, not a file from elsewhere.
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
    """Adds the parts of `modules` and of installed plug-ins to the registries.

    Each module is read once per process, and imported only when one of its parts is built.

    Raises:
        ConfigError: a module does not exist or cannot be parsed, or declares a name that exists already.
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
