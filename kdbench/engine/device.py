"""Devices and number formats: finds the device that `device:` names, checks `precision:`, and sets TF32."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

from kdbench.errors import ConfigError, TrainingError


def resolve_device(name: str) -> torch.device:
    """Returns the device that the recipe key `device:` names.

    Args:
        name: `auto`, or a device of torch such as `cuda:1`. `auto` is cuda if available, otherwise mps, otherwise
            cpu.

    Raises:
        ConfigError: the device is unknown or not available. There is no silent fallback to a slower device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: unknown device {name!r}. Known: auto, cpu, cuda, cuda:N, mps.") from None
    if not available.get(device.type, False):
        reason = "not supported on this machine"
        if device.type == "cuda":
            has_cuda = torch.version.cuda or torch.version.hip
            reason = "no driver or no GPU" if has_cuda else "this torch was built without CUDA"
        alternatives = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise ConfigError(
            f"device: {name} is not available ({reason}). Available: {alternatives}. device=auto selects the fastest "
            "available device."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} does not exist; this machine has {torch.cuda.device_count()} GPUs, numbered from cuda:0."
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # functions without a device argument, such as torch.cuda.manual_seed, use it
    return device


def describe_device(device: torch.device) -> str:
    """Returns the name of the hardware, such as `NVIDIA H200` or `CPU (x86_64, 8 threads)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU" if device.type == "cpu" else "Apple GPU"
    count = torch.get_num_threads()
    threads = f", {count} thread{'' if count == 1 else 's'}" if device.type == "cpu" else ""
    return f"{name} ({platform.machine()}{threads})"


def check_precision(precision: str, device: torch.device) -> None:
    """Checks that the device supports a stage's `precision:`.

    Raises:
        ConfigError: the device does not support the precision. The message suggests another precision.
    """
    if precision == "float64" and device.type == "mps":
        raise ConfigError("precision: an Apple GPU does not support float64. Use device=cpu, or precision=float32.")
    if precision == "bf16" and device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ConfigError(
                f"precision: bf16 needs a GPU of compute capability 8.0 or more; {torch.cuda.get_device_name(device)} "
                f"has {major}.{minor}. Use precision=fp16, or precision=float32."
            )


@contextlib.contextmanager
def precision_settings(precision: str) -> Iterator[None]:
    """Context manager: allows TF32 for matrix products and convolutions, unless `precision` is float32 or float64.

    With `precision: float32`, CUDA therefore computes in float32 too. The previous settings are restored after the
    block.
    """
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision not in ("float32", "float64")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextlib.contextmanager
def out_of_memory_as_training_error(device: torch.device) -> Iterator[None]:
    """Context manager: converts an out-of-memory error of the device or of the host to a TrainingError.

    Raises:
        TrainingError: the block ran out of memory. The message suggests settings that need less memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())
        # cuDNN, the CPU allocator and MPS report it as a plain RuntimeError.
        phrases = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_typed and not any(phrase in message for phrase in phrases):
            raise
        raise TrainingError(
            f"memory ran out on {describe_device(device)} ({message[:200] or type(error).__name__}). A smaller "
            "`batch_size` needs less memory (`accumulate` keeps the effective batch); smaller images and "
            "`precision: bf16` need less too. Saved checkpoints remain; a run with these keys changed is a new run."
        ) from error
