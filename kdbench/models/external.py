"""Functions that build models of torchvision (`torchvision/resnet18`) and timm (`timm/vit_tiny_patch16_224`)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from kdbench.errors import CheckpointError, ConfigError, suggest

# Auxiliary classifiers would make the output a tuple in train mode.
SINGLE_OUTPUT: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")


def build_torchvision(name: str, num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """Builds a torchvision classifier.

    Args:
        name: name of the model in torchvision, such as resnet18.
        num_classes: number of outputs of the classifier.
        weights: name of pretrained weights of the model, such as DEFAULT or IMAGENET1K_V1, which torchvision
            downloads into its cache. If the weights have another number of classes, the classifier keeps its random
            initialisation. None: all layers are initialised randomly.

    Raises:
        ConfigError: torchvision has no weights of this name for the model.
        CheckpointError: the weights are not in the cache and cannot be downloaded.
    """
    from torchvision import models

    options = SINGLE_OUTPUT.get(name, {})
    if weights is None:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)
    released = models.get_model_weights(name)
    if weights not in released.__members__:
        raise ConfigError(
            f"model 'torchvision/{name}': torchvision has no weights {weights!r} for this model."
            f"{suggest(weights, released.__members__)}"
        )
    entry = released[weights]
    if options:
        options = {**options, "transform_input": True}  # these weights expect Inception's input scale
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    try:
        state = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no disk space, or a damaged file
        raise CheckpointError(
            f"model 'torchvision/{name}': the weights {weights} cannot be downloaded from {entry.url} ({error}). "
            "Without internet access, remove the parameter `weights` of the model, or load a local file with the key "
            "`weights: {path: ...}` of the role."
        ) from None
    if options:  # the model was built without auxiliary classifiers
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY_PREFIXES)}
    _load_except_classifier(model, state, len(entry.meta["categories"]))
    return model


def _load_except_classifier(model: nn.Module, state: dict[str, Tensor], classes: int) -> None:
    """Loads pretrained weights into a model. If the numbers of classes differ, the classifier is not loaded.

    Args:
        model: model that receives the weights.
        state: pretrained state dict.
        classes: number of classes of the pretrained weights.
    """
    model_state = model.state_dict()
    head = [
        key
        for key, value in state.items()
        if key in model_state and value.shape != model_state[key].shape and value.shape[0] == classes
    ]
    result = model.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == set(head), result


def build_timm(
    name: str, num_classes: int = 1000, in_channels: int = 3, pretrained: bool = False, image_size: int | None = None
) -> nn.Module:
    """Builds a timm model.

    Args:
        name: name of the model in timm, without the tag of pretrained weights (`.a1_in1k`).
        num_classes: number of outputs of the classifier.
        in_channels: channels of the image.
        pretrained: whether to load timm's default weights, which timm downloads into its cache. timm adapts the first
            convolution to `in_channels`. If the weights have another number of classes, the classifier keeps its
            random initialisation.
        image_size: height and width of the image. Only models of fixed input size (vision transformers) use this
            number.

    Raises:
        CheckpointError: the weights are not in the cache and cannot be downloaded.
    """
    timm = importlib.import_module("timm")
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    options: dict[str, Any] = {"img_size": image_size} if fixed and image_size is not None else {}

    def create(pretrained: bool) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options)

    if not pretrained:
        return create(False)
    try:
        return create(True)
    except Exception as error:
        # Only download errors become a message; any other error is a bug and keeps its traceback.
        library = type(error).__module__.split(".")[0]
        if isinstance(error, OSError) or library in ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub"):
            raise CheckpointError(
                f"model 'timm/{name}': the pretrained weights cannot be downloaded ({error}). Without internet access, "
                "remove the parameter `pretrained` of the model, or load a local file with the key "
                "`weights: {path: ...}` of the role."
            ) from None
        raise
