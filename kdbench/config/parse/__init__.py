"""From a composed mapping to the dataclasses of `kdbench.config.schema`: one module for each part of a recipe.

All keys, types, names and references are checked here, and all mistakes are reported together. Files are not read,
except to follow references to other recipes."""
