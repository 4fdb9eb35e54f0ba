"""kdbench: a configuration-driven experiment framework for knowledge distillation.

Importing the package takes milliseconds: torch and other large libraries are imported where they are used.
"""

__version__ = "0.3.0"
