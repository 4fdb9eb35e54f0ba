"""Registered networks, and modules that process the features or the weights of another network.

The subpackages `cifar` and `small` contain complete networks. The modules of this package contain heads, gates,
generators, discriminators, weight transforms (quantization, pruning), and the models of torchvision and timm. The
code of a network does not depend on the recipe, the loss terms or other networks.
"""
