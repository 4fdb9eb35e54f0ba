"""What a stage leaves for later stages: datasets, subsets, statistics, searched models; and selectors of samples.

Computing an artifact is done here; writing it into the run folder is done by `kdbench.experiment.artifacts`."""
