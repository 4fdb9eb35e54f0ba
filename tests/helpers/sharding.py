"""Skips tests of sharded roles (`shard`) if this torch version cannot sum their gradients."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

CAN_SHARD = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason=f"torch {torch.__version__} cannot sum sharded gradients")
