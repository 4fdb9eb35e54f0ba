"""Datasets, and readers of image files. A dataset returns one split, in memory or through a reader of its files.

The package `sampling` implements validation splits, hidden labels and the distribution over ranks. The package
`augment` implements augmentation.
"""
