"""Prints the header of a log: processor, cores, Python, and the versions of the libraries that results depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


def processor() -> str:
    """Returns the name of the processor on Linux, or its architecture on another system."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Returns the version of a package, or "absent" if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}")
    names = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy", "scikit-learn")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
