"""Contrastive distillation with its banks, which stands outside the shared cases, and InfoNCE."""

import math

import pytest
import torch
from torch import Size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.term_reference import numerical_gradient
from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.contrastive import hash_words, info_nce_loss, nce_loss, sample_negatives

SAMPLES, NEGATIVES = 12, 7
LABELS = torch.tensor([0, 1, 2] * 4)


def build(samples=SAMPLES, **params):
    torch.manual_seed(0)
    params = {"width": 3, "negatives": NEGATIVES, "temperature": 0.5, **params}
    return TERMS.build("crd", params, samples=samples, shapes={"student": (4,), "teacher": (2, 3)})


def batch(index=(3, 0, 7, 10), dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(index)
    student = torch.randn(len(index), 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(len(index), 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return {"student": student, "teacher": teacher, "index": index, "label": LABELS[index]}


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def embedded(layer, vector):
    rows = layer.weight.tolist()
    mapped = [sum(w * x for w, x in zip(row, vector, strict=True)) for row in rows]
    return unit([value + b for value, b in zip(mapped, layer.bias.tolist(), strict=True)])


def plain(term, student, teacher, chosen, before, scale=None):
    """The loss as in the authors' code: scores over a constant Z, and the two noise contrastive losses."""
    temperature, noise = term.temperature, NEGATIVES / SAMPLES
    ours = [embedded(term.embed_student, row) for row in student]
    theirs = [embedded(term.embed_teacher, [x for part in row for x in part]) for row in teacher]
    total, found = 0.0, []
    for side, (rows, bank) in enumerate(((ours, before["teacher"]), (theirs, before["student"]))):
        scores = [
            [math.exp(sum(a * b for a, b in zip(row, bank[j], strict=True)) / temperature) for j in picks]
            for row, picks in zip(rows, chosen, strict=True)
        ]
        z = sum(map(sum, scores)) / (len(scores) * len(scores[0])) * SAMPLES if scale is None else scale[side]
        found.append(z)
        for row in scores:
            total -= math.log(row[0] / z / (row[0] / z + noise + 1e-7))
            total -= sum(math.log(noise / (x / z + noise + 1e-7)) for x in row[1:])
    return total / len(student), found


def picks(term, fields):
    """The positive and the negatives of each row, for the step that comes."""
    key = hash_words(term.seed + hash_words(term.clock)) + fields["index"]
    drawn = sample_negatives(term.classes[:-1], fields["label"], key, NEGATIVES)
    return torch.cat([fields["index"].unsqueeze(1), drawn], 1).tolist()


def state(term):
    return {"student": term.bank_student.tolist(), "teacher": term.bank_teacher.tolist()}


def test_value_and_gradient_are_those_of_plain_loops_over_two_steps():
    term, scale = build().double(), None
    for step in range(2):
        fields = batch(seed=step, index=(3, 0, 7, 10) if step == 0 else (1, 3, 11, 2))
        before, chosen = state(term), picks(term, fields)
        loss = term(**fields)
        expected, found = plain(term, fields["student"].tolist(), fields["teacher"].tolist(), chosen, before, scale)
        assert_close(loss.item(), expected)
        scale = scale or found  # Z is that of the first step, and is held constant within it
        (gradient,) = torch.autograd.grad(loss, fields["student"])
        numbers = numerical_gradient(
            lambda rows: plain(term, rows, fields["teacher"].tolist(), chosen, before, scale)[0],  # noqa: B023
            fields["student"].detach(),
        )
        assert_close(gradient, numbers, rtol=1e-5, atol=1e-8)
    assert_close(term.scale, torch.tensor(scale, dtype=torch.float64))


def test_the_banks_move_by_the_momentum_and_only_where_a_sample_was_seen():
    term, fields = build(momentum=0.25).double(), batch()
    before = term.bank_student.clone()
    term(**fields)
    seen = fields["index"]
    rows = torch.nn.functional.normalize(term.embed_student(fields["student"]), dim=1)
    expected = torch.nn.functional.normalize(0.25 * before[seen] + 0.75 * rows, dim=1)
    assert_close(term.bank_student[seen], expected.detach())
    others = torch.tensor([i for i in range(SAMPLES) if i not in seen.tolist()])
    assert torch.equal(term.bank_student[others], before[others])
    assert torch.equal(term.classes[seen], LABELS[seen])
    assert (term.classes[others] == -1).all()
    term.eval()
    kept = {name: value.clone() for name, value in term.state_dict().items()}
    term(**batch(seed=3))
    assert all(torch.equal(value, kept[name]) for name, value in term.state_dict().items())


def test_the_state_is_in_the_checkpoint_and_resumes_to_the_same_numbers():
    whole, cut = build().double(), build().double()
    for seed in range(3):
        whole(**batch(seed=seed))
        cut(**batch(seed=seed))
    resumed = build(samples=SAMPLES).double()
    torch.nn.init.zeros_(resumed.bank_student)
    resumed.load_state_dict(cut.state_dict())
    for seed in range(3, 6):
        assert torch.equal(whole(**batch(seed=seed)), resumed(**batch(seed=seed)))


def test_negatives_are_of_other_classes_even_and_new_at_each_step():
    own = torch.tensor([0, 1, 2, 0])
    drawn = sample_negatives(LABELS, own, torch.arange(4), 30000)
    assert (LABELS[drawn] != own.unsqueeze(1)).all()
    counts = torch.bincount(drawn[0], minlength=SAMPLES)
    allowed = counts[LABELS != 0]
    assert (allowed - 30000 / 8).abs().max() < 5 * math.sqrt(30000 / 8)  # five deviations of a fair draw
    assert not torch.equal(drawn[0], drawn[3])  # one class, other keys
    assert torch.equal(sample_negatives(LABELS, own[:1], torch.arange(1), 9), drawn[:1, :9])
    term = build()
    first = picks(term, batch())
    term(**batch(dtype=torch.float32))
    assert picks(term, batch()) != first


def test_a_batch_of_one_class_only_draws_from_all():
    drawn = sample_negatives(torch.zeros(5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.arange(2), 64)
    assert set(drawn.flatten().tolist()) == set(range(5))


def test_without_labels_only_the_sample_itself_is_no_negative():
    fields = batch()
    del fields["label"]
    term = build(negatives=4000).double()
    for seed in range(4):  # all samples are seen
        index = tuple(range(SAMPLES))
        given = {**batch(index=index, seed=seed)}
        del given["label"]
        term(**given)
    own = term.classes[fields["index"]]
    drawn = sample_negatives(term.classes[:-1], own, fields["index"], 4000)
    for row, index in zip(drawn.tolist(), fields["index"].tolist(), strict=True):
        assert set(row) == set(range(SAMPLES)) - {index}


def test_masked_rows_count_nowhere_and_enter_no_bank():
    whole, rest = batch(index=(3, 0, 7, 3)), batch(index=(3, 0, 7))
    keep = torch.tensor([True, True, True, False])
    student, teacher = whole["student"].detach().clone(), whole["teacher"].clone()
    student[:3], teacher[:3] = rest["student"].detach(), rest["teacher"]
    student[3], teacher[3] = float("nan"), float("nan")
    whole |= {"student": student.requires_grad_(), "teacher": teacher, "mask": keep}
    masked, plain_term = build().double(), build().double()
    for _ in range(2):
        loss, expected = masked(**whole), plain_term(**rest)
        assert_close(loss, expected)
        ours, theirs = (torch.autograd.grad(v, f["student"])[0] for v, f in ((loss, whole), (expected, rest)))
        assert_close(ours[:3], theirs)
        assert ours[3].abs().sum() == 0
    assert_close(masked.bank_student[:-1], plain_term.bank_student[:-1])
    loss = masked(**{**whole, "mask": torch.zeros(4, dtype=torch.bool)})
    assert loss == 0


def test_weights_are_relative_and_a_row_of_weight_zero_counts_as_masked():
    term, fields = build().double().eval(), batch()
    assert_close(term(**fields, weight=torch.full((4,), 3.0)), term(**fields))
    keep = torch.tensor([True, False, True, True])
    term.scale.copy_(torch.tensor([20.0, 20.0]))
    assert_close(term(**fields, weight=keep.double()), term(**fields, mask=keep))
    assert not torch.allclose(term(**fields, weight=torch.arange(1.0, 5.0)), term(**fields))


def test_trained_by_the_term_a_student_agrees_with_its_teacher_on_each_sample_and_with_idle_banks_less():
    """Retrieval: the student's nearest teacher embedding is that of its own sample. Control: banks that never move."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=generator)
    student, teacher = hidden @ torch.randn(4, 4, generator=generator), hidden @ torch.randn(4, 6, generator=generator)
    teacher, index = teacher.view(64, 2, 3), torch.arange(64)

    def accuracy(momentum):
        term = build(samples=64, width=8, negatives=32, temperature=0.1, momentum=momentum)
        optimizer = torch.optim.Adam(term.parameters(), lr=0.01)
        for _ in range(200):
            loss = term(student, teacher, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ours = torch.nn.functional.normalize(term.embed_student(student), dim=1)
        theirs = torch.nn.functional.normalize(term.embed_teacher(teacher.flatten(1)), dim=1)
        return ((ours @ theirs.t()).argmax(1) == index).float().mean().item()

    assert accuracy(0.5) > 0.5
    assert accuracy(1.0) < 0.25


def test_neither_forward_nor_backward_reads_a_tensor_on_the_host():
    given = batch(dtype=torch.float32)
    with FakeTensorMode() as mode:
        fields = {name: mode.from_tensor(value) for name, value in given.items()}
        loss = build()(**fields, mask=torch.ones(4, dtype=torch.bool))
        loss.backward()
    assert loss.shape == ()
    assert fields["student"].grad.shape == (4, 4)
    given = {name: value.detach().to("meta") for name, value in batch(dtype=torch.float32).items()}
    assert build().to("meta")(**given).device.type == "meta"


def test_compiles_whole_to_the_same_numbers():
    torch._dynamo.reset()
    plain_term, term = build(), build()
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(2):
        fields = batch(dtype=torch.float32, seed=seed)
        loss, expected = compiled(**fields), plain_term(**fields)
        assert_close(loss, expected)
        assert_close(*(torch.autograd.grad(value, fields["student"])[0] for value in (loss, expected)))
    assert_close(term.state_dict(), plain_term.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_change_nothing(dtype):
    fields = batch(dtype=dtype)
    exact = {**fields, "student": fields["student"].detach().float(), "teacher": fields["teacher"].float()}
    expected = build()(**exact)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(build()(**fields), expected)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": 0.0}, "crd: temperature must be above 0"),
        ({"momentum": 1.5}, r"crd: momentum must be in \[0, 1\]"),
        ({"negatives": 0}, "width and negatives must be at least 1"),
        ({"samples": 0}, "at least two samples"),
    ],
)
def test_mistakes_are_refused_in_words(params, words):
    with pytest.raises(ConfigError, match=words):
        build(**params)


def test_info_nce_sees_direction_only_and_is_log_of_the_batch_when_all_are_alike():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    scales = torch.linspace(0.1, 9, 6).unsqueeze(1)
    assert_close(info_nce_loss(scales * student, teacher), info_nce_loss(student, teacher))
    assert_close(info_nce_loss(torch.ones(6, 5), torch.ones(6, 5)), torch.tensor(math.log(6)))
    assert info_nce_loss(teacher, teacher) < info_nce_loss(teacher.roll(1, 0), teacher)


def test_info_nce_of_features_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="5 elements and the teacher's 6"):
        TERMS.build("info_nce", {}).check_shapes(student=Size((2, 5)), teacher=Size((2, 2, 3)))


class Largest(TorchDispatchMode):
    """The largest tensor of at least three dimensions, and the largest at all, that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = {False: 0, True: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, torch.Tensor):
                for deep in {False, value.dim() > 2}:
                    self.elements[deep] = max(self.elements[deep], value.numel())
        return out


def largest(work):
    with Largest() as seen:
        work()
    return seen.elements


BATCH, WIDTH, MANY = 8, 32, 512


def many_negatives():
    torch.manual_seed(0)
    shapes = {"student": (4,), "teacher": (4,)}
    term = TERMS.build("crd", {"width": WIDTH, "negatives": MANY}, samples=1000, shapes=shapes)
    fields = {"index": torch.arange(BATCH) * 3, "label": torch.arange(BATCH) % 3}
    return term, {"student": torch.randn(BATCH, 4).requires_grad_(), "teacher": torch.randn(BATCH, 4), **fields}


def test_no_vectors_of_the_bank_are_gathered_for_each_row():
    """One product with the bank and a gather of numbers: nothing is as large as rows * negatives * width."""
    term, fields = many_negatives()
    seen = largest(lambda: term(**fields).backward())
    assert seen[True] == 0, "no tensor has three dimensions"
    assert seen[False] <= 1001 * WIDTH < BATCH * MANY * WIDTH / 4


def test_a_gather_of_vectors_would_be_noticed(monkeypatch):
    """Negative control: the same loss, to rounding, by the vectors of every row's samples."""

    def gathered(self, rows, bank, chosen, counts, side):
        scores = (torch.einsum("bd,bkd->bk", rows, bank.clone()[chosen]) / self.temperature).exp()
        self.scale[side] = self.samples * scores.detach().mean()
        return nce_loss(scores / self.scale[side].clone(), self.samples)

    term, fields = many_negatives()
    expected = term(**fields)
    other, _ = many_negatives()
    monkeypatch.setattr(type(other), "_side_loss", gathered)
    assert_close(other(**fields), expected)
    other, _ = many_negatives()
    seen = largest(lambda: other(**fields).backward())
    assert seen[True] >= BATCH * MANY * WIDTH
