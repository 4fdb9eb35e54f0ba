"""The network that weighs soft against hard loss: what it reads, what it remembers, and whom it leaves alone."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from kdbench.errors import ConfigError
from kdbench.registry import MODELS


def build(**params):
    torch.manual_seed(0)
    return MODELS.build("fusion_gate", {"input_shape": (4,), **params}).double()


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, count, 4, generator=draws, dtype=torch.float64)
    return student, teacher, torch.arange(count) % 3  # class 3 never comes


def features(student: Tensor, teacher: Tensor, label: Tensor, means: Tensor) -> list[list[float]]:
    """Row by row, as plain numbers."""
    found = []
    for s, t, y in zip(student.softmax(1), teacher.softmax(1), label.tolist(), strict=True):
        g = [1.0 if k == y else 0.0 for k in range(4)]
        m = means[y].tolist() if y >= 0 else [0.0] * 4
        pairs = [(m, s), (g, s), (t, s), (t, g), (m, g)]
        squares = [float((a[k] - b[k]) ** 2) for a, b in pairs for k in range(4)]
        found.append([*s.tolist(), *t.tolist(), *g, *m, *squares])
    return found


def means_of(teacher: Tensor, label: Tensor) -> Tensor:
    found = torch.zeros(4, 4, dtype=torch.float64)
    for k in set(label.tolist()):
        found[k] = teacher.softmax(1)[label == k].mean(0)
    return found


def test_it_reads_the_triangle_the_mean_of_the_class_and_their_squared_distances():
    gate, (student, teacher, label) = build(), rows(9)
    seen = []
    gate.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    share = gate(student, teacher, label)
    expected = torch.tensor(features(student, teacher, label, means_of(teacher, label)), dtype=torch.float64)
    assert_close(seen[0], expected, rtol=1e-12, atol=1e-14)
    assert_close(share, torch.sigmoid(gate.net(expected)), rtol=1e-12, atol=0)
    assert share.shape == (9, 1)


def test_the_mean_of_a_class_is_over_all_samples_however_they_came_and_only_in_training():
    gate, (student, teacher, label) = build(), rows(21)
    for epoch in range(2):  # the second changes nothing: the samples are the same
        for part in torch.arange(21).split(4 + epoch):
            gate(student[part], teacher[part], label[part])
        assert_close(gate.mean, means_of(teacher, label), rtol=1e-12, atol=1e-14)
    gate.eval()(*rows(6, seed=1))
    assert_close(gate.mean, means_of(teacher, label), rtol=1e-12, atol=1e-14)


def test_a_hidden_label_is_no_class():
    gate, (student, teacher, label) = build(), rows(9)
    label[:3] = -100
    seen = []
    gate.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gate(student, teacher, label)
    assert_close(gate.mean, means_of(teacher[3:], label[3:]))
    assert not seen[0][:3, 8:16].any() and seen[0][3:, 8:12].sum() == 6


def test_nobody_lowers_a_loss_by_the_share_but_the_gate():
    gate, (student, teacher, label) = build(), rows(9)
    student.requires_grad_(), teacher.requires_grad_()
    (
        gate(student, teacher, label).squeeze(1) * F.cross_entropy(student.detach(), label, reduction="none")
    ).sum().backward()
    assert student.grad is None and teacher.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gate.parameters())


def test_what_it_cannot_read_is_refused():
    with pytest.raises(ConfigError, match="fusion_gate: reads logits"):
        build(input_shape=(3, 8, 8))
    with pytest.raises(ConfigError, match="fusion_gate: hidden"):
        build(hidden=())
