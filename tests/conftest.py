"""Shared by all tests: one thread (results do not depend on the machine), and no leftovers between tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, so that `runs/` and `data/` of one never meet another's."""
    monkeypatch.chdir(tmp_path)
