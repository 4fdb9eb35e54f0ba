"""Artifact builders, which compute datasets, subsets, tensors and models for later stages, and selectors of rows.

A builder computes an artifact. `kdbench.experiment.artifacts` stores artifacts in the run folder and loads them.
"""
