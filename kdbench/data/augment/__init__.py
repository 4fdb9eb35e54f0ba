"""Augmentations by name, and the view that applies a list of them to a batch on the device."""
