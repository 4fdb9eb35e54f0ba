"""Tests teachers with more than logits: heads on their stages, shallow layers for deep ones, a weight per sample.

The recipes need no change of engine, schema or loader:

    digits/hsakd (HSAKD): the recipe and one class, the term `joint_cross_entropy` (kdbench/terms/logits.py).
    digits/review (ReviewKD): the recipe and one class, the model `review_fusion` (kdbench/models/heads.py).
    digits/wsld (WSLD): the recipe and one class, the sample weight `loss_ratio` (kdbench/wiring/sample_weights.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.artifact_data import first_step_error
from helpers.recipes import build_stage
from helpers.shipped_recipes import resume_differences, run_recipe, short_recipe, top1_scores
from kdbench.config.load import load_recipe

SGD = "optimizer={type: SGD, lr: 1, momentum: 0, nesterov: false, weight_decay: 0}"

# HSAKD


def hsakd_error(*overrides: str) -> float:
    """Returns the error of the student's first step against labels, turned logits and every head on turned images."""
    harness = build_stage(
        short_recipe("digits/hsakd", "precision=float64", f"stages.distil.{SGD}", *overrides), stage=1
    )
    student, teacher = harness.model(), harness.model("teacher")

    def outputs(network: nn.Module, heads: str, image: Tensor) -> list[Tensor]:
        maps, layers = [], (network.layer1, network.layer2, network.layer3)
        hooks = [layer.register_forward_hook(lambda *call: maps.append(call[2])) for layer in layers]
        logits = network(image)
        for hook in hooks:
            hook.remove()
        return [logits, *(harness.model(f"{heads}{number}")(features) for number, features in enumerate(maps, 1))]

    def loss(batch):
        total = F.cross_entropy(student(batch["image"]), batch["label"])
        turns = batch["turned_turns"].tolist()
        turned = torch.stack([torch.rot90(i, n, (1, 2)) for i, n in zip(batch["image"], turns, strict=True)])
        for student_logits, teacher_logits in zip(
            outputs(student, "s", turned), outputs(teacher, "t", turned), strict=True
        ):
            kl = F.kl_div(
                (student_logits / 3).log_softmax(1), (teacher_logits.detach() / 3).softmax(1), reduction="batchmean"
            )
            total = total + 9 * kl
        return total

    return first_step_error(harness, loss)


def test_hsakd_step_equals_the_formula_for_every_head():
    assert hsakd_error() < 1e-10


def test_control_hsakd_on_upright_images_or_with_heads_of_other_stages_takes_another_step():
    assert hsakd_error("stages.distil.models.student_turned.input=train.image") > 1e-5
    assert hsakd_error("stages.distil.terms.heads.teacher=[t3,t1,t2]") > 1e-5


def joint_accuracy(*overrides: str) -> float:
    """Returns the accuracy of the teacher's deepest head on class and turn of its training images."""
    harness = build_stage(short_recipe("digits/hsakd", *overrides, steps=150)).step(150)
    backbone, head, maps = harness.model("teacher"), harness.model("t3").eval(), []
    backbone.layer3.register_forward_hook(lambda *call: maps.append(call[2]))
    batch = next(iter(harness.sources["train"].evaluation_batches(300))).fields
    accuracy = 0.0
    with torch.no_grad():
        for turns in range(4):
            backbone(torch.rot90(batch["image"], turns, (2, 3)))
            accuracy += float((head(maps[-1]).argmax(1) == 4 * batch["label"] + turns).float().mean()) / 4
    return accuracy


def test_hsakd_teacher_heads_learn_class_and_turn_jointly():
    upright = [f"models.t{number}.input=teacher:layer{number}" for number in (1, 2, 3)]
    assert joint_accuracy() > 2 * joint_accuracy(*upright)


@pytest.mark.slow
def test_interrupted_hsakd_resumes_in_its_stage(tmp_path):
    assert resume_differences(short_recipe("digits/hsakd", steps=2), tmp_path, 3) == []


# ReviewKD

SHALLOW = (
    "terms.ce.weight=0",
    "terms.review={student: ['r1:logits'], teacher: ['teacher:layer1'], weight: 1}",
    "optimizer={type: SGD, lr: 1, momentum: 0, weight_decay: 0}",
)


def updated_layers(*overrides: str) -> set[str]:
    """Returns the student's layers that a loss on the teacher's first layer alone updates."""
    harness = build_stage(short_recipe("digits/review", *SHALLOW, *overrides))
    before, after = harness.weights(), harness.step().weights()
    kernels = [name for name in before if before[name].dim() == 4]
    return {name.split(".")[0] for name in kernels if not torch.equal(before[name], after[name])}


def test_review_of_the_teachers_first_layer_updates_every_layer_of_the_student():
    assert updated_layers() == {"conv1", "layer1", "layer2", "layer3"}


def test_control_without_fusion_the_teachers_first_layer_updates_the_first_layers_alone():
    no_fusion = ("models.r1.model.fuse=false", "models.r1.input=student:layer1")
    assert updated_layers(*no_fusion) == {"conv1", "layer1"}


def review_error(*overrides: str) -> float:
    """Returns the error of the student's first step against labels and all levels of the review."""
    quick = (SHALLOW[2], "terms.review.weight=5", "precision=float64")
    harness = build_stage(short_recipe("digits/review", *quick, *overrides))
    student, teacher = harness.model(), harness.model("teacher")
    layers = ("layer1", "layer2", "layer3", "pool")

    def features(network: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        hooks = [getattr(network, layer).register_forward_hook(lambda *call: maps.append(call[2])) for layer in layers]
        logits = network(image)
        for hook in hooks:
            hook.remove()
        return logits, maps

    def levels(student_map: Tensor, teacher_map: Tensor) -> Tensor:
        sizes = [size for size in (4, 2, 1) if student_map.dim() == 4 and size < student_map.shape[2]]
        losses = [F.mse_loss(student_map, teacher_map)]
        losses += [
            F.mse_loss(F.adaptive_avg_pool2d(student_map, s), F.adaptive_avg_pool2d(teacher_map, s)) for s in sizes
        ]
        weights = [0.5**power for power in range(len(losses))]
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)

    def loss(batch):
        logits, student_maps = features(student, batch["image"])
        with torch.no_grad():
            _, teacher_maps = features(teacher, batch["image"])
        total, deeper = F.cross_entropy(logits, batch["label"]), None
        # The deepest level comes first: each fusion reads the fused map of the level below.
        for level in (3, 2, 1, 0):
            fusion = harness.model(f"r{level + 1}")
            fused = fusion.enter(student_maps[level] if level < 3 else student_maps[level][:, :, None, None])
            if deeper is not None:
                # Nearest-neighbour upsampling in plain indexing, independent of the model's interpolation.
                upsampled = deeper.repeat_interleave(fused.shape[2] // deeper.shape[2], 2)
                upsampled = upsampled.repeat_interleave(fused.shape[3] // deeper.shape[3], 3)
                attention = fusion.weights(torch.cat([fused, upsampled], 1))
                fused = fused * attention[:, 0, None] + upsampled * attention[:, 1, None]
            deeper, out = fused, fusion.leave(fused)
            total = total + 5 * levels(out if level < 3 else out.flatten(1), teacher_maps[level])
        return total

    return first_step_error(harness, loss)


def test_review_step_equals_the_formula():
    assert review_error() < 1e-10


def test_control_review_with_another_order_of_levels_takes_another_step():
    assert review_error("models.r1.input=['student:layer1', 'r3:fused']") > 1e-5


@pytest.mark.slow
def test_interrupted_review_resumes(tmp_path):
    assert resume_differences(short_recipe("digits/review", steps=3), tmp_path, 2) == []


# WSLD


def wsld_error(*overrides: str) -> float:
    harness = build_stage(short_recipe("digits/wsld", "precision=float64", SHALLOW[2], *overrides))
    student, teacher = harness.model(), harness.model("teacher")

    def loss(batch):
        z, t = student(batch["image"]), teacher(batch["image"]).detach()
        hard, teacher_loss = (F.cross_entropy(logits, batch["label"], reduction="none") for logits in (z, t))
        weights = 1 - (-hard.detach() / (teacher_loss + 1e-7)).exp()
        soft = -((t / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1)
        return hard.mean() + 2.5 * 4 * (weights * soft).mean()

    return first_step_error(harness, loss)


def test_wsld_step_equals_the_formula():
    assert wsld_error() < 1e-10


def test_control_wsld_with_equal_or_other_sample_weights_takes_another_step():
    assert wsld_error("terms.kd.sample_weight=null") > 1e-5
    assert wsld_error("terms.kd.sample_weight=confidence") > 1e-5


# Full runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"), [("hsakd", 94), ("review", 95), ("wsld", 95)]
)  # seed 1: 96.2, 97.2, 97.5
def test_full_run_reaches_the_accuracy(name, accuracy, tmp_path):
    assert top1_scores(run_recipe(load_recipe(f"digits/{name}", []), tmp_path / "run"))[-1] > accuracy
