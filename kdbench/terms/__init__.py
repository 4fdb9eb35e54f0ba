"""Loss terms by family. A term maps named operands to an unreduced loss and knows no recipe, role or runner.

Adapters, combiners, routers and sample weights, which are no losses, are in `kdbench.wiring`."""
