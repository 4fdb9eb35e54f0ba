"""What tests of parts with a memory, or of operands of their own, share."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdbench.registry import TERMS


def build_part(registry, name, params=None, **injected):
    """A part, always with the same initial parameters."""
    torch.manual_seed(0)
    return registry.build(name, params or {}, **injected)


def build_term(name, params=None, **injected):
    return build_part(TERMS, name, params, **injected)


def run_without_values(make, operands):
    """Runs a part forward and backward where nothing has a value; returns what it gave."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {key: _fake(mode, value) for key, value in operands.items()}
        result = make()(**fake)
        loss = result["gate"] if isinstance(result, dict) else result
        if loss.requires_grad:
            loss.sum().backward()
    return result


def _fake(mode, value):
    return [mode.from_tensor(part) for part in value] if isinstance(value, list) else mode.from_tensor(value)
