"""Parts between operands and losses: adapters, combiners, routers, sample weights. None of them is a loss."""
