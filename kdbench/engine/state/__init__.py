"""What is saved and loaded: weights, checkpoints, initial weights of roles, folding of BatchNorm."""
