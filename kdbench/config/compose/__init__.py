"""Composition: merges the files of a recipe (layers) and its overrides into one mapping, with Hydra.

The keys of the mapping are checked later, by `kdbench.config.parse`.
"""
