"""Registered networks, and modules that work on another network's features or weights.

`cifar` and `small` contain whole networks. The modules in this folder contain heads, gates, generators and
discriminators, weight transforms (quantization, pruning), and the models of torchvision and timm. A model knows no
role, term or recipe.
"""
