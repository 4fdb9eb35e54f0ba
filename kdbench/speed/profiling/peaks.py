"""Peak FLOP/s of a device: from the datasheet of a known GPU, measured on a CPU, otherwise unknown."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

DATASHEET_TFLOPS = {
    "NVIDIA H200": (66.9, 494.7, 989.4, 66.9),
    "NVIDIA H100 80GB HBM3": (66.9, 494.7, 989.4, 66.9),
    "NVIDIA A100-SXM4-80GB": (19.5, 156, 312, 19.5),
    "NVIDIA A100-SXM4-40GB": (19.5, 156, 312, 19.5),
    "NVIDIA A100 80GB PCIe": (19.5, 156, 312, 19.5),
    "NVIDIA A100-PCIE-40GB": (19.5, 156, 312, 19.5),
}
"""Device name that the driver reports -> TFLOP/s for each of `MATMUL_FORMATS`.

The values come from NVIDIA's datasheets of the H100, H200 and A100: dense (without sparsity), float64 with tensor
cores. The driver reports another name for a MIG slice of a device, so a slice has no entry."""


MATMUL_FORMATS = ("float32", "tf32", "half", "float64")


PROBE_SIZE, PROBE_SECONDS = 1024, 0.5
"""Size of the square matrices, and minimum duration in seconds, of the measurement on a CPU."""


@dataclass(frozen=True)
class Peak:
    """Peak rate of a device.

    Attributes:
        flops: peak rate in FLOP/s; None if the rate is unknown.
        source: description of the origin of the value, for the user.
    """

    flops: float | None
    source: str


def matmul_format(precision: str, device: torch.device) -> str:
    """Returns the number format of matrix products for a recipe's key `precision`: one of `MATMUL_FORMATS`."""
    if precision in ("bf16", "fp16"):
        return "half"
    if precision == "tf32" and device.type == "cuda":
        return "tf32"
    return "float64" if precision == "float64" else "float32"


def device_peak(device: torch.device, precision: str) -> Peak:
    """Returns the peak FLOP/s of a device in the number format of a recipe's key `precision`."""
    if device.type == "cpu":
        source = f"measured: a product of {PROBE_SIZE} x {PROBE_SIZE} matrices ({precision})"
        return Peak(measure_matmul_flops(device, precision), source)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name not in DATASHEET_TFLOPS:
        return Peak(None, f"no datasheet entry for {name}")
    number_format = matmul_format(precision, device)
    flops = 1e12 * DATASHEET_TFLOPS[name][MATMUL_FORMATS.index(number_format)]
    format_text = {"half": "bf16/fp16"}.get(number_format, number_format)
    return Peak(flops, f"NVIDIA's datasheet, {format_text}, dense")


def measure_matmul_flops(device: torch.device, precision: str) -> float:
    """Measures the FLOP/s of the product of two large matrices. The result is the maximum over several products."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtypes.get(precision, torch.float32))
    seconds: list[float] = []
    first_start = time.perf_counter()
    while len(seconds) < 5 or time.perf_counter() - first_start < PROBE_SECONDS:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * PROBE_SIZE**3 / min(seconds)
