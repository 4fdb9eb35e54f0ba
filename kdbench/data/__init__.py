"""Data: datasets, augmentation, sampling and loading, which together produce batches of tensors.

The module `describe` computes the fields and sizes of a source before the files of its dataset are read.
"""
