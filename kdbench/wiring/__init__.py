"""Modules between the features of networks and the loss terms: adapters, combiners, routers and sample weights."""

from kdbench.wiring.base import Combiner, Router, SampleWeight

__all__ = ["Combiner", "Router", "SampleWeight"]
