"""Helpers that several tests share: recipes and their runs, term cases and references, parts of a plug-in."""
