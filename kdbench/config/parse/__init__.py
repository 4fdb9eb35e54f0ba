"""Parsing: converts the mapping of a composed recipe to dataclasses of `kdbench.config.schema`.

Each section of a recipe has a module. All keys, types, names and references are checked, and all mistakes are
reported together. No file is read, except for other recipes to which the recipe refers.
"""
