"""Isolates tests from each other (one thread, an empty folder, no old calls) and selects the tests of an extra."""

import importlib.util
import sys

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--extra",
        metavar="NAME",
        help="run only the tests marked extra(NAME); a missing package is an error, not a skip",
    )


def pytest_collection_modifyitems(config, items):
    """Skips a test whose extra is not installed. With `--extra NAME`, deselects all tests but those of that extra."""
    wanted = config.getoption("--extra")
    if wanted is None:
        for item in items:
            marker = item.get_closest_marker("extra")
            if marker and importlib.util.find_spec(marker.args[0]) is None:
                item.add_marker(pytest.mark.skip(reason=f"needs the extra '{marker.args[0]}'"))
        return
    chosen = [item for item in items if (marker := item.get_closest_marker("extra")) and marker.args[0] == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


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
