"""Saving and loading: declared contents of checkpoint files, weights of roles, and folding of BatchNorm."""
