"""Runs the command line of kdbench for `python -m kdbench`."""

from __future__ import annotations

import sys

from kdbench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
