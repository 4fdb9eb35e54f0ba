"""Terms that remember: what they read is of the visit before, also after a resume, and of no masked row."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers.logit_reference import self_target as plain
from helpers.term_inputs import build_term, run_without_values
from helpers.term_reference import kd, numerical_gradient
from kdbench.errors import ConfigError

CLASSES, SAMPLES = 4, 12
FACTS = {"samples": SAMPLES, "num_classes": CLASSES}


def batch(seed, index, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(len(index), CLASSES, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    label = torch.randint(CLASSES, (len(index),), generator=generator)
    return {"student": student.requires_grad_(), "label": label, "index": torch.tensor(index)}


def self_target(alpha=0.6):
    return build_term("self_target", {"alpha": alpha}, **FACTS).double()


def epochs(made):
    """Two epochs over the same samples in another order, with other predictions; the second one's batch."""
    made(**batch(0, [3, 5, 7]))
    made(**batch(1, [0, 1, 2]))
    return batch(2, [5, 0, 9])


def before():
    first, second = batch(0, [3, 5, 7])["student"].softmax(1), batch(1, [0, 1, 2])["student"].softmax(1)
    return {5: first[1].tolist(), 0: second[0].tolist()}


def test_the_second_epoch_is_taught_by_the_predictions_of_the_first():
    made = self_target()
    now = epochs(made)
    loss = made(**now)
    fields = {"label": now["label"].tolist(), "index": now["index"].tolist(), "alpha": 0.6, "before": before()}
    assert_close(loss, torch.tensor(plain(now["student"].tolist(), **fields), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), now["student"])
    assert_close(gradient, numerical_gradient(lambda s: sum(plain(s, **fields)), now["student"].detach()))


def test_a_control_without_the_memory_is_plain_cross_entropy():
    made = self_target(alpha=0.0)
    now = epochs(made)
    assert_close(made(**now), F.cross_entropy(now["student"], now["label"], reduction="none"))
    remembering = self_target()
    remembering_now = epochs(remembering)
    assert not torch.allclose(remembering(**remembering_now)[:2], made(**now)[:2])


def test_a_sample_never_seen_has_its_label():
    made = self_target()
    now = epochs(made)
    assert_close(made(**now)[2], F.cross_entropy(now["student"], now["label"], reduction="none")[2])


def test_each_visit_replaces_the_one_before():
    made = self_target(alpha=1.0)
    for seed in (0, 1):
        last = batch(seed, [4, 6])
        made(**last)
    now = batch(2, [4, 6])
    expected = -(last["student"].softmax(1) * now["student"].log_softmax(1)).sum(1)
    assert_close(made(**now), expected)


@pytest.mark.parametrize("name", ["self_target", "last_batch", "temporal_ensemble"])
def test_the_memory_is_in_the_state_and_a_resume_goes_on_with_it(name):
    def made():
        return build_term(name, **FACTS).double()

    def step(module, fields):
        return module(**{k: v for k, v in fields.items() if k != "label" or name == "self_target"})

    whole, resumed = made(), made()
    step(whole, batch(0, [3, 5, 7]))
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(step(resumed, batch(1, [5, 3, 1])), step(whole, batch(1, [5, 3, 1])))
    assert not torch.allclose(step(made(), batch(1, [5, 3, 1])), step(resumed, batch(2, [5, 3, 1])))


@pytest.mark.parametrize("name", ["self_target", "last_batch", "temporal_ensemble"])
def test_a_padded_row_leaves_the_memory_of_the_sample_whose_index_it_repeats(name):
    made = build_term(name, **FACTS).double()
    first = batch(0, [3, 5, 3])
    first["student"] = first["student"].detach()
    first["student"][2] = float("nan")
    fields = first if name == "self_target" else {k: v for k, v in first.items() if k != "label"}
    made(**fields, mask=torch.tensor([True, True, False]))
    kept = made.bank.values[torch.tensor([3, 5])]
    shown = first["student"][:2]
    if name == "temporal_ensemble":
        assert_close(kept, 0.4 * torch.cat([shown.softmax(1), torch.ones(2, 1).double()], 1))
    else:
        assert_close(kept, shown.softmax(1) if name == "self_target" else shown)


def test_hidden_labels_give_zero_and_are_not_remembered():
    made = self_target(alpha=1.0)
    hidden = {**batch(0, [1, 2]), "label": torch.tensor([-100, 3])}
    loss = made(**hidden)
    assert loss[0] == 0 and loss[1] > 0
    assert made.bank.when[1] == -1 and made.bank.when[2] == 1


def last_batch(temperature=2.0):
    return build_term("last_batch", {"temperature": temperature}, **FACTS).double()


def logits_and_index(seed, index):
    return {k: v for k, v in batch(seed, index).items() if k != "label"}


def test_last_batch_compares_the_repeated_half_with_the_step_before_only():
    made = last_batch()
    assert (made(**logits_and_index(0, [1, 2, 3, 4])) == 0).all()
    old, now = logits_and_index(0, [1, 2, 3, 4]), logits_and_index(1, [3, 4, 5, 6])
    loss = made(**now)
    expected = kd(now["student"][:2].tolist(), old["student"][2:].tolist(), 2.0)
    assert_close(loss, torch.tensor([*expected, 0, 0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), now["student"])
    assert (gradient[:2] != 0).any(1).all() and (gradient[2:] == 0).all()
    assert (made(**logits_and_index(2, [1, 2, 7, 8])) == 0).all(), "seen two steps ago is not the last batch"


def test_without_an_overlap_there_is_nothing_to_learn():
    made = last_batch()
    for seed, index in enumerate(([0, 1], [2, 3], [0, 1])):
        assert (made(**logits_and_index(seed, index)) == 0).all()


@pytest.mark.parametrize("name", ["self_target", "last_batch", "temporal_ensemble"])
def test_neither_reads_a_tensor_on_the_host_and_half_precision_gives_float32(name):
    fields = batch(0, [1, 2, 3], torch.bfloat16)
    fields = fields if name == "self_target" else {k: v for k, v in fields.items() if k != "label"}
    assert run_without_values(lambda: build_term(name, **FACTS), fields).shape == (3,)
    made = build_term(name, **FACTS)
    made(**fields)
    loss = made(**fields)
    assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_other_classes_than_the_data_has_are_refused():
    with pytest.raises(ValueError, match="4 classes of the data, but the student's operand has 5"):
        self_target().check_shapes(student=torch.Size((2, 5)))
    with pytest.raises(ConfigError, match=r"alpha must be in \[0, 1\]"):
        self_target(alpha=1.5)
    with pytest.raises(ValueError, match="no better than chance over 2 classes"):
        build_term("tf_kd", {"correct": 0.5}).check_shapes(student=torch.Size((8, 2)))


def test_the_virtual_teacher_is_right_and_soft():
    """The gradient is p - u, and u is larger at the label by exp((correct - rest) / T)."""
    student = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    loss = build_term("tf_kd")(student, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    virtual = (student.softmax(1) - gradient)[0]
    assert_close(virtual[2] / virtual[0], torch.tensor(math.exp((0.99 - 0.0025) / 20), dtype=torch.float64))


# Temporal ensembling


def ensemble(momentum=0.7):
    return build_term("temporal_ensemble", {"momentum": momentum}, **FACTS).double()


def after_three_visits(made):
    """Three visits of sample 3, and of 8 the last two; the loss of both then, and what was said before."""
    said = {3: [], 8: []}
    for seed, index in enumerate(([3, 1], [8, 3], [3, 8])):
        now = logits_and_index(seed, index)
        made(**now)
        for row, sample in enumerate(index):
            if sample in said:
                said[sample].append(now["student"][row].softmax(0).detach())
    now = logits_and_index(7, [8, 3])
    return made(**now), now["student"], said


def test_the_target_is_the_unbiased_running_mean_of_all_earlier_predictions():
    loss, student, said = after_three_visits(ensemble())
    expected = []
    for row, sample in enumerate((8, 3)):
        weights = [0.7 ** (len(said[sample]) - 1 - visit) for visit in range(len(said[sample]))]
        mean = sum(w * p for w, p in zip(weights, said[sample], strict=True)) / sum(weights)
        expected.append((student[row].softmax(0) - mean).square().mean())
    assert_close(loss, torch.stack(expected))
    (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(sum(expected), student)[0])
    last_alone, _, _ = after_three_visits(ensemble(momentum=0.0))  # control: only the last epoch
    assert (last_alone - loss).abs().min() > 1e-4


def test_at_the_first_visit_there_is_nothing_to_agree_with():
    made = ensemble()
    assert_close(made(**logits_and_index(0, [2, 5])), torch.zeros(2, dtype=torch.float64))


def test_a_momentum_that_forgets_nothing_and_other_classes_are_refused():
    with pytest.raises(ConfigError, match="momentum must be below 1"):
        ensemble(momentum=1.0)
    with pytest.raises(ValueError, match="over the 4 classes of the data, but the student's operand has 3"):
        ensemble().check_shapes(student=torch.Size((2, 3)))
