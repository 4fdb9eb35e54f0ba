"""Properties of every term: reference, gradients, rows, precision, and no reads on the host."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from helpers.cases import CASES, EXPANDED_CASES
from helpers.cases.base import BATCH, Operands, TermCase
from helpers.cases.loops import numerical_gradient
from kdbench.registry import TERMS

TEACHER_CASES = [case for case in EXPANDED_CASES if "teacher" in case.operands()]
ZERO_CASES = [case for case in EXPANDED_CASES if case.teacher is not None and case.zero_tolerance is not None]
DIFFERENTIABLE_CASES = [case for case in EXPANDED_CASES if not case.stops_gradient]
ROW_CASES = [case for case in EXPANDED_CASES if case.space == "row" and not case.coupled_rows]
BATCH_CASES = [case for case in EXPANDED_CASES if case.space == "batch"]
CLASS_CASES = [
    case
    for case in EXPANDED_CASES
    if case.class_symmetric and not case.history and not case.entry.facts.get("features")
]
CONTROLS = [(case, name) for case in EXPANDED_CASES for name in case.controls]
SCHEDULED = [
    (case, parameter.name)
    for case in CASES.values()
    for parameter in case.entry.parameters.values()
    if parameter.schedulable and parameter.name not in case.gradient_only
]
MASK = torch.tensor([True, False, True, True, False, True, True])

every_case = pytest.mark.parametrize("case", EXPANDED_CASES, ids=str)
every_term = pytest.mark.parametrize("case", CASES.values(), ids=str)
every_batch_case = pytest.mark.parametrize("case", BATCH_CASES, ids=str)


def test_every_registered_term_has_exactly_one_case():
    assert set(CASES) == set(TERMS.entries)


def test_every_case_has_a_control_and_every_memory_a_history():
    assert {case.term for case, _ in CONTROLS} == set(CASES)
    assert {name for name, case in CASES.items() if case.entry.facts.get("state") and not case.history} <= {"reinforce"}


@pytest.mark.parametrize("name", list(TERMS.entries))
def test_registration_names_paper_and_docstring_describes_shapes_and_parameters(name):
    entry = TERMS.entries[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|[A-Z]+ \d{4}", entry.facts["paper"])
    assert entry.facts["paper"] in entry.doc
    assert 10 < len(entry.summary) <= 120
    assert "\nShape:\n" in entry.doc and "Returns" in entry.doc
    for parameter in set(entry.parameters) - set(entry.facts.get("injected", ())):
        assert f"    {parameter}: " in entry.doc, f"Args: describe {parameter}"
    assert entry.version >= 1
    optional = {"mask", "weight"} if entry.facts["space"] == "batch" else set()
    assert optional <= set(entry.optional_inputs)


def agrees_with_reference(case: TermCase, loss: torch.Tensor, operands: Operands) -> bool:
    """Compares value and gradient with those of the plain loops."""
    reference = case.reference_loss(operands)
    expected = torch.tensor(reference(operands["student"].tolist()), dtype=torch.float64)
    if loss.shape != expected.shape or not torch.allclose(loss.detach(), expected, rtol=1e-9, atol=1e-12):
        return False
    # Different weights per row, so that exchanged row gradients do not cancel.
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (gradient,) = torch.autograd.grad((weights * loss).sum(), operands["student"])

    def weighted_sum(student):
        return (weights * torch.tensor(reference(student), dtype=torch.float64)).sum().item()

    expected = numerical_gradient(weighted_sum, operands["student"].detach())
    return torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@every_case
def test_value_and_gradient_equal_those_of_plain_loops(case):
    operands = case.operands()
    assert agrees_with_reference(case, case.build()(**operands), operands)


@pytest.mark.parametrize(("case", "name"), CONTROLS, ids=str)
def test_comparison_with_reference_fails_for_every_control(case, name):
    operands = case.operands()
    assert not agrees_with_reference(case, case.controls[name](case, operands), operands)


@pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=str)
def test_autograd_equals_finite_differences_in_student_and_teacher(case):
    operands = case.operands()
    names = [name for name in ("student", "teacher") if name in operands]
    operands |= {name: operands[name].requires_grad_() for name in names}
    assert torch.autograd.gradcheck(
        lambda *values: case.loss(**{**operands, **dict(zip(names, values, strict=True))}),
        [operands[name] for name in names],
        fast_mode=True,
    )


@pytest.mark.parametrize("case", TEACHER_CASES, ids=str)
def test_detached_teacher_gets_no_gradient_and_operands_are_not_modified(case):
    operands = case.operands()
    teacher = operands["teacher"].requires_grad_()
    before = {name: value.detach().clone() for name, value in operands.items()}
    case.build()(**{**operands, "teacher": teacher.detach()}).sum().backward()
    assert teacher.grad is None
    assert operands["student"].grad.abs().sum() > 0
    for name, value in operands.items():
        assert torch.equal(value.detach(), before[name])


@pytest.mark.parametrize("case", ZERO_CASES, ids=str)
def test_loss_and_gradient_are_zero_at_equality_and_loss_is_positive_elsewhere(case):
    operands = case.operands()
    assert (case.loss(**operands) > 0).all()
    loss = case.loss(**case.with_equal_sides(operands))
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=case.zero_tolerance)
    (gradient,) = torch.autograd.grad(loss.sum(), operands["student"])
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=case.zero_tolerance)


@pytest.mark.parametrize("case", [case for case in EXPANDED_CASES if case.space != "model"], ids=str)
def test_order_of_rows_does_not_matter(case):
    operands, order = case.operands(), torch.tensor([3, 1, 4, 0, 2])
    loss, reordered = case.loss(**operands), case.loss(**case.select_rows(operands, order))
    assert_close(reordered, loss if case.space == "batch" else loss[order])


@pytest.mark.parametrize("case", CLASS_CASES, ids=str)
def test_order_of_classes_does_not_matter(case):
    operands, order = case.operands(), torch.tensor([2, 0, 3, 1])
    new_number = torch.argsort(order)
    renamed = {
        name: value[:, order] if value.ndim == 2 else new_number[value] if name.startswith("label") else value
        for name, value in operands.items()
    }
    assert_close(case.loss(**renamed), case.loss(**operands))


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_loss_of_a_row_depends_only_on_that_row(case):
    operands, different = case.operands(), case.operands(seed=1)
    loss = case.loss(**operands)
    mixed = {
        name: value if name in case.fixed else torch.cat([value[:1], different[name][1:]])
        for name, value in operands.items()
    }
    assert_close(case.loss(**mixed)[0], loss[0])
    (gradient,) = torch.autograd.grad(loss[0], operands["student"])
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0


def masked_and_selected(case: TermCase, mask: torch.Tensor, garbage=float("nan")) -> tuple[Operands, Operands]:
    """Returns operands with garbage in the masked rows, with the mask; and the operands of the valid rows alone."""
    masked = {name: value.detach().clone() for name, value in case.operands(batch=len(mask)).items()}
    for name in {"student", "teacher"} & masked.keys() - case.fixed.keys():
        masked[name][~mask] = garbage
    selected = case.select_rows(masked, mask)
    masked["student"].requires_grad_()
    selected["student"].requires_grad_()
    return {**masked, "mask": mask}, selected


@every_batch_case
def test_masked_batch_equals_batch_without_the_masked_rows(case):
    masked, selected = masked_and_selected(case, MASK)
    loss, expected = case.loss(**masked), case.loss(**selected)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_close(masked["student"].grad[MASK], selected["student"].grad)
    assert masked["student"].grad[~MASK].abs().sum() == 0


@every_batch_case
def test_without_the_mask_the_additional_rows_change_the_loss(case):
    masked, selected = masked_and_selected(case, MASK, garbage=0.5)
    del masked["mask"]
    assert not torch.allclose(case.loss(**masked), case.loss(**selected))


@every_batch_case
@pytest.mark.parametrize("weight", [None, torch.full((7,), 2.0)], ids=["unweighted", "weighted"])
def test_batch_without_valid_rows_gives_zero(case, weight):
    masked, _ = masked_and_selected(case, torch.zeros(7, dtype=torch.bool))
    loss = case.loss(**masked, weight=weight)
    loss.backward()
    assert loss.item() == 0
    assert (masked["student"].grad == 0).all()


@every_batch_case
def test_single_valid_row_gives_finite_loss_and_gradient(case):
    masked, selected = masked_and_selected(case, torch.arange(7) == 3)
    loss = case.loss(**masked)
    loss.backward()
    assert_close(loss, case.loss(**selected))
    assert masked["student"].grad.isfinite().all()


@every_batch_case
def test_equal_weights_change_nothing_and_weight_zero_equals_a_mask(case):
    operands = case.operands(batch=7)
    assert_close(case.loss(**operands, weight=torch.full((7,), 3.0)), case.loss(**operands))
    assert_close(case.loss(**operands, weight=MASK.double()), case.loss(**operands, mask=MASK))
    assert not torch.allclose(case.loss(**operands, weight=torch.arange(1.0, 8.0)), case.loss(**operands))


@every_term
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_operands_give_a_float32_loss(case, dtype):
    half = case.operands(dtype=dtype)
    single = {name: value.detach().float() if value.dtype == dtype else value for name, value in half.items()}
    loss = case.loss(**half)
    assert loss.dtype == torch.float32
    assert_close(loss, case.loss(**single))
    loss.sum().backward()
    assert half["student"].grad.dtype == dtype
    assert half["student"].grad.isfinite().all()


@every_term
def test_autocast_changes_nothing(case):
    operands = case.operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(**operands)
    assert torch.equal(loss, case.loss(**operands))


@pytest.mark.parametrize(("case", "name"), SCHEDULED, ids=str)
@pytest.mark.parametrize("value", [0.7, 2.5])
def test_scheduled_parameter_as_tensor_equals_the_number(case, name, value):
    value = value / 3 if name in case.unit_interval else value
    operands = case.operands(dtype=torch.float32)
    expected = case.build(torch.float32, **{name: value})(**operands)
    assert_close(case.build(torch.float32, **{name: torch.tensor(value)})(**operands), expected)
    term = case.build(torch.float32, **{name: torch.tensor(value)})
    setattr(term, name, torch.tensor(value + 0.1))  # as the runner sets it
    assert not torch.allclose(term(**operands), expected)


def with_mask(case: TermCase, operands: Operands) -> Operands:
    rows = len(operands["student"])
    return {**operands, "mask": MASK[:rows], "weight": torch.ones(rows)} if case.space == "batch" else operands


@every_term
def test_compiles_to_one_graph_with_the_same_numbers(case):
    torch._dynamo.reset()
    operands = with_mask(case, case.operands(dtype=torch.float32))
    params = {p.name: torch.tensor(0.3) for p in case.entry.parameters.values() if p.schedulable}
    term, compiled = (case.build(torch.float32, **params) for _ in range(2))
    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=False)
    loss, expected = compiled(**operands), term(**operands)
    assert_close(loss, expected)
    gradients = [torch.autograd.grad(value.sum(), operands["student"])[0] for value in (loss, expected)]
    assert_close(*gradients)


@every_case
def test_forward_and_backward_read_no_tensor_on_the_host(case):
    operands = with_mask(case, case.operands(dtype=torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(value) for name, value in operands.items()}
        loss = case.build(torch.float32, with_history=False)(**fake)
        loss.sum().backward()
    assert loss.shape == ((BATCH,) if case.space == "row" else ())
    assert fake["student"].grad.shape == operands["student"].shape


@every_term
def test_runs_on_the_meta_device(case):
    operands = {name: value.detach().to("meta") for name, value in with_mask(case, case.operands()).items()}
    assert case.build(with_history=False).to("meta")(**operands).device.type == "meta"
