"""What the tests of choosing and making data share: spies on parts, models as a stage left them, plain k-center."""

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
    """Records what a part is called with, and what it gives."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.calls: list[tuple[dict[str, Any], Any]] = []
        forward = kind.forward

        def watched(part: nn.Module, *args: Any, **given: Any) -> Any:
            out = forward(part, *args, **given)
            self.calls.append((dict(zip(("student", "teacher"), args, strict=False)) | given, out))
            return out

        patch.setattr(kind, "forward", watched)


def artifact_content(outcome: Outcome, name: str) -> dict[str, Any]:
    """The content of `STAGE.NAME`."""
    return torch.load(Path(outcome.folder.path) / "stages" / f"{name}.pt", weights_only=True)


def load_role_model(outcome: Outcome, role: str, stage: str, kind: str, **params: Any) -> nn.Module:
    """A role's model as a stage left it, in eval mode and double precision."""
    built = MODELS.build(kind, params, num_classes=10, in_channels=1, image_size=8)
    built.load_state_dict(saved_weights(outcome, role, stage))
    return built.double().eval()


def source_samples(recipe: Recipe, stage: str, source: str = "train") -> dict[str, Tensor]:
    """All samples of a source in the order of the split, images as evaluation sees them, in double precision."""
    config = next(s for s in recipe.stages if s.name == stage)
    batches = list(stage_sources(recipe, config)[source].evaluation_batches(512))
    found = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return {**found, "image": found["image"].double()}


def greedy_k_center(points: Tensor, centres: list[int], count: int) -> list[int]:
    """Each time the point whose nearest centre is farthest, as the formula reads. Returns the rows in their order."""
    apart = (points[:, None] - points[None]).square().sum(-1).sqrt()
    chosen: list[int] = []
    for _ in range(count):
        nearest = apart[:, [*centres, *chosen]].min(1).values
        nearest[[*centres, *chosen]] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def top_rows_by_score(scores: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda row: -float(scores[row]))[:count])


def first_step_error(bench: StageHarness, loss: Any, *, role: str = "student", source: str = "train") -> float:
    """How far the first step of a role, the student, is from that of plain SGD on `loss(batch)`; best: 0.

    Args:
        loss: from the fields of the first batch of `source` to a scalar, with the role's present weights.
    """
    window = next(bench.windows())
    student = bench.model(role)
    names = [name for name, _ in student.named_parameters()]
    gradients = torch.autograd.grad(loss(window[0][source]), list(student.parameters()), allow_unused=True)
    params = bench.plan.stage.optimizer.params
    expected = {
        name: p.detach() - params["lr"] * (g + params["weight_decay"] * p.detach())
        for name, p, g in zip(names, student.parameters(), gradients, strict=True)
        if g is not None
    }
    bench.runner.begin_step()
    bench.runner.step(window)
    now = dict(student.named_parameters())
    return max(float((now[name].detach() - value).abs().max()) for name, value in expected.items())
