"""Metrics, and the evaluation of roles on the evaluation splits."""
