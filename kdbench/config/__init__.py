"""The schema of recipes, the loader that checks them, identities of runs, and schedules. torch is not imported.

`compose` merges files and overrides into one mapping, and `parse` checks this mapping and converts it to dataclasses
of `schema`. No other package uses YAML or OmegaConf.
"""
