"""Base classes of sample weights, routers and combiners."""

from __future__ import annotations

from torch import nn


class SampleWeight(nn.Module):
    """Base class of sample weights: modules that compute one weight per sample for the rows of a loss term.

        @SAMPLE_WEIGHTS.register("confidence", version=1)

    The parameter names of `forward` select its inputs. `student` and `teacher` are the two tensors that the weighted
    loss term compares, and the name of a field of the batch, such as `label`, is this field. The argument
    `operands=("reference",)` of the decorator declares a further input, which the recipe sets. `forward` returns
    weights of shape (batch,) that are at least 0. If no gradient may flow through the weight, `forward` must detach
    its inputs.
    """


class Router(nn.Module):
    """Base class of routers: modules that weight the (student, teacher) pairs of a loss term per sample.

        @ROUTERS.register("top_k", version=1, operands=("read",), injected=("edges", "shapes"))

    Each (student, teacher) pair is an edge of the loss term. The parameter names of `forward` select its inputs:

    - `student`: student tensor of the first edge;
    - `teachers`: list with the teacher tensor of each edge;
    - `losses`: detached losses (batch, edges), only in loss terms with one loss per sample;
    - the name of a field of the batch, such as `label`;
    - the names in the argument `operands` of the decorator: tensors that the recipe sets.

    `forward` returns the weights (batch, edges), or a dictionary with the weights under the key `route` and with
    further tensors. Later loss terms read an entry as `term:NAME.KEY`, for example `term:kd.route`.

    The argument `injected` of the decorator lists the constructor parameters that kdbench sets: `edges` (number of
    edges), `shapes` (name in `operands` -> shape per sample) and `num_classes`.
    """


class Combiner(nn.Module):
    """Base class of combiners: modules that compute one tensor from several, such as the mean of several logits.

        @COMBINERS.register("kdcl_naive", version=1, operands=("label",))

    The parameter `values` of `forward` is the list of the tensors to combine. The argument `operands` of the
    decorator declares further inputs of `forward`, which the recipe sets.

    The decorator may also have an argument `injected`, a list of the constructor parameters that kdbench sets:
    `parts` (number of tensors to combine) and `shapes` (name in `operands` -> shape per sample).
    """
