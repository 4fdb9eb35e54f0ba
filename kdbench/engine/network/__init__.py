"""The modules of one stage: roles, feature extraction, operands, terms, and the network that connects them."""
