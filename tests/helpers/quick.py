"""Splits the values of a parametrized test into a few quick ones and the rest, which only the long tests run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def only_quick(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Returns `values` as parameters of a test; all but those in `quick` are marked slow."""
    values = list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f"{missing} are no values of the test"
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
