"""Parts between operands and losses: adapters, combiners, routers and sample weights. None of them is a loss."""

from kdbench.wiring.base import Combiner, Router, SampleWeight

__all__ = ["Combiner", "Router", "SampleWeight"]
