"""The further terms on features, tokens and auxiliary heads: what each promises beyond what holds for every term."""

import pytest
import torch
import torch.nn.functional as F
from torch import Size
from torch.testing import assert_close

from kdbench.errors import ConfigError
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


def shuffled_places(feature):
    order = torch.randperm(36)
    return feature.flatten(2)[:, :, order].view_as(feature)


def test_the_flow_is_linear_in_each_end_and_does_not_see_where_it_happens(maps):
    first, second = maps
    assert_close(fsp_matrix(3 * first, second), 3 * fsp_matrix(first, second))
    assert_close(fsp_matrix(first, second), fsp_matrix(second, first).transpose(1, 2))
    both = shuffled_places(torch.cat(maps, 1))
    assert_close(fsp_matrix(both[:, :4], both[:, 4:]), fsp_matrix(first, second))
    assert (fsp_loss(second, second, first, first.flip(3)) > 1e-4).all()  # one end alone does see it


def test_boundaries_read_the_teachers_side_only_and_rest_past_the_margin():
    student, teacher = torch.randn(2, 4, 9)
    assert_close(ab_loss(student, 7 * teacher), ab_loss(student, teacher))
    settled = teacher.sign() * (1 + torch.rand(4, 9))
    assert (ab_loss(settled, teacher) == 0).all()
    assert (ab_loss(-settled, teacher) > 4 * 9 - 1e-3).all()  # each neuron is 2 or more past its place
    assert (ab_loss(teacher.sign() * 0.5, teacher) > 0).all()  # on the right side is not enough


def test_factors_see_direction_and_not_length(maps):
    student, teacher = maps
    assert_close(ft_loss(5 * student, 0.1 * teacher), ft_loss(student, teacher))
    assert_close(ft_loss(teacher, teacher), torch.zeros(3, dtype=torch.float64))
    assert_close(ft_loss(-teacher, teacher), 2 * F.normalize(teacher.flatten(1)).abs().mean(1))


def test_nd_rewards_length_up_to_the_teachers_and_direction_always():
    means, label = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1])
    teacher = torch.full((2, 3), 2.0, dtype=torch.float64)
    along = means[label]
    short, long = nd_loss(along, teacher, means, label), nd_loss(10 * along, teacher, means, label)
    assert_close(short, torch.full_like(short, 1 - 1 / 12**0.5))
    assert_close(long, torch.zeros_like(long))
    student = along.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nd_loss(student, teacher, means, label).sum(), student)
    assert ((gradient * along).sum(1) < 0).all()  # descent makes it longer
    longer = (10 * along).requires_grad_()
    (gradient,) = torch.autograd.grad(nd_loss(longer, teacher, means, label).sum(), longer)
    assert_close(gradient, torch.zeros_like(gradient))
    assert_close(nd_loss(-10 * along, teacher, means, label), torch.full_like(long, 2.0))
    assert_close(nd_loss(10 * along, teacher, 7 * means, label), long)
    hidden = nd_loss(student, teacher, means, torch.tensor([0, -100]))
    assert_close(hidden, short * torch.tensor([1.0, 0.0]))


def test_selectivity_does_not_see_the_order_or_scale_of_channels_and_sees_places(maps):
    student, teacher = maps
    scaled = student[:, [2, 0, 3, 1]] * torch.tensor([0.1, 2.0, 5.0, 1.0]).view(1, 4, 1, 1)
    assert_close(nst_loss(scaled, teacher), nst_loss(student, teacher))
    both = shuffled_places(torch.cat(maps, 1))
    assert_close(nst_loss(both[:, :4], both[:, 4:]), nst_loss(student, teacher))
    assert (nst_loss(student.flip(3), student) > 1e-3).all()


def test_correlation_nears_the_gaussian_kernel_as_its_order_grows():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)

    def kernel(rows):
        rows = F.normalize(rows)
        return torch.exp(-0.8 * (rows[:, None] - rows[None]).square().sum(2))

    exact = (kernel(student) - kernel(teacher)).square().mean()
    gaps = [(cc_loss(student, teacher, gamma=0.8, order=order) - exact).abs() for order in (1, 3, 6, 14)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-9
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert_close(cc_loss(3 * student @ turn, teacher), cc_loss(student, teacher))


def test_the_pyramid_forgives_a_shifted_detail_and_hint_does_not(maps):
    student = torch.zeros(1, 1, 8, 8)
    near, far = student.clone(), student.clone()
    student[0, 0, 0, 0] = near[0, 0, 0, 1] = far[0, 0, 7, 7] = 1
    assert hcl_loss(student, near) < hcl_loss(student, far)
    assert_close(feature_distance_loss(student, near), feature_distance_loss(student, far))  # the control
    constant = maps[0] + 1
    assert_close(hcl_loss(constant, maps[0]), torch.ones(3, dtype=torch.float64))  # every scale has error 1


def test_ofa_with_power_one_is_cross_entropy_with_the_teacher_and_a_higher_power_raises_the_label():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 4, -100])
    plain = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    assert_close(ofa_loss(student, teacher, label, 1.0, 1.0)[:5], plain[:5])
    assert ofa_loss(student, teacher, label, 1.0, 1.0)[5] == 0
    leaf = student.clone().requires_grad_()
    pulls = []
    for power in (1.0, 1.5, 2.0):
        (gradient,) = torch.autograd.grad(ofa_loss(leaf, teacher, label, power, 1.0)[:5].sum(), leaf)
        pulls.append(-gradient[torch.arange(5), label[:5]])
    assert (pulls[1] > pulls[0]).all()
    assert (pulls[2] > pulls[1]).all()


def test_dhkd_sees_the_constant_that_a_softmax_cannot_and_is_even_in_the_gap():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    assert (dhkd_loss(teacher + 1, teacher, 2.0) > 0.5).all()
    assert_close(dhkd_loss(student, teacher, 2.0), dhkd_loss(teacher, student, 2.0))
    assert_close(
        dhkd_loss(teacher + 1e-3, teacher, 2.0), torch.full((6,), 5e-6 / 8, dtype=torch.float64), rtol=1e-4, atol=0
    )
    far = dhkd_loss(torch.tensor([[400.0, -400.0]]), torch.zeros(1, 2), 2.0)
    assert_close(far, 4 * 2 * (100 - torch.tensor([2.0]).log()))  # log cosh is linear there: no clamp, no overflow


def test_scaled_distances_do_not_see_what_the_scaling_takes_away(tokens):
    student, teacher = tokens[0], tokens[0].flip(1)
    stretched = student * torch.linspace(1, 4, 5).view(1, 5, 1)
    for loss in (cosine_loss, lambda s, t: feature_distance_loss(s, t, scale="length", distance="l1")):
        assert_close(loss(stretched, teacher), loss(student, teacher))
    normed = feature_distance_loss(stretched + 3, teacher, scale="layer_norm")
    assert_close(normed, feature_distance_loss(student, teacher, scale="layer_norm"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(feature_distance_loss(stretched, teacher), feature_distance_loss(student, teacher))
    squared = feature_distance_loss(student, teacher, scale="length")  # |a - b|^2 = 2 - 2 cos of vectors of length 1
    assert_close(squared * 8, 2 * cosine_loss(student, teacher))


@pytest.mark.parametrize("loss", [cosine_loss, feature_distance_loss, token_relation_loss], ids=lambda f: f.__name__)
def test_tokens_left_out_reach_neither_value_nor_gradient(loss, tokens):
    student, teacher = tokens[0].clone(), tokens[0].flip(1)
    marks = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    student.requires_grad_()
    value = loss(student, teacher, marks)
    assert_close(value[0], loss(student[:1, :3], teacher[:1, :3])[0])
    assert value[2] == 0
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient[~marks].abs().sum() == 0
    assert gradient[:2].abs().sum() > 0
    assert not torch.allclose(loss(student, teacher)[:2], value[:2])


def test_token_relations_need_no_projector_and_do_not_see_turns_or_lengths(tokens):
    student, teacher = tokens
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    lengths = torch.linspace(1, 3, 5, dtype=torch.float64).view(1, 5, 1)
    assert_close(token_relation_loss(lengths * student @ turn, teacher), token_relation_loss(student, teacher))
    assert (token_relation_loss(student.flip(1), student) > 1e-3).all()
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    assert_close(token_relation_loss(student[:, shuffle], teacher[:, shuffle]), token_relation_loss(student, teacher))


def test_attention_relations_take_the_third_that_is_asked_for(tokens):
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 5, 12), torch.randn(3, 5, 24)
    for number, part in enumerate(("query", "key", "value")):
        ours, theirs = student.chunk(3, 2)[number], teacher.chunk(3, 2)[number]
        whole = attention_relation_loss(ours, theirs, 2)
        assert_close(attention_relation_loss(student, teacher, 2, part), whole)
    heads = [attention_relation_loss(s, t) for s, t in zip(student.chunk(2, 2), teacher.chunk(2, 2), strict=True)]
    assert_close(attention_relation_loss(student, teacher, 2), (heads[0] + heads[1]) / 2)


VECTOR, MAP, TOKENS = Size((8, 10)), Size((8, 3, 4, 4)), Size((8, 5, 6))
REFUSED = [
    ("fsp", {}, {"student": MAP, "teacher": VECTOR}, "the teacher's operand is"),
    ("fsp", {}, {"student": MAP, "teacher": MAP, "student_from": MAP, "teacher_from": Size((8, 7, 4, 4))}, "3 and 7"),
    ("ab", {}, {"student": VECTOR, "teacher": MAP}, "pre-activations of equal shape"),
    ("ft", {}, {"student": VECTOR, "teacher": MAP}, "factors of equal shape"),
    ("reconstruction", {}, {"student": VECTOR, "teacher": MAP}, "an output and its target of equal shape"),
    ("nd", {}, {"student": VECTOR, "teacher": Size((8, 9))}, "features of equal shape"),
    ("nd", {}, {"student": VECTOR, "teacher": VECTOR, "means": Size((4, 9))}, "10 elements each, but `means` has 9"),
    ("nst", {}, {"student": MAP, "teacher": VECTOR}, "name a convolutional feature"),
    ("cc", {}, {"student": Size((8,)), "teacher": VECTOR}, "one number per sample"),
    ("hcl", {}, {"student": MAP, "teacher": VECTOR}, "features of equal shape"),
    ("ofa", {}, {"student": VECTOR, "teacher": Size((8, 100))}, "10 classes and the teacher 100"),
    ("dhkd", {}, {"student": VECTOR, "teacher": MAP}, "reads logits"),
    ("feature_distance", {}, {"student": VECTOR, "teacher": MAP}, "features of equal shape"),
    ("feature_distance", {}, {"student": VECTOR, "teacher": VECTOR, "tokens": Size((8, 10))}, "counts marked tokens"),
    ("cosine", {}, {"student": TOKENS, "teacher": TOKENS, "tokens": Size((8, 4))}, r"`tokens` is \[4\]"),
    ("token_relation", {}, {"student": VECTOR, "teacher": TOKENS}, "reads tokens"),
    ("token_relation", {}, {"student": MAP, "teacher": TOKENS}, "the student has 16 and the teacher 5"),
    ("token_relation", {}, {"student": TOKENS, "teacher": TOKENS, "tokens": Size((8, 4))}, "one mark for each of 5"),
    ("attention_relation", {"heads": 4}, {"student": TOKENS, "teacher": TOKENS}, "4 equal parts"),
    ("attention_relation", {}, {"student": MAP, "teacher": MAP}, "reads tokens"),
]


@pytest.mark.parametrize(("name", "params", "shapes", "words"), REFUSED)
def test_shapes_that_cannot_be_compared_are_refused(name, params, shapes, words):
    with pytest.raises(ValueError, match=words):
        TERMS.build(name, params).check_shapes(**shapes)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("ab", {"margin": -1.0}, "ab: margin must be at least 0"),
        ("cc", {"gamma": 0.0}, "cc: gamma must be above 0"),
        ("cc", {"order": 0}, "cc: order must be at least 1, got 0"),
        ("ofa", {"power": 0}, "ofa: power must be above 0"),
        ("dhkd", {"temperature": -2}, "dhkd: temperature must be above 0"),
        ("info_nce", {"temperature": 0}, "info_nce: temperature must be above 0"),
        ("attention_relation", {"heads": 0}, "heads must be at least 1"),
        ("attention_relation", {"part": "output"}, "part must be one of whole, query, key, value"),
        ("feature_distance", {"distance": "l3"}, "distance must be one of l1, l2, smooth_l1"),
    ],
)
def test_parameters_out_of_range_are_refused(name, params, words):
    with pytest.raises(ConfigError, match=words):
        TERMS.build(name, params)


@pytest.mark.parametrize("name", ["nst", "ft", "cosine", "token_relation", "nd", "cc", "info_nce"])
def test_dead_features_give_finite_gradients(name):
    shape = (3, 4, 2, 2) if name == "nst" else (3, 4)
    shape = (3, 4, 5) if name == "token_relation" else shape
    student = torch.zeros(shape, requires_grad=True)
    more = {"means": torch.zeros(2, 4), "label": torch.tensor([0, 1, 0])} if name == "nd" else {}
    loss = TERMS.build(name, {})(student=student, teacher=torch.randn(shape), **more).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
