"""Loss terms by family. A term maps named operands to an unreduced loss; it knows no recipe, role or runner.

Adapters, combiners, routers and sample weights are not losses: they are in `kdbench.wiring`.
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
