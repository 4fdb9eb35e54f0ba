"""Shared by all tests: one thread (results do not depend on the machine), and no leftovers between tests."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, so that `runs/` and `data/` of one never meet another's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _own_calls():
    """The parts of `helpers.plugin_parts` note their calls in one list. The compiler builds a list that a step appends
    to anew for each form of the step: with the calls of all tests before, that took it minutes."""
    parts = sys.modules.get("helpers.plugin_parts")
    if parts is not None:
        parts.CALLS.clear()
