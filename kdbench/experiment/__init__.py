"""A run from its recipe to its summary: context, teacher runs, manifest, artifacts. The only writer of run folders."""
