"""Trains recipe files one after the other, as one of several processes. Tests start it with torchrun."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from helpers.recipes import QuietConsole, register_plugin_parts
from kdbench.config.load import load_recipe
from kdbench.experiment.run import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    register_plugin_parts()
    dist.init_process_group("gloo")
    for file in sys.argv[1:]:
        run(load_recipe(file), console=QuietConsole())
        dist.barrier()
    dist.destroy_process_group()
