"""Test cases of the terms, one per registered term, in the same modules as in `kdbench.terms`.

A case is defined beside its reference. A new term needs one `TermCase` at module level; this package collects them.
"""

from __future__ import annotations

import importlib
import pkgutil

from helpers.cases.base import TermCase


def collect_cases() -> dict[str, TermCase]:
    """Collects the cases of all modules of this package, by term.

    Raises:
        ValueError: two cases of one term.
    """
    cases: dict[str, TermCase] = {}
    for module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        for case in vars(importlib.import_module(module.name)).values():
            if isinstance(case, TermCase) and cases.setdefault(case.term, case) is not case:
                raise ValueError(f"two test cases of the term {case.term!r}")
    return cases


CASES = collect_cases()
EXPANDED_CASES = [variant for case in CASES.values() for variant in case.expand()]
