"""Measurements: the time of a step and of its parts, the peak FLOP/s of a device, the latency of a model."""
