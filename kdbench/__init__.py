"""kdbench: a configuration-driven experiment framework for knowledge distillation.

Importing the package is instant: torch and the other heavy libraries are imported where they are used.
"""

__version__ = "0.3.0"
