"""kdbench: a configuration-driven experiment framework for knowledge distillation.

Importing the package takes milliseconds, because torch and other large libraries are imported only in the modules
that use them.
"""

__version__ = "0.3.0"
