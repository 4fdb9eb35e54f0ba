"""Parts that users add from outside: modules named on the command line, and entry points of installed packages.

A plug-in is a module that declares parts with `@TERMS.register("name", ...)` and so on. A recipe cannot name one: what
runs is chosen by the person at the command line, never by a file that may come from elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from kdbench.errors import ConfigError
from kdbench.registry import REGISTRIES

ENTRY_POINT_GROUP = "kdbench.plugins"


_ENVIRONMENT_VARIABLE = "KDBENCH_PLUGINS"  # carries the command line's choice to worker processes of a multirun


_loaded_modules: set[str] = set()


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Adds the parts of installed plug-ins and of `modules`; a module is read once, and imported when it is used.

    Raises:
        ConfigError: there is no such module, or it declares a name that is taken.
    """
    named = [*(m for m in os.environ.get(_ENVIRONMENT_VARIABLE, "").split(",") if m), *modules]
    if named and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside the user, as `python -m` would find it
    for module in dict.fromkeys([*(point.value for point in entry_points(group=ENTRY_POINT_GROUP)), *named]):
        if module in _loaded_modules:
            continue
        try:
            for registry in REGISTRIES.values():
                registry.add_plugin(module)
        except (ImportError, SyntaxError) as error:
            raise ConfigError(f"plug-in {module!r} cannot be read: {error}") from error
        _loaded_modules.add(module)
    if named:
        os.environ[_ENVIRONMENT_VARIABLE] = ",".join(dict.fromkeys(named))
