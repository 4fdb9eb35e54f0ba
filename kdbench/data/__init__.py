"""Datasets, augmentations, and the sources of batches that stages read."""
