"""Frozen roles outside the step: prefetched for several steps at once, or cached on disk for each image."""
