"""Order of samples over epochs and ranks, validation splits, subsets and relabelling.

The functions depend only on seed, epoch, labels and sizes. No image is read.
"""
