"""How many FLOPs a device could do in a second: by datasheet where it is known, measured on a CPU, else not claimed."""

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
"""Name as the driver gives it -> TFLOP/s of float32, TF32, bf16 and fp16, float64 with tensor cores, dense (without
sparsity), from NVIDIA's datasheets of the H100, H200 and A100. A part of a device (MIG) has another name and is not in
here."""


MATMUL_FORMATS = ("float32", "tf32", "half", "float64")


PROBE_SIZE, PROBE_SECONDS = 1024, 0.5


@dataclass(frozen=True)
class Peak:
    """flops: per second; None where it is not known. source: where the figure comes from, in words."""

    flops: float | None
    source: str


def matmul_format(precision: str, device: torch.device) -> str:
    """In which of `PRECISIONS` a recipe's products of matrices are done."""
    if precision in ("bf16", "fp16"):
        return "half"
    return (
        "tf32" if precision == "tf32" and device.type == "cuda" else "float64" if precision == "float64" else "float32"
    )


def device_peak(device: torch.device, precision: str) -> Peak:
    """What a device could do in a recipe's precision."""
    kind = matmul_format(precision, device)
    if device.type == "cpu":
        return Peak(
            measure_matmul_flops(device, precision), f"measured: a product of {PROBE_SIZE} x {PROBE_SIZE} matrices ({precision})"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name not in DATASHEET_TFLOPS:
        return Peak(None, f"not known for {name}")
    words = {"half": "bf16/fp16"}.get(kind, kind)
    return Peak(1e12 * DATASHEET_TFLOPS[name][MATMUL_FORMATS.index(kind)], f"NVIDIA's datasheet, {words}, dense")


def measure_matmul_flops(device: torch.device, precision: str) -> float:
    """FLOPs per second of the fastest of several products of two large matrices, with the threads that torch has."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtypes.get(precision, torch.float32))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < PROBE_SECONDS:
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * PROBE_SIZE**3 / min(times)
