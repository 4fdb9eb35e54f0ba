"""Checks before training: shape inference on the meta device, a dry run of one step, requirements on the data."""
