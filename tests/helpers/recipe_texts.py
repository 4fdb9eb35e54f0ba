"""Holds the recipe texts of several tests."""

from __future__ import annotations

KD_RECIPE = """\
dataset: digits
teacher: digits_cnn
student: digits_mlp
epochs: 3
optimizer: {type: SGD, lr: 0.1, momentum: 0.9}
terms:
  ce: {type: cross_entropy, weight: 0.1}
  kd: {type: kd, temperature: 4, weight: 0.9}
"""
"""A plain recipe to which tests add keys."""
