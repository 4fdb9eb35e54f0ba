"""Presentation of results: console, TensorBoard, figures, summaries, tables. Nothing here trains or evaluates."""
