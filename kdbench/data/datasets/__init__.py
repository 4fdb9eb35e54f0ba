"""Datasets by name, and the reading of image files. A dataset returns one split: packed, or through a reader.

Validation splits, hidden labels, augmentation, caching on the device and sharding belong to other packages."""
