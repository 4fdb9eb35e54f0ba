"""Datasets, augmentation, sampling and loading: everything up to a batch of tensors.

`describe` knows what a source will yield before its files are read. What the tensors are used for is not known here."""
