"""Order of samples over epochs and ranks, validation splits, subsets and relabelling.

Everything here is a pure function of seed, epoch, labels and sizes. No image is read."""
