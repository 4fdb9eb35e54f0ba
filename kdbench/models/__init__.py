"""Networks and parts of networks by name. A model here knows no role, term or recipe.

`cifar` and `small` hold whole networks; the modules beside them hold parts (heads, gates, generators), functions of
weights (quantization, pruning) and the builders of torchvision and timm models."""
