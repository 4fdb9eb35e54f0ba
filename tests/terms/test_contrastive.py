"""Contrastive representation distillation with its banks, the draw of negatives, and InfoNCE."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cases.loops import dot, flatten, numerical_gradient, unit
from kdbench.registry import TERMS
from kdbench.terms.contrastive import hash_words, info_nce_loss, nce_loss, sample_negatives

SAMPLES, NEGATIVES = 12, 7
LABELS = torch.tensor([0, 1, 2] * 4)


def build_crd(samples=SAMPLES, **params):
    torch.manual_seed(0)
    params = {"width": 3, "negatives": NEGATIVES, "temperature": 0.5, **params}
    return TERMS.build("crd", params, samples=samples, shapes={"student": (4,), "teacher": (2, 3)})


def batch(index=(3, 0, 7, 10), dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(index)
    student = torch.randn(len(index), 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(len(index), 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return {"student": student, "teacher": teacher, "index": index, "label": LABELS[index]}


def embed(layer, vector):
    mapped = [dot(row, vector) for row in layer.weight.tolist()]
    return unit([value + bias for value, bias in zip(mapped, layer.bias.tolist(), strict=True)])


def reference_loss(term, student, teacher, candidates, banks, scale=None):
    """Follows the authors' code: scores over a constant Z, and the two noise contrastive losses. Returns loss and Z."""
    temperature, noise = term.temperature, NEGATIVES / SAMPLES
    student_rows = [embed(term.embed_student, row) for row in student]
    teacher_rows = [embed(term.embed_teacher, flatten(row)) for row in teacher]
    total, scales = 0.0, []
    for side, (rows, bank) in enumerate(((student_rows, banks["teacher"]), (teacher_rows, banks["student"]))):
        scores = [
            [math.exp(dot(row, bank[j]) / temperature) for j in row_candidates]
            for row, row_candidates in zip(rows, candidates, strict=True)
        ]
        z = sum(map(sum, scores)) / (len(scores) * len(scores[0])) * SAMPLES if scale is None else scale[side]
        scales.append(z)
        for row in scores:
            total -= math.log(row[0] / z / (row[0] / z + noise + 1e-7))
            total -= sum(math.log(noise / (x / z + noise + 1e-7)) for x in row[1:])
    return total / len(student), scales


def next_candidates(term, operands):
    """Returns the positive and the negatives of each row in the next step."""
    key = hash_words(term.seed + hash_words(term.num_steps)) + operands["index"]
    negatives = sample_negatives(term.sample_class[:-1], operands["label"], key, NEGATIVES)
    return torch.cat([operands["index"].unsqueeze(1), negatives], 1).tolist()


def test_scale_of_the_first_step_is_kept_in_later_steps():
    term, scale = build_crd().double(), None
    for step in range(2):
        operands = batch(seed=step, index=(3, 0, 7, 10) if step == 0 else (1, 3, 11, 2))
        banks = {"student": term.bank_student.tolist(), "teacher": term.bank_teacher.tolist()}
        candidates, teacher = next_candidates(term, operands), operands["teacher"].tolist()
        loss = term(**operands)
        expected, scales = reference_loss(term, operands["student"].tolist(), teacher, candidates, banks, scale)
        assert_close(loss.item(), expected)
        scale = scale or scales  # constant also within the first step
        (gradient,) = torch.autograd.grad(loss, operands["student"])

        def loss_of(rows, step_state=(teacher, candidates, banks, scale)):
            return reference_loss(term, rows, *step_state)[0]

        expected_gradient = numerical_gradient(loss_of, operands["student"].detach())
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    assert_close(term.scale, torch.tensor(scale, dtype=torch.float64))


def test_banks_are_updated_with_momentum_and_only_for_the_samples_of_the_batch():
    term, operands = build_crd(momentum=0.25).double(), batch()
    before = term.bank_student.clone()
    term(**operands)
    index = operands["index"]
    rows = torch.nn.functional.normalize(term.embed_student(operands["student"]), dim=1)
    expected = torch.nn.functional.normalize(0.25 * before[index] + 0.75 * rows, dim=1)
    assert_close(term.bank_student[index], expected.detach())
    rest = torch.tensor([i for i in range(SAMPLES) if i not in index.tolist()])
    assert torch.equal(term.bank_student[rest], before[rest])
    assert torch.equal(term.sample_class[index], LABELS[index])
    assert (term.sample_class[rest] == -1).all()


def test_evaluation_does_not_change_the_state():
    term = build_crd().double()
    term(**batch())
    term.eval()
    state = {name: value.clone() for name, value in term.state_dict().items()}
    term(**batch(seed=3))
    assert all(torch.equal(value, state[name]) for name, value in term.state_dict().items())


def test_state_in_the_checkpoint_resumes_to_the_same_numbers():
    continued, stopped = build_crd().double(), build_crd().double()
    for seed in range(3):
        continued(**batch(seed=seed))
        stopped(**batch(seed=seed))
    resumed = build_crd(samples=SAMPLES).double()
    torch.nn.init.zeros_(resumed.bank_student)
    resumed.load_state_dict(stopped.state_dict())
    for seed in range(3, 6):
        assert torch.equal(continued(**batch(seed=seed)), resumed(**batch(seed=seed)))


def test_negatives_are_of_different_classes_uniform_and_new_in_every_step():
    row_class = torch.tensor([0, 1, 2, 0])
    negatives = sample_negatives(LABELS, row_class, torch.arange(4), 30000)
    assert (LABELS[negatives] != row_class.unsqueeze(1)).all()
    counts = torch.bincount(negatives[0], minlength=SAMPLES)[LABELS != 0]
    assert (counts - 30000 / 8).abs().max() < 5 * math.sqrt(30000 / 8)  # five deviations of a fair draw
    assert not torch.equal(negatives[0], negatives[3])  # same class, different keys
    assert torch.equal(sample_negatives(LABELS, row_class[:1], torch.arange(1), 9), negatives[:1, :9])
    term = build_crd()
    first_step = next_candidates(term, batch())
    term(**batch(dtype=torch.float32))
    assert next_candidates(term, batch()) != first_step


def test_source_of_one_class_draws_negatives_from_all_samples():
    zeros = torch.zeros(5, dtype=torch.int64)
    assert set(sample_negatives(zeros, zeros[:2], torch.arange(2), 64).flatten().tolist()) == set(range(5))


def test_without_labels_only_the_sample_itself_is_excluded_from_its_negatives():
    operands = batch()
    term = build_crd(negatives=4000).double()
    for seed in range(4):  # every sample is visited
        step = batch(index=tuple(range(SAMPLES)), seed=seed)
        del step["label"]
        term(**step)
    row_class = term.sample_class[operands["index"]]
    negatives = sample_negatives(term.sample_class[:-1], row_class, operands["index"], 4000)
    for row, index in zip(negatives.tolist(), operands["index"].tolist(), strict=True):
        assert set(row) == set(range(SAMPLES)) - {index}


def test_masked_rows_enter_no_bank_and_change_no_later_loss():
    padded, unpadded = batch(index=(3, 0, 7, 3)), batch(index=(3, 0, 7))
    valid = torch.tensor([True, True, True, False])
    student, teacher = padded["student"].detach().clone(), padded["teacher"].clone()
    student[:3], teacher[:3] = unpadded["student"].detach(), unpadded["teacher"]
    student[3], teacher[3] = float("nan"), float("nan")
    padded |= {"student": student.requires_grad_(), "teacher": teacher, "mask": valid}
    padded_term, unpadded_term = build_crd().double(), build_crd().double()
    for _ in range(2):
        loss, expected = padded_term(**padded), unpadded_term(**unpadded)
        assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, padded["student"])
        assert_close(gradient[:3], torch.autograd.grad(expected, unpadded["student"])[0])
        assert gradient[3].abs().sum() == 0
    assert_close(padded_term.bank_student[:-1], unpadded_term.bank_student[:-1])
    assert padded_term(**{**padded, "mask": torch.zeros(4, dtype=torch.bool)}) == 0


def test_student_trained_by_crd_retrieves_its_teacher_feature_and_less_with_constant_banks():
    """Retrieval: the nearest teacher embedding is that of the same sample. Control: momentum 1 keeps the banks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=generator)
    student, teacher = hidden @ torch.randn(4, 4, generator=generator), hidden @ torch.randn(4, 6, generator=generator)
    teacher, index = teacher.view(64, 2, 3), torch.arange(64)

    def accuracy(momentum):
        term = build_crd(samples=64, width=8, negatives=32, temperature=0.1, momentum=momentum)
        optimizer = torch.optim.Adam(term.parameters(), lr=0.01)
        for _ in range(200):
            loss = term(student, teacher, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        student_rows = torch.nn.functional.normalize(term.embed_student(student), dim=1)
        teacher_rows = torch.nn.functional.normalize(term.embed_teacher(teacher.flatten(1)), dim=1)
        return ((student_rows @ teacher_rows.t()).argmax(1) == index).float().mean().item()

    assert accuracy(0.5) > 0.5
    assert accuracy(1.0) < 0.25


def test_compiled_steps_update_the_state_equally():
    torch._dynamo.reset()
    eager, term = build_crd(), build_crd()
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(2):
        operands = batch(dtype=torch.float32, seed=seed)
        loss, expected = compiled(**operands), eager(**operands)
        assert_close(loss, expected)
        assert_close(*(torch.autograd.grad(value, operands["student"])[0] for value in (loss, expected)))
    assert_close(term.state_dict(), eager.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_operands_under_autocast_give_the_float32_loss(dtype):
    operands = batch(dtype=dtype)
    single = {**operands, "student": operands["student"].detach().float(), "teacher": operands["teacher"].float()}
    expected = build_crd()(**single)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(build_crd()(**operands), expected)


def test_info_nce_depends_on_direction_only_and_is_log_batch_for_equal_features():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    scales = torch.linspace(0.1, 9, 6).unsqueeze(1)
    assert_close(info_nce_loss(scales * student, teacher), info_nce_loss(student, teacher))
    assert_close(info_nce_loss(torch.ones(6, 5), torch.ones(6, 5)), torch.tensor(math.log(6)))
    assert info_nce_loss(teacher, teacher) < info_nce_loss(teacher.roll(1, 0), teacher)


class LargestTensor(TorchDispatchMode):
    """Records the largest result of any operation, and the largest one with at least three dimensions."""

    def __init__(self):
        super().__init__()
        self.elements = {"any": 0, "three dimensions": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements["any"] = max(self.elements["any"], value.numel())
                if value.dim() > 2:
                    self.elements["three dimensions"] = max(self.elements["three dimensions"], value.numel())
        return result


def largest_elements(work):
    with LargestTensor() as record:
        work()
    return record.elements


BATCH, WIDTH, MANY = 8, 32, 512


def crd_with_many_negatives():
    torch.manual_seed(0)
    shapes = {"student": (4,), "teacher": (4,)}
    term = TERMS.build("crd", {"width": WIDTH, "negatives": MANY}, samples=1000, shapes=shapes)
    fields = {"index": torch.arange(BATCH) * 3, "label": torch.arange(BATCH) % 3}
    return term, {"student": torch.randn(BATCH, 4).requires_grad_(), "teacher": torch.randn(BATCH, 4), **fields}


def test_no_bank_vectors_are_gathered_for_each_row():
    """One product with the bank and a gather of numbers: nothing is as large as rows * negatives * width."""
    term, operands = crd_with_many_negatives()
    elements = largest_elements(lambda: term(**operands).backward())
    assert elements["three dimensions"] == 0
    assert elements["any"] <= 1001 * WIDTH < BATCH * MANY * WIDTH / 4


def test_gathered_bank_vectors_are_detected(monkeypatch):
    """Control: the same loss, to rounding, by the vectors of every row's candidates."""

    def gathered_loss(self, rows, bank, candidates, weights, side):
        scores = (torch.einsum("bd,bkd->bk", rows, bank.clone()[candidates]) / self.temperature).exp()
        self.scale[side] = self.samples * scores.detach().mean()
        return nce_loss(scores / self.scale[side].clone(), self.samples)

    term, operands = crd_with_many_negatives()
    expected = term(**operands)
    monkeypatch.setattr(type(term), "_side_loss", gathered_loss)
    assert_close(crd_with_many_negatives()[0](**operands), expected)
    term, _ = crd_with_many_negatives()
    elements = largest_elements(lambda: term(**operands).backward())
    assert elements["three dimensions"] >= BATCH * MANY * WIDTH
