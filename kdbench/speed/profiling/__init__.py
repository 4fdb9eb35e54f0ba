"""Measurements: the time of a step and its parts, the peak rates of a device, the latency of a model."""
