"""Base classes of sample weights, routers and combiners."""

from __future__ import annotations

from torch import nn


class SampleWeight(nn.Module):
    """Base class of sample weights: the weight of each sample in a term.

        @SAMPLE_WEIGHTS.register("confidence", version=1)

    The parameter names of `forward` are the operands, as in a term; `student` and `teacher` are the operands of the
    weighted term. The fact `operands=("reference",)` declares further operands. `forward` returns (batch,), at least 0.
    A sample weight that must pass no gradient to a model detaches its operands itself.
    """


class Router(nn.Module):
    """Base class of routers: the weight of each edge of a term, per sample.

        @ROUTERS.register("top_k", version=1, operands=("read",), injected=("edges", "shapes"))

    The parameter names of `forward` are its inputs: `student` (of the first edge); `teachers`, a list with one operand
    per edge; `losses` (batch, edges), detached, only in terms with one loss per row; fields of the batch; and the
    operands that the fact declares. `forward` returns the weights (batch, edges), or a mapping with the key `route` and
    further entries. Later terms read the entries as `term:NAME.route`.

    Injected into the constructor if it has a parameter of that name: `edges` (their number), `shapes` (shape per sample
    of each declared operand, by name), `num_classes`.
    """


class Combiner(nn.Module):
    """Base class of combiners: several operands combined to one, such as the mean of the teachers' probabilities.

        @COMBINERS.register("mean_logits", version=1)

    `forward` has the parameter `values`, a list of the tensors to combine, and the operands that the fact
    `operands=(...)` declares.

    Injected into the constructor if it has a parameter of that name: `parts` (number of values), `shapes` (shape per
    sample of each declared operand, by name), `num_classes`.
    """
