"""The model `fusion_gate` (TGeo-KD): its MLP input, class means and gradients."""

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


def random_batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    return student, teacher, torch.arange(count) % 3  # class 3 does not occur


def mlp_inputs(student: Tensor, teacher: Tensor, label: Tensor, means: Tensor) -> list[list[float]]:
    """Computes the MLP input row by row in plain Python."""
    rows = []
    for s, t, y in zip(student.softmax(1), teacher.softmax(1), label.tolist(), strict=True):
        g = [1.0 if k == y else 0.0 for k in range(4)]
        m = means[y].tolist() if y >= 0 else [0.0] * 4
        pairs = [(m, s), (g, s), (t, s), (t, g), (m, g)]
        squares = [float((a[k] - b[k]) ** 2) for a, b in pairs for k in range(4)]
        rows.append([*s.tolist(), *t.tolist(), *g, *m, *squares])
    return rows


def class_means(teacher: Tensor, label: Tensor) -> Tensor:
    means = torch.zeros(4, 4, dtype=torch.float64)
    for k in set(label.tolist()):
        means[k] = teacher.softmax(1)[label == k].mean(0)
    return means


def test_mlp_reads_distributions_class_mean_and_squared_differences():
    gate, (student, teacher, label) = build(), random_batch(9)
    hooked = []
    gate.net.register_forward_pre_hook(lambda _, inputs: hooked.append(inputs[0]))
    weight = gate(student, teacher, label)
    expected = torch.tensor(mlp_inputs(student, teacher, label, class_means(teacher, label)), dtype=torch.float64)
    assert_close(hooked[0], expected, rtol=1e-12, atol=1e-14)
    assert_close(weight, torch.sigmoid(gate.net(expected)), rtol=1e-12, atol=0)
    assert weight.shape == (9, 1)


def test_class_means_are_over_all_training_samples_whatever_the_batches():
    gate, (student, teacher, label) = build(), random_batch(21)
    for epoch in range(2):  # the same samples again do not change the means
        for rows in torch.arange(21).split(4 + epoch):
            gate(student[rows], teacher[rows], label[rows])
        assert_close(gate.mean, class_means(teacher, label), rtol=1e-12, atol=1e-14)
    gate.eval()(*random_batch(6, seed=1))
    assert_close(gate.mean, class_means(teacher, label), rtol=1e-12, atol=1e-14)


def test_unlabelled_samples_belong_to_no_class():
    gate, (student, teacher, label) = build(), random_batch(9)
    label[:3] = -100
    hooked = []
    gate.net.register_forward_pre_hook(lambda _, inputs: hooked.append(inputs[0]))
    gate(student, teacher, label)
    assert_close(gate.mean, class_means(teacher[3:], label[3:]))
    assert not hooked[0][:3, 8:16].any() and hooked[0][3:, 8:12].sum() == 6


def test_only_the_gate_gets_a_gradient_from_its_weight():
    gate, (student, teacher, label) = build(), random_batch(9)
    student.requires_grad_(), teacher.requires_grad_()
    loss = F.cross_entropy(student.detach(), label, reduction="none")
    (gate(student, teacher, label).squeeze(1) * loss).sum().backward()
    assert student.grad is None and teacher.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gate.parameters())


def test_invalid_inputs_and_widths_are_reported():
    with pytest.raises(ConfigError, match="fusion_gate: the first input must be logits"):
        build(input_shape=(3, 8, 8))
    with pytest.raises(ConfigError, match="fusion_gate: hidden"):
        build(hidden=())
