"""Datasets, augmentation, sampling and loading: everything up to a batch of tensors.

`describe` computes the spec of a source before its files are read. Nothing here knows what the batches are used for."""
