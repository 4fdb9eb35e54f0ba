"""Variational information distillation: a term with its own networks, so it stands outside the shared cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from helpers.term_reference import numerical_gradient
from kdbench.errors import ConfigError
from kdbench.registry import TERMS
from kdbench.terms.features.maps import gaussian_nll

SHAPES = [((3, 2, 2), (5, 2, 2)), ((3, 4, 2), (5, 2, 4)), ((6,), (4,))]
every_shape = pytest.mark.parametrize(("student", "teacher"), SHAPES, ids=str)


def build(student, teacher, **params):
    torch.manual_seed(0)
    return TERMS.build("vid", params, shapes={"student": student, "teacher": teacher})


def operands(student, teacher, batch=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in (student, teacher)]
    return pair[0].to(dtype).requires_grad_(), pair[1].to(dtype)


def places(feature, size):
    """A feature as one list of channels per place, average-pooled to `size` in whole windows."""
    if not isinstance(feature[0], list):
        return [feature]
    tall, wide = len(feature[0]) // size[0], len(feature[0][0]) // size[1]
    return [
        [
            sum(channel[r * tall + i][c * wide + j] for i in range(tall) for j in range(wide)) / (tall * wide)
            for channel in feature
        ]
        for r in range(size[0])
        for c in range(size[1])
    ]


def plain(term, student, teacher):
    """The loss of each sample, place by place and channel by channel."""
    layers = [layer.weight.detach().flatten(1).tolist() for layer in term.mean if hasattr(layer, "weight")]
    variances = [math.log1p(math.exp(a)) + 1e-5 for a in term.scale.tolist()]
    losses = []
    for s, t in zip(student, teacher, strict=True):
        map_like = isinstance(s[0], list)
        size = (min(len(s[0]), len(t[0])), min(len(s[0][0]), len(t[0][0]))) if map_like else (1, 1)
        values = []
        for seen, wanted in zip(places(s, size), places(t, size), strict=True):
            for number, matrix in enumerate(layers):
                seen = [sum(w * x for w, x in zip(row, seen, strict=True)) for row in matrix]
                seen = [max(x, 0.0) for x in seen] if number < 2 else seen
            for mean, target, variance in zip(seen, wanted, variances, strict=True):
                values.append(0.5 * ((target - mean) ** 2 / variance + math.log(variance)))
        losses.append(sum(values) / len(values))
    return losses


@every_shape
def test_value_and_gradient_are_those_of_plain_loops(student, teacher):
    term = build(student, teacher).double()
    with torch.no_grad():
        term.scale.add_(torch.randn_like(term.scale))
    s, t = operands(student, teacher)
    loss = term(s, t)
    assert_close(loss, torch.tensor(plain(term, s.tolist(), t.tolist()), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    expected = numerical_gradient(lambda values: sum(plain(term, values, t.tolist())), s.detach())
    assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_the_loss_is_least_where_the_variance_is_the_mean_squared_error():
    mean, target = torch.randn(2, 64, 3, dtype=torch.float64)
    best = (mean - target).square().mean(0)
    least = gaussian_nll(mean, target, best).mean()
    for factor in (0.8, 1.25):
        assert gaussian_nll(mean, target, factor * best).mean() > least
    constant = math.log(2 * math.pi) / 2
    expected = -torch.distributions.Normal(mean, best.sqrt()).log_prob(target).mean()
    assert_close(least + constant, expected)


def test_training_the_term_alone_brings_each_variance_to_the_error_that_is_left():
    """From 5 to what the mean network cannot predict. Control: with the variance held, the loss stays higher."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(512, 4, generator=generator).relu()
    teacher = student + torch.tensor([0.3, 0.5, 0.7, 0.9]) * torch.randn(512, 4, generator=generator)

    def train(names):
        term = build((4,), (4,))
        assert_close(F.softplus(term.scale), torch.full((4,), 5.0))
        moved = [value for name, value in term.named_parameters() if name.split(".")[0] in names]
        optimizer = torch.optim.Adam(moved, lr=0.03)
        for _ in range(400):
            loss = term(student, teacher).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return term, loss.item()

    term, loss = train({"mean", "scale"})
    left = (term.mean(student[:, :, None, None]).flatten(1) - teacher).square().mean(0)
    assert_close(F.softplus(term.scale), left, rtol=0.1, atol=0)
    assert train({"mean"})[1] > loss + 0.3


@every_shape
def test_each_sample_depends_on_its_own_row_only_and_nothing_is_read_on_the_host(student, teacher):
    term = build(student, teacher)
    s, t = operands(student, teacher, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(term(s, t)[0], s)
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(value) for value in (s, t)]
        loss = term(*fake)
        loss.sum().backward()
    assert loss.shape == (4,)
    assert term.to("meta")(s.to("meta"), t.to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_change_nothing(dtype):
    term = build((3, 2, 2), (5, 2, 2))
    s, t = operands((3, 2, 2), (5, 2, 2), dtype=dtype)
    expected = term(s.detach().float(), t.float())
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(s, t), expected)


def test_mistakes_are_refused_in_words():
    with pytest.raises(ConfigError, match="vid: variance must be above 0"):
        build((3,), (3,), variance=0.0)
    with pytest.raises(ValueError, match="feature maps"):
        build((3,), (3,)).check_shapes(student=Size((2, 4, 3)), teacher=Size((2, 3)))
