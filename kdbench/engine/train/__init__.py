"""One training step and the loop around it: updates, optimizers, averages, meters. Nothing here
waits for the device."""
