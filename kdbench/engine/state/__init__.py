"""Saving and loading: declared contents of checkpoint files, weights of roles (networks), folding of BatchNorm."""
