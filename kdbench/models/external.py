"""Models of torchvision (`torchvision/resnet18`) and timm (`timm/vit_tiny_patch16_224`), built by the library."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from kdbench.errors import CheckpointError, ConfigError, suggest

# Auxiliary classifiers make the output a tuple in train mode; the term that wants one can read a feature instead.
SINGLE_OUTPUT: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")


def build_torchvision(name: str, num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """Builds a classifier of torchvision.

    Args:
        name: as torchvision calls it.
        num_classes: size of the classifier.
        weights: None for a random start, or a name of the model's weights, such as DEFAULT or IMAGENET1K_V1, which
            torchvision keeps in its cache or downloads. When they were trained on another number of classes, the
            classifier keeps its random start.

    Raises:
        ConfigError: the model has no weights of that name.
        CheckpointError: the weights can neither be found nor downloaded.
    """
    from torchvision import models

    options = SINGLE_OUTPUT.get(name, {})
    if weights is None:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ConfigError(f"model 'torchvision/{name}': no weights {weights!r}.{suggest(weights, known.__members__)}")
    chosen = known[weights]
    if options:
        options = {**options, "transform_input": True}  # these weights expect Inception's own input scale
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space, or a damaged file
        raise CheckpointError(
            f"model 'torchvision/{name}': weights {weights} cannot be fetched from {chosen.url} ({error}). Where there "
            "is no network, leave `weights` out, or load a file with the role's `weights: {path: ...}`."
        ) from None
    classes = len(chosen.meta["categories"])
    _load_except_classifier(model, {k: v for k, v in state.items() if not options or not k.startswith(AUXILIARY_PREFIXES)}, classes)
    return model


def _load_except_classifier(model: nn.Module, state: dict[str, Tensor], classes: int) -> None:
    """Loads a whole state dict, except tensors of the classifier when it has another number of classes."""
    own = model.state_dict()
    head = [k for k, v in state.items() if k in own and v.shape != own[k].shape and v.shape[0] == classes]
    result = model.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == set(head), result


def build_timm(
    name: str, num_classes: int = 1000, in_channels: int = 3, pretrained: bool = False, image_size: int | None = None
) -> nn.Module:
    """Builds a model of timm.

    Args:
        name: as timm calls it, without the tag of its weights.
        num_classes: size of the classifier.
        in_channels: channels of the image.
        pretrained: load timm's default weights, which it keeps in its cache or downloads; timm fits the first
            convolution and leaves a classifier of another size at its random start.
        image_size: height and width of the image; only models that must know it (vision transformers) read it.

    Raises:
        CheckpointError: the weights can neither be found nor downloaded.
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
        # Only faults of the download become a message; anything else is a bug and keeps its traceback.
        origin = type(error).__module__.split(".")[0]
        if isinstance(error, OSError) or origin in ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub"):
            raise CheckpointError(
                f"model 'timm/{name}': its weights cannot be fetched ({error}). Where there is no network, leave "
                "`pretrained` out, or load a file with the role's `weights: {path: ...}`."
            ) from None
        raise
