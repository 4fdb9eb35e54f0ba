"""Process groups, collectives, gradient reduction, synchronised BatchNorm, sharded parameters."""
