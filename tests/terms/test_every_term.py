"""What holds for each term: its reference, its gradients, its rows, its precision, and no reads by the host."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from helpers.term_cases import (
    BATCH_CASES,
    CASES,
    ELSEWHERE,
    EQUAL_SIDES,
    LOGIT_CASES,
    SAMPLE_CASES,
    Case,
    case_id,
    one_per_term,
)
from helpers.term_reference import numerical_gradient
from kdbench.registry import TERMS

every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_term = pytest.mark.parametrize("case", one_per_term(CASES), ids=lambda case: case.term)
CONTROLS = [(case, name) for case in CASES for name in case.broken]


def test_the_cases_cover_every_registered_term():
    assert {case.term for case in CASES} | set(ELSEWHERE) == set(TERMS.entries)


@pytest.mark.parametrize(("name", "file"), ELSEWHERE.items())
def test_the_other_terms_have_a_file_of_tests(name, file):
    assert f'"{name}"' in Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(TERMS.entries))
def test_the_registration_tells_paper_and_summary(name):
    entry = TERMS.entries[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|[A-Z]+ \d{4}", entry.facts["paper"])
    assert entry.facts["paper"] in entry.doc
    assert 10 < len(entry.summary) <= 120
    assert "Shapes:" in entry.doc
    assert entry.version >= 1
    optional = {"mask", "weight"} if entry.facts["space"] == "batch" else set()
    assert optional <= set(entry.optional_inputs)


def mean_weights(case: Case, loss):
    """Fixed unequal weights per row, so that a gradient shows each row's own share."""
    return torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)


def agrees_with_reference(case: Case, loss, operands) -> bool:
    """Whether value and gradient are those of the plain loops."""
    expected = torch.tensor(case.reference(operands), dtype=torch.float64)
    if loss.shape != expected.shape or not torch.allclose(loss.detach(), expected, rtol=1e-9, atol=1e-12):
        return False
    shares = mean_weights(case, loss)
    (gradient,) = torch.autograd.grad((shares * loss).sum(), operands["student"])

    def total(student):
        losses = case.reference({**operands, "student": student})
        return (shares * torch.tensor(losses, dtype=torch.float64)).sum().item()

    expected = numerical_gradient(total, operands["student"].detach())
    return torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@every_case
def test_value_and_gradient_are_those_of_plain_loops(case):
    operands = case.operands()
    assert agrees_with_reference(case, case.build()(**operands), operands)


@pytest.mark.parametrize(("case", "name"), CONTROLS, ids=case_id)
def test_with_a_mechanism_switched_off_the_comparison_fails(case, name):
    operands = case.operands()
    assert not agrees_with_reference(case, case.broken[name](case, operands), operands)


@every_case
def test_autograd_agrees_with_finite_differences_in_both_operands(case):
    operands = case.operands()
    if "teacher" in operands:
        operands["teacher"].requires_grad_()
    names = [name for name in ("student", "teacher") if name in operands]
    assert torch.autograd.gradcheck(
        lambda *values: case.loss(**{**operands, **dict(zip(names, values, strict=True))}),
        [operands[name] for name in names],
        fast_mode=True,
    )


@pytest.mark.parametrize("case", EQUAL_SIDES, ids=case_id)
def test_a_detached_teacher_gets_no_gradient_and_operands_stay_as_they_are(case):
    operands = case.operands()
    teacher = operands["teacher"].requires_grad_()
    before = {name: value.detach().clone() for name, value in operands.items()}
    case.build()(**{**operands, "teacher": teacher.detach()}).sum().backward()
    assert teacher.grad is None
    assert operands["student"].grad.abs().sum() > 0
    for name, value in operands.items():
        assert torch.equal(value.detach(), before[name])


@pytest.mark.parametrize("case", [case for case in EQUAL_SIDES if case.zero], ids=case_id)
def test_is_zero_with_zero_gradient_when_student_equals_teacher_and_positive_elsewhere(case):
    operands = case.operands()
    term = case.build()
    assert (term(**operands) > 0).all()
    loss = term(**case.with_equal_sides(operands))
    least = {"dist": 1e-5, "pkt": 1e-7}.get(case.term, 1e-12)  # what the guards below their fractions leave
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=least)
    (gradient,) = torch.autograd.grad(loss.sum(), operands["student"])
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=least)


@every_case
def test_the_order_of_the_samples_does_not_matter(case):
    operands, order = case.operands(), torch.tensor([3, 1, 4, 0, 2])
    loss, reordered = case.loss(**operands), case.loss(**case.rows(operands, order))
    assert_close(reordered, loss if case.batch_space else loss[order])


@pytest.mark.parametrize("case", LOGIT_CASES, ids=case_id)
def test_the_order_of_the_classes_does_not_matter(case):
    operands, order = case.operands(), torch.tensor([2, 0, 3, 1])
    place = torch.argsort(order)
    renamed = {
        name: value[:, order] if value.ndim == 2 else place[value] if name.startswith("label") else value
        for name, value in operands.items()
    }
    assert_close(case.build()(**renamed), case.build()(**operands))


@pytest.mark.parametrize("case", SAMPLE_CASES, ids=case_id)
def test_each_sample_depends_on_its_own_row_only(case):
    operands, others = case.operands(), case.operands(seed=1)
    loss = case.loss(**operands)
    mixed = {name: torch.cat([value[:1], others[name][1:]]) for name, value in operands.items()}
    assert_close(case.loss(**mixed)[0], loss[0])
    (gradient,) = torch.autograd.grad(loss[0], operands["student"])
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0


def masked(case: Case, keep, garbage=float("nan")):
    """Operands whose rows outside `keep` hold garbage, with the mask; and those of the batch without the rows."""
    operands = case.operands(batch=len(keep))
    whole = {name: value.detach().clone() for name, value in operands.items()}
    for name in ("student", "teacher"):
        if name in whole:
            whole[name][~keep] = garbage
    rest = {name: value[keep] for name, value in whole.items()}
    whole["student"].requires_grad_()
    rest["student"].requires_grad_()
    return {**whole, "mask": keep}, rest


MASK = torch.tensor([True, False, True, True, False, True, True])


@pytest.mark.parametrize("case", BATCH_CASES, ids=case_id)
def test_a_masked_batch_equals_the_batch_without_those_rows(case):
    whole, rest = masked(case, MASK)
    loss, expected = case.build()(**whole), case.build()(**rest)
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_close(whole["student"].grad[MASK], rest["student"].grad)
    assert whole["student"].grad[~MASK].abs().sum() == 0


@pytest.mark.parametrize("case", BATCH_CASES, ids=case_id)
def test_without_the_mask_the_extra_rows_would_show(case):
    whole, rest = masked(case, MASK, garbage=0.5)
    del whole["mask"]
    assert not torch.allclose(case.build()(**whole), case.build()(**rest))


@pytest.mark.parametrize("case", BATCH_CASES, ids=case_id)
@pytest.mark.parametrize("weight", [None, torch.full((7,), 2.0)], ids=["unweighted", "weighted"])
def test_a_batch_that_is_masked_whole_gives_zero(case, weight):
    whole, _ = masked(case, torch.zeros(7, dtype=torch.bool))
    loss = case.build()(**whole, weight=weight)
    loss.backward()
    assert loss.item() == 0
    assert (whole["student"].grad == 0).all()


@pytest.mark.parametrize("case", BATCH_CASES, ids=case_id)
def test_a_single_valid_row_gives_finite_numbers(case):
    whole, rest = masked(case, torch.arange(7) == 3)
    loss = case.build()(**whole)
    loss.backward()
    assert_close(loss, case.build()(**rest))
    assert whole["student"].grad.isfinite().all()


@pytest.mark.parametrize("case", BATCH_CASES, ids=case_id)
def test_equal_weights_change_nothing_and_zero_weight_masks(case):
    operands, term = case.operands(batch=7), case.build()
    assert_close(term(**operands, weight=torch.full((7,), 3.0)), term(**operands))
    assert_close(term(**operands, weight=MASK.double()), term(**operands, mask=MASK))
    assert not torch.allclose(term(**operands, weight=torch.arange(1.0, 8.0)), term(**operands))


@every_term
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_operands_give_a_float32_loss(case, dtype):
    half = case.operands(dtype=dtype)
    exact = {name: value.detach().float() if value.dtype == dtype else value for name, value in half.items()}
    loss = case.build()(**half)
    assert loss.dtype == torch.float32
    assert_close(loss, case.build()(**exact))
    loss.sum().backward()
    assert half["student"].grad.dtype == dtype
    assert half["student"].grad.isfinite().all()


@every_term
def test_autocast_changes_nothing(case):
    operands = case.operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(**operands)
    assert torch.equal(loss, case.loss(**operands))


SHARES = ("label_smoothing", "alpha of self_target")
GRADIENT_ONLY = {("ctkd", "reverse")}  # its own test shows what it does
SCHEDULED = [
    (case, parameter.name)
    for case in one_per_term(CASES)
    for parameter in case.entry.parameters.values()
    if parameter.schedulable and (case.term, parameter.name) not in GRADIENT_ONLY
]


@pytest.mark.parametrize(("case", "name"), SCHEDULED, ids=case_id)
@pytest.mark.parametrize("value", [0.7, 2.5])
def test_a_scheduled_parameter_in_a_tensor_equals_the_number(case, name, value):
    value = value / 3 if name in SHARES or f"{name} of {case.term}" in SHARES else value
    operands = case.operands(dtype=torch.float32)
    term, moved = case.build(**{name: value}), case.build(**{name: torch.tensor(value)})
    assert_close(moved(**operands), term(**operands))
    setattr(moved, name, torch.tensor(value + 0.1))  # how the runner moves it
    assert not torch.allclose(moved(**operands), term(**operands))


def with_mask(case: Case, operands):
    rows = len(operands["student"])
    return {**operands, "mask": MASK[:rows], "weight": torch.ones(rows)} if case.batch_space else operands


@every_term
def test_compiles_whole_to_the_same_numbers(case):
    torch._dynamo.reset()
    operands = with_mask(case, case.operands(dtype=torch.float32))
    params = {p.name: torch.tensor(0.3) for p in case.entry.parameters.values() if p.schedulable}
    compiled = torch.compile(case.build(**params), fullgraph=True, backend="aot_eager", dynamic=False)
    loss, expected = compiled(**operands), case.build(**params)(**operands)
    assert_close(loss, expected)
    gradients = [torch.autograd.grad(value.sum(), operands["student"])[0] for value in (loss, expected)]
    assert_close(*gradients)


@every_case
def test_neither_forward_nor_backward_reads_a_tensor_on_the_host(case):
    operands = with_mask(case, case.operands(dtype=torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(value) for name, value in operands.items()}
        loss = case.build()(**fake)
        loss.sum().backward()
    assert loss.shape == (() if case.batch_space else (len(operands["student"]),))
    assert fake["student"].grad.shape == operands["student"].shape


@every_term
def test_runs_on_the_meta_device(case):
    operands = {name: value.detach().to("meta") for name, value in with_mask(case, case.operands()).items()}
    assert case.build().to("meta")(**operands).device.type == "meta"
