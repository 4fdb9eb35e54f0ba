"""Which device a run uses, and the number formats that its matrix products take there."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

from kdbench.errors import ConfigError, TrainingError


def resolve_device(name: str) -> torch.device:
    """Returns the device that `device:` names; `auto` takes cuda, else mps, else cpu.

    Raises:
        ConfigError: it is not there. Nothing falls back silently to a slower device.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if here[name]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device. Known: auto, cpu, cuda, cuda:N, mps.") from None
    if not here.get(device.type, False):
        why = ""
        if device.type == "cuda":
            built = torch.version.cuda or torch.version.hip
            why = "no driver or GPU was found" if built else "this torch was built without it"
        found = ", ".join(name for name, there in here.items() if there)
        raise ConfigError(
            f"device: {name} was asked for, but it is not there ({why or 'not available on this machine'}). "
            f"Here: {found}. Write device=auto to take what there is."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} was asked for, but there are {torch.cuda.device_count()} GPUs (from cuda:0)."
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what names no device, as `torch.cuda.manual_seed` does, means the current one
    return device


def describe_device(device: torch.device) -> str:
    """The device in words, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU" if device.type == "cpu" else "Apple GPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{name} ({platform.machine()}{threads})"


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ConfigError where the device cannot compute in this precision, before anything is spent."""
    if precision == "float64" and device.type == "mps":
        raise ConfigError("precision: float64 is not there on an Apple GPU. Write device=cpu, or precision=float32.")
    if precision == "bf16" and device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ConfigError(
                f"precision: bf16 needs a GPU of compute capability 8.0 or more; {torch.cuda.get_device_name(device)} "
                f"has {major}.{minor}. Write precision=fp16, or precision=float32."
            )


@contextlib.contextmanager
def precision_settings(precision: str) -> Iterator[None]:
    """Sets which products may round to TF32 on CUDA, and puts the settings back. float32 means float32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision not in ("float32", "float64")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextlib.contextmanager
def out_of_memory_as_training_error(device: torch.device) -> Iterator[None]:
    """Says in words that memory ran out, on the device or beside it.

    Raises:
        TrainingError: instead of what torch raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = " ".join(str(error).split())
        words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(word in told for word in words):
            raise
        raise TrainingError(
            f"memory ran out on {describe_device(device)} ({told[:200] or type(error).__name__}). A smaller "
            "`batch_size` needs less (`accumulate` keeps the effective batch), and so do smaller images and "
            "`precision: bf16`. What was saved stays; with those keys changed it is another run."
        ) from error
