"""Artifact builders (datasets, subsets, tensors and models for later stages) and selectors of rows.

The builders compute an artifact; `kdbench.experiment.artifacts` stores it in the run folder and loads it again."""
