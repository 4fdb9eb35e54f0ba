"""Builders of the models of torchvision (`torchvision/resnet18`) and timm (`timm/vit_tiny_patch16_224`)."""

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
        name: torchvision's name of the model.
        num_classes: outputs of the classifier.
        weights: None for random initialisation, or the name of pretrained weights of the model, such as DEFAULT or
            IMAGENET1K_V1; torchvision downloads them into its cache. If they have another number of classes, the
            classifier keeps its random initialisation.

    Raises:
        ConfigError: the model has no weights of this name.
        CheckpointError: the weights are not in the cache and cannot be downloaded.
    """
    from torchvision import models

    options = SINGLE_OUTPUT.get(name, {})
    if weights is None:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)
    released = models.get_model_weights(name)
    if weights not in released.__members__:
        raise ConfigError(
            f"model 'torchvision/{name}': no weights {weights!r}.{suggest(weights, released.__members__)}"
        )
    entry = released[weights]
    if options:
        options = {**options, "transform_input": True}  # these weights expect Inception's input scale
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    try:
        state = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no disk space, or a damaged file
        raise CheckpointError(
            f"model 'torchvision/{name}': weights {weights} cannot be downloaded from {entry.url} ({error}). Without a "
            "network, remove `weights`, or load a file with the role's `weights: {path: ...}`."
        ) from None
    if options:  # the model was built without auxiliary classifiers
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY_PREFIXES)}
    _load_except_classifier(model, state, len(entry.meta["categories"]))
    return model


def _load_except_classifier(model: nn.Module, state: dict[str, Tensor], classes: int) -> None:
    """Loads a state dict, but leaves out the classifier if the model has another number of classes.

    Args:
        model: the model to load into.
        state: pretrained weights.
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
        name: timm's name of the model, without the tag of the weights.
        num_classes: outputs of the classifier.
        in_channels: channels of the image.
        pretrained: load timm's default weights, which timm downloads into its cache. timm adapts the first convolution;
            a classifier of another size keeps its random initialisation.
        image_size: height and width of the image; used only by models of fixed input size (vision transformers).

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
                f"model 'timm/{name}': its weights cannot be downloaded ({error}). Without a network, remove "
                "`pretrained`, or load a file with the role's `weights: {path: ...}`."
            ) from None
        raise
