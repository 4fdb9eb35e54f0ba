"""Datasets by name, and the reading of image files. A dataset returns one split, decoded or by reader.

Validation splits, hidden labels, augmentation, caching on the device and sharding are the business of other folders."""
