"""Loss terms. Each module contains one family of methods.

A term maps named tensors (its operands) to a loss. Terms do not depend on recipes, roles or the training loop.
Adapters, combiners, routers and sample weights are not losses, so they are in `kdbench.wiring`.

"""

from kdbench.terms.base import (
    Number,
    Space,
    Term,
    check_equal_classes,
    check_equal_shapes,
    check_feature_maps,
    check_logits,
    check_parameters,
)

__all__ = [
    "Number",
    "Space",
    "Term",
    "check_equal_classes",
    "check_equal_shapes",
    "check_feature_maps",
    "check_logits",
    "check_parameters",
]
