"""One training step and the loop around it: updates, optimizers, averages, loss meters.

The operations of a step do not wait for the device. Log lines, evaluations and checkpoints do.
"""
