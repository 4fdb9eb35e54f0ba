"""Wrong parameters and operand shapes are reported before training."""

from __future__ import annotations

import pytest
import torch
from torch import Size

from helpers.cases import CASES, EXPANDED_CASES
from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.base import Term

MISTAKES = [(case, mistake) for case in CASES.values() for mistake in case.mistakes]
SHAPE_MISTAKES = [(case, mistake) for case, mistake in MISTAKES if mistake.shapes is not None]
PARAMETER_MISTAKES = [(case, mistake) for case, mistake in MISTAKES if mistake.shapes is None]


def mistake_id(value):
    return str(value) if hasattr(value, "term") else str(value.message)


@pytest.mark.parametrize(("case", "mistake"), SHAPE_MISTAKES, ids=mistake_id)
def test_shapes_that_cannot_be_compared_raise(case, mistake):
    term = case.build(with_history=False, **mistake.params)
    with pytest.raises(ValueError, match=mistake.message):
        term.check_shapes(**{name: Size(shape) for name, shape in mistake.shapes.items()})


@pytest.mark.parametrize(("case", "mistake"), PARAMETER_MISTAKES, ids=mistake_id)
def test_parameters_out_of_range_raise(case, mistake):
    with pytest.raises(ConfigError, match=mistake.message):
        case.build(with_history=False, **mistake.params)


@pytest.mark.parametrize("case", EXPANDED_CASES, ids=str)
def test_shapes_of_the_case_are_accepted(case):
    case.build(with_history=False).check_shapes(**{name: value.shape for name, value in case.operands().items()})


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_every_term_that_checks_shapes_has_a_mistake(case):
    checks_shapes = type(case.build(with_history=False)).check_shapes is not Term.check_shapes
    assert case.mistakes or not checks_shapes


def test_tensor_parameter_is_not_read_in_the_constructor():
    term = TERMS.build("kd", {"temperature": torch.empty((), device="meta")})
    assert term.temperature.device.type == "meta"
