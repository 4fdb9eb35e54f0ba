"""Isolates tests from each other: one thread (results do not depend on the machine), an empty folder, no old calls."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    """Runs each test in a new folder, so that tests share neither `runs/` nor `data/`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _empty_call_list():
    """Clears the call list of `helpers.plugin_parts`.

    The compiler traces a list to which a step appends once for each length. With the calls of all earlier tests, that
    took minutes.
    """
    plugin_parts = sys.modules.get("helpers.plugin_parts")
    if plugin_parts is not None:
        plugin_parts.CALLS.clear()
