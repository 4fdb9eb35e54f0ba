"""Helpers of the artifact tests: call recorders, models of finished stages, and a reference k-center."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.recipes import StageHarness, stage_sources
from helpers.shipped_recipes import saved_weights
from kdbench.config.schema import Recipe
from kdbench.experiment.run import Outcome
from kdbench.registry import MODELS


class CallRecorder:
    """Records the inputs and outputs of every forward of a class of modules.

    Attributes:
        calls: (inputs by name, output) of each call; the first two positional inputs are `student` and `teacher`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module_class: type[nn.Module]) -> None:
        self.calls: list[tuple[dict[str, Any], Any]] = []
        forward = module_class.forward

        def recording_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = forward(module, *args, **kwargs)
            self.calls.append((dict(zip(("student", "teacher"), args, strict=False)) | kwargs, output))
            return output

        monkeypatch.setattr(module_class, "forward", recording_forward)


def artifact_content(outcome: Outcome, name: str) -> dict[str, Any]:
    """Loads the stored artifact `STAGE.NAME`."""
    return torch.load(Path(outcome.folder.path) / "stages" / f"{name}.pt", weights_only=True)


def load_role_model(outcome: Outcome, role: str, stage: str, model_type: str, **params: Any) -> nn.Module:
    """Builds a role's model with its weights at the end of a stage, in eval mode and double precision."""
    model = MODELS.build(model_type, params, num_classes=10, in_channels=1, image_size=8)
    model.load_state_dict(saved_weights(outcome, role, stage))
    return model.double().eval()


def source_samples(recipe: Recipe, stage: str, source: str = "train") -> dict[str, Tensor]:
    """Returns all samples of a source in the order of the split, with evaluation images in double precision."""
    config = next(s for s in recipe.stages if s.name == stage)
    batches = list(stage_sources(recipe, config)[source].evaluation_batches(512))
    samples = {key: torch.cat([batch.fields[key] for batch in batches]) for key in batches[0].fields}
    return {**samples, "image": samples["image"].double()}


def greedy_k_center(points: Tensor, centers: list[int], count: int) -> list[int]:
    """Selects the point with the largest distance to its nearest center, `count` times; returns the rows in order."""
    distances = (points[:, None] - points[None]).square().sum(-1).sqrt()
    rows: list[int] = []
    for _ in range(count):
        nearest = distances[:, [*centers, *rows]].min(1).values
        nearest[[*centers, *rows]] = -1
        rows.append(int(nearest.argmax()))
    return rows


def top_rows_by_score(scores: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda row: -float(scores[row]))[:count])


def first_step_error(harness: StageHarness, loss: Any, *, role: str = "student", source: str = "train") -> float:
    """Returns the maximum deviation of a role's weights after the first step from plain SGD on `loss(batch)`.

    Args:
        harness: a stage before its first step.
        loss: function of the fields of the first batch of `source`; returns a scalar that depends on the role's
            current weights.
        role: the updated role.
        source: the source of the batch.
    """
    window = next(harness.windows())
    model = harness.model(role)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss(window[0][source].fields), list(model.parameters()), allow_unused=True)
    params = harness.plan.stage.optimizer.params
    expected = {
        name: p.detach() - params["lr"] * (g + params["weight_decay"] * p.detach())
        for name, p, g in zip(names, model.parameters(), gradients, strict=True)
        if g is not None
    }
    harness.runner.begin_step()
    harness.runner.step(window)
    parameters = dict(model.named_parameters())
    return max(float((parameters[name].detach() - value).abs().max()) for name, value in expected.items())
