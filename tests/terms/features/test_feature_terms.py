"""Properties of single terms on features, tokens and auxiliary heads, beyond those of every term."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdbench.registry import TERMS
from kdbench.terms.distribution import nst_loss
from kdbench.terms.features.heads import dhkd_loss, ofa_loss
from kdbench.terms.features.maps import ab_loss, ft_loss, hcl_loss
from kdbench.terms.features.summaries import fsp_loss, fsp_matrix
from kdbench.terms.features.vectors import cosine_loss, feature_distance_loss, nd_loss
from kdbench.terms.relations import attention_relation_loss, cc_loss, token_relation_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 4, 6, 6, dtype=torch.float64)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)


def shuffle_positions(feature):
    order = torch.randperm(36)
    return feature.flatten(2)[:, :, order].view_as(feature)


def test_fsp_matrix_is_linear_in_each_end_and_invariant_to_a_common_order_of_positions(maps):
    first, second = maps
    assert_close(fsp_matrix(3 * first, second), 3 * fsp_matrix(first, second))
    assert_close(fsp_matrix(first, second), fsp_matrix(second, first).transpose(1, 2))
    both = shuffle_positions(torch.cat(maps, 1))
    assert_close(fsp_matrix(both[:, :4], both[:, 4:]), fsp_matrix(first, second))
    assert (fsp_loss(second, second, first, first.flip(3)) > 1e-4).all()  # a change of one end alone matters


def test_ab_reads_only_the_sign_of_the_teacher_and_is_zero_beyond_the_margin():
    student, teacher = torch.randn(2, 4, 9)
    assert_close(ab_loss(student, 7 * teacher), ab_loss(student, teacher))
    beyond_margin = teacher.sign() * (1 + torch.rand(4, 9))
    assert (ab_loss(beyond_margin, teacher) == 0).all()
    assert (ab_loss(-beyond_margin, teacher) > 4 * 9 - 1e-3).all()  # each neuron is at distance 2 or more
    assert (ab_loss(teacher.sign() * 0.5, teacher) > 0).all()  # the right side of zero alone is not enough


def test_ft_depends_on_direction_and_not_on_length(maps):
    student, teacher = maps
    assert_close(ft_loss(5 * student, 0.1 * teacher), ft_loss(student, teacher))
    assert_close(ft_loss(teacher, teacher), torch.zeros(3, dtype=torch.float64))
    assert_close(ft_loss(-teacher, teacher), 2 * F.normalize(teacher.flatten(1)).abs().mean(1))


def test_nd_rewards_length_up_to_the_teachers_and_direction_always():
    means, label = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1])
    teacher = torch.full((2, 3), 2.0, dtype=torch.float64)
    directions = means[label]
    short, long = nd_loss(directions, teacher, means, label), nd_loss(10 * directions, teacher, means, label)
    assert_close(short, torch.full_like(short, 1 - 1 / 12**0.5))
    assert_close(long, torch.zeros_like(long))
    student = directions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nd_loss(student, teacher, means, label).sum(), student)
    assert ((gradient * directions).sum(1) < 0).all()  # descent makes it longer
    longer = (10 * directions).requires_grad_()
    (gradient,) = torch.autograd.grad(nd_loss(longer, teacher, means, label).sum(), longer)
    assert_close(gradient, torch.zeros_like(gradient))
    assert_close(nd_loss(-10 * directions, teacher, means, label), torch.full_like(long, 2.0))
    assert_close(nd_loss(10 * directions, teacher, 7 * means, label), long)
    hidden = nd_loss(student, teacher, means, torch.tensor([0, -100]))
    assert_close(hidden, short * torch.tensor([1.0, 0.0]))


def test_nst_is_invariant_to_order_and_scale_of_channels_and_depends_on_positions(maps):
    student, teacher = maps
    scaled = student[:, [2, 0, 3, 1]] * torch.tensor([0.1, 2.0, 5.0, 1.0]).view(1, 4, 1, 1)
    assert_close(nst_loss(scaled, teacher), nst_loss(student, teacher))
    both = shuffle_positions(torch.cat(maps, 1))
    assert_close(nst_loss(both[:, :4], both[:, 4:]), nst_loss(student, teacher))
    assert (nst_loss(student.flip(3), student) > 1e-3).all()


def test_cc_converges_to_the_gaussian_kernel_as_its_order_grows():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)

    def kernel(rows):
        rows = F.normalize(rows)
        return torch.exp(-0.8 * (rows[:, None] - rows[None]).square().sum(2))

    exact = (kernel(student) - kernel(teacher)).square().mean()
    gaps = [(cc_loss(student, teacher, gamma=0.8, order=order) - exact).abs() for order in (1, 3, 6, 14)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-9
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert_close(cc_loss(3 * student @ rotation, teacher), cc_loss(student, teacher))


def test_hcl_is_smaller_for_a_detail_shifted_by_one_pixel_and_the_plain_distance_is_not(maps):
    student = torch.zeros(1, 1, 8, 8)
    near, far = student.clone(), student.clone()
    student[0, 0, 0, 0] = near[0, 0, 0, 1] = far[0, 0, 7, 7] = 1
    assert hcl_loss(student, near) < hcl_loss(student, far)
    assert_close(feature_distance_loss(student, near), feature_distance_loss(student, far))  # control
    constant = maps[0] + 1
    assert_close(hcl_loss(constant, maps[0]), torch.ones(3, dtype=torch.float64))  # every scale has error 1


def test_ofa_with_power_one_is_cross_entropy_and_a_higher_power_raises_the_label():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 4, -100])
    cross_entropy = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    assert_close(ofa_loss(student, teacher, label, 1.0, 1.0)[:5], cross_entropy[:5])
    assert ofa_loss(student, teacher, label, 1.0, 1.0)[5] == 0
    leaf = student.clone().requires_grad_()
    label_gradients = []
    for power in (1.0, 1.5, 2.0):
        (gradient,) = torch.autograd.grad(ofa_loss(leaf, teacher, label, power, 1.0)[:5].sum(), leaf)
        label_gradients.append(-gradient[torch.arange(5), label[:5]])
    assert (label_gradients[1] > label_gradients[0]).all()
    assert (label_gradients[2] > label_gradients[1]).all()


def test_dhkd_depends_on_a_constant_shift_and_is_even_in_the_gap():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    assert (dhkd_loss(teacher + 1, teacher, 2.0) > 0.5).all()
    assert_close(dhkd_loss(student, teacher, 2.0), dhkd_loss(teacher, student, 2.0))
    small = dhkd_loss(teacher + 1e-3, teacher, 2.0)
    assert_close(small, torch.full((6,), 5e-6 / 8, dtype=torch.float64), rtol=1e-4, atol=0)
    large = dhkd_loss(torch.tensor([[400.0, -400.0]]), torch.zeros(1, 2), 2.0)
    assert_close(large, 4 * 2 * (100 - torch.tensor([2.0]).log()))  # log cosh is linear there: no clamp, no overflow


def test_scaled_distances_are_invariant_to_the_scaling(tokens):
    student, teacher = tokens[0], tokens[0].flip(1)
    stretched = student * torch.linspace(1, 4, 5).view(1, 5, 1)
    for loss in (cosine_loss, lambda s, t: feature_distance_loss(s, t, scale="length", distance="l1")):
        assert_close(loss(stretched, teacher), loss(student, teacher))
    normalised = feature_distance_loss(stretched + 3, teacher, scale="layer_norm")
    assert_close(normalised, feature_distance_loss(student, teacher, scale="layer_norm"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(feature_distance_loss(stretched, teacher), feature_distance_loss(student, teacher))
    squared = feature_distance_loss(student, teacher, scale="length")  # |a - b|^2 = 2 - 2 cos of vectors of length 1
    assert_close(squared * 8, 2 * cosine_loss(student, teacher))


@pytest.mark.parametrize("loss", [cosine_loss, feature_distance_loss, token_relation_loss], ids=lambda f: f.__name__)
def test_tokens_outside_the_mask_have_no_effect_on_loss_and_gradient(loss, tokens):
    student, teacher = tokens[0].clone(), tokens[0].flip(1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    student.requires_grad_()
    value = loss(student, teacher, mask)
    assert_close(value[0], loss(student[:1, :3], teacher[:1, :3])[0])
    assert value[2] == 0
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient[~mask].abs().sum() == 0
    assert gradient[:2].abs().sum() > 0
    assert not torch.allclose(loss(student, teacher)[:2], value[:2])


def test_token_relations_are_invariant_to_rotations_and_lengths(tokens):
    student, teacher = tokens
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    lengths = torch.linspace(1, 3, 5, dtype=torch.float64).view(1, 5, 1)
    assert_close(token_relation_loss(lengths * student @ rotation, teacher), token_relation_loss(student, teacher))
    assert (token_relation_loss(student.flip(1), student) > 1e-3).all()
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(token_relation_loss(student[:, order], teacher[:, order]), token_relation_loss(student, teacher))


def test_attention_relations_use_the_selected_third_and_average_over_heads():
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 5, 12), torch.randn(3, 5, 24)
    for number, part in enumerate(("query", "key", "value")):
        thirds = student.chunk(3, 2)[number], teacher.chunk(3, 2)[number]
        assert_close(attention_relation_loss(student, teacher, 2, part), attention_relation_loss(*thirds, 2))
    heads = [attention_relation_loss(s, t) for s, t in zip(student.chunk(2, 2), teacher.chunk(2, 2), strict=True)]
    assert_close(attention_relation_loss(student, teacher, 2), (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize("name", ["nst", "ft", "cosine", "token_relation", "nd", "cc", "info_nce"])
def test_zero_features_give_finite_gradients(name):
    shape = (3, 4, 2, 2) if name == "nst" else (3, 4)
    shape = (3, 4, 5) if name == "token_relation" else shape
    student = torch.zeros(shape, requires_grad=True)
    operands = {"means": torch.zeros(2, 4), "label": torch.tensor([0, 1, 0])} if name == "nd" else {}
    loss = TERMS.build(name, {})(student=student, teacher=torch.randn(shape), **operands).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
