"""Base classes of sample weights, routers and combiners."""

from __future__ import annotations

from torch import Tensor, nn


class SampleWeight(nn.Module):
    """Base of all weighers: how much each sample of a term counts.

        @WEIGHERS.register("confidence")

    The parameters of `forward` name what it reads, as those of a term do (`student` and `teacher` are the operands of
    the term that it weighs); further operands are declared by the fact `operands=("reference",)`.
    It returns (batch,), at least 0. Where no gradient is to reach a model through the weight, it detaches it itself.
    """

    def forward(self, **operands: Tensor) -> Tensor:
        raise NotImplementedError


class Router(nn.Module):
    """Base of all routers: how much each edge of a term counts for each sample.

        @ROUTERS.register("top_k", operands=("read",), injected=("edges", "shapes"))

    `forward` is called with those it names of: `student` (of the first edge), `teachers` (a list, one per edge),
    `losses` (batch, edges), detached (only of terms over samples), fields of the batch, and the operands that the fact
    declares. It returns the weights (batch, edges), or a mapping with the entry `route` and others: a later term reads
    them as `term:NAME.route`.

    Injected where the constructor asks for them: edges (how many), shapes (per sample, of each declared operand by
    name), num_classes.
    """

    def forward(self, **operands: Tensor) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError


class Combiner(nn.Module):
    """Base of all combiners: several operands become one, such as the mean of teachers' probabilities.

        @COMBINERS.register("mean_logits")

    `forward` takes `values` (a list of tensors, the parts) and the operands that the fact `operands=(...)` declares.
    Injected where asked for: parts (how many), shapes (per sample, of the declared operands by name), num_classes.
    """

    def forward(self, values: list[Tensor], **operands: Tensor) -> Tensor:
        raise NotImplementedError
