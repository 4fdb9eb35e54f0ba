"""Frozen roles (networks) outside the training step: prefetched for several steps at once, or cached on disk."""
