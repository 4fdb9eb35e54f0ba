"""Arithmetic of the references: plain loops over nested lists of Python floats (float64).

Nothing here is vectorised or shared with kdbench, and gradients are numerical, so that a term and its reference agree
only if both are right.
"""

from __future__ import annotations

import math


def softmax(logits, temperature=1.0):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kl_divergence(q, p):
    return sum(qk * math.log(qk / pk) for qk, pk in zip(q, p, strict=True))


def flatten(nested):
    return [x for part in nested for x in flatten(part)] if isinstance(nested, list) else [nested]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def subtract(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def unit(vector):
    length = math.sqrt(dot(vector, vector))
    return [x / length for x in vector]


def mean_square(first, second):
    """Averages the squared differences of two nested lists."""
    squares = [(a - b) ** 2 for a, b in zip(flatten(first), flatten(second), strict=True)]
    return sum(squares) / len(squares)


def pooled(channel, height, width):
    """Averages the cells of each window. Only for sizes that divide into whole windows, as in all cases."""
    window_height, window_width = len(channel) // height, len(channel[0]) // width
    return [
        [
            sum(
                channel[r * window_height + i][c * window_width + j]
                for i in range(window_height)
                for j in range(window_width)
            )
            / (window_height * window_width)
            for c in range(width)
        ]
        for r in range(height)
    ]


def common_size(s, t):
    """Returns the smaller height and width of two maps."""
    return min(len(s[0]), len(t[0])), min(len(s[0][0]), len(t[0][0]))


def numerical_gradient(function, tensor, step=1e-5):
    """Computes the gradient of `function` (nested list -> float) at a float64 tensor by central differences."""
    gradient = tensor.new_zeros(tensor.shape)
    for position in range(tensor.numel()):
        up, down = tensor.clone(), tensor.clone()
        up.view(-1)[position] += step
        down.view(-1)[position] -= step
        gradient.view(-1)[position] = (function(up.tolist()) - function(down.tolist())) / (2 * step)
    return gradient
