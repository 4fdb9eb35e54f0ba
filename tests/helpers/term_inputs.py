"""Builders of terms and of wiring parts, and a run without tensor values."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdbench.registry import TERMS


def build_part(registry, name, params=None, **injected):
    """Builds a part, always with the same initial parameters."""
    torch.manual_seed(0)
    return registry.build(name, params or {}, **injected)


def build_term(name, params=None, **injected):
    """Builds a term, always with the same initial parameters."""
    return build_part(TERMS, name, params, **injected)


def run_without_values(build, operands):
    """Runs a part forward and backward on fake tensors, which raise when a value is read; returns its output."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_operands = {name: _to_fake(mode, value) for name, value in operands.items()}
        result = build()(**fake_operands)
        loss = result["gate"] if isinstance(result, dict) else result
        if loss.requires_grad:
            loss.sum().backward()
    return result


def _to_fake(mode, value):
    return [mode.from_tensor(element) for element in value] if isinstance(value, list) else mode.from_tensor(value)
