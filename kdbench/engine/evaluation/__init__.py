"""Metrics, and the evaluation of roles (networks) on validation and test splits."""
