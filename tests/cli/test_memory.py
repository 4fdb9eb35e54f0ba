"""A training process keeps the memory that a step frees; counted by the system, in page faults, not in seconds."""

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
if sys.argv[1] == "keep":
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


def faults(way: str, **environment: str) -> int:
    """Page faults of five steps; way: `keep` or `leave` malloc as it is."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, way], env={**given, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc's malloc that is set up")
def test_a_step_gets_the_memory_of_the_last_one():
    """But where the user has set malloc up, that stands. (With neither it depends on what lies at the heap's end.)"""
    kept, chosen = faults("keep"), faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    if chosen < 50_000:
        pytest.skip("this system's malloc keeps memory by itself, or counts no faults")
    assert kept < chosen / 10
    assert faults("leave", MALLOC_TRIM_THRESHOLD_="131072") > chosen / 2
