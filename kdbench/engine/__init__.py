"""Roles, terms and updates of a stage, which are checked before training and then trained step by step.

`network` builds and runs the modules. `plan` checks a stage on the meta device. `train` contains the step and the
loop. `distributed` contains the collectives. `state` saves and loads. `evaluation` computes metrics. No file in this
package knows the name of a method or parses a recipe.
"""
