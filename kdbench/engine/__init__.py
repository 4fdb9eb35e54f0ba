"""Roles, terms and updates of a stage, checked before training and trained step by step.

`network` builds and runs the modules, `plan` checks a stage on the meta device, `train` has the step and the loop,
`distributed` the collectives, `state` what is saved and loaded, `evaluation` the metrics. No file here knows the name
of a method or parses a recipe."""
