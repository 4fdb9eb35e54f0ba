"""Presentation of results: console, TensorBoard, figures, summaries, tables.

Training and evaluation are not part of it.
"""
