"""Training on several processes: collectives, gradient reduction, synchronised BatchNorm, sharded parameters."""
