"""Which samples, in which order, with which labels: epochs over ranks, splits, subsets, relabelling.

Pure functions of seed, epoch and sizes; no pixel is read here."""
