"""malloc keeps freed memory for the next training step; measured in page faults, not in seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from kdbench.cli.train import _retain_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "retain":
    _retain_freed_memory()

def step():
    maps = [torch.ones(64, 16, 32, 32) for _ in range(24)]  # 4 MiB each, as many as a network has layers
    return sum(part.sum() for part in maps)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str, **variables: str) -> int:
    """Returns the page faults of five steps in a new process.

    Args:
        mode: `retain` configures malloc as training does; `default` does not.
        variables: environment variables to add.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNT, mode]
    process = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return int(process.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's malloc is configured")
def test_step_reuses_the_memory_of_the_step_before():
    """A user's own malloc settings have precedence. (Without any setting the count depends on the end of the heap.)"""
    retained, user_setting = page_faults("retain"), page_faults("retain", MALLOC_TRIM_THRESHOLD_="131072")
    if user_setting < 50_000:
        pytest.skip("this system's malloc keeps memory by default, or counts no faults")
    assert retained < user_setting / 10
    assert page_faults("default", MALLOC_TRIM_THRESHOLD_="131072") > user_setting / 2
