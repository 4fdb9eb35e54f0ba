"""What a teacher gives besides its logits: heads on its stages, its shallow layers for deep ones, a weight per sample.

Written from the documentation alone, without a change of `kdbench/engine`, a schema or the loader. What each needed:

    digits/hsakd (HSAKD): the recipe and one class, the term `joint_cross_entropy` (kdbench/terms/logits.py).
    digits/review (ReviewKD): the recipe and one class, the model `review_fusion` (kdbench/models/heads.py).
    digits/wsld (WSLD): the recipe and one class, the weigher `loss_ratio` (kdbench/wiring/sample_weights.py).
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


def heads_differ(*overrides: str) -> float:
    """How far the student's first step is from one by labels, turned logits and each of its heads on turned images."""
    found = build_stage(short_recipe("digits/hsakd", "precision=float64", f"stages.distil.{SGD}", *overrides), stage=1)
    student, teacher = found.model(), found.model("teacher")

    def staged(network: nn.Module, heads: str, image: Tensor) -> list[Tensor]:
        maps, layers = [], (network.layer1, network.layer2, network.layer3)
        hooks = [layer.register_forward_hook(lambda *call: maps.append(call[2])) for layer in layers]
        said = network(image)
        for hook in hooks:
            hook.remove()
        return [said, *(found.model(f"{heads}{number}")(seen) for number, seen in enumerate(maps, 1))]

    def loss(batch):
        total = F.cross_entropy(student(batch["image"]), batch["label"])
        turns = batch["turned_turns"].tolist()
        turned = torch.stack([torch.rot90(i, n, (1, 2)) for i, n in zip(batch["image"], turns, strict=True)])
        for ours, theirs in zip(staged(student, "s", turned), staged(teacher, "t", turned), strict=True):
            kl = F.kl_div((ours / 3).log_softmax(1), (theirs.detach() / 3).softmax(1), reduction="batchmean")
            total = total + 9 * kl
        return total

    return first_step_error(found, loss)


def test_each_head_on_turned_images_follows_the_teachers_head_of_that_stage():
    assert heads_differ() < 1e-10


def test_control_upright_images_or_heads_of_other_stages_move_the_student_elsewhere():
    assert heads_differ("stages.distil.models.student_turned.input=train.image") > 1e-5
    assert heads_differ("stages.distil.terms.heads.teacher=[t3,t1,t2]") > 1e-5


def share_of_pairs(*overrides: str) -> float:
    """How often the deepest of the teacher's heads says both class and turn of the images that it learnt from."""
    found = build_stage(short_recipe("digits/hsakd", *overrides, steps=150)).step(150)
    backbone, head, maps = found.model("teacher"), found.model("t3").eval(), []
    backbone.layer3.register_forward_hook(lambda *call: maps.append(call[2]))
    batch = next(iter(found.sources["train"].evaluation_batches(300)))
    right = 0.0
    with torch.no_grad():
        for turns in range(4):
            backbone(torch.rot90(batch["image"], turns, (2, 3)))
            right += float((head(maps[-1]).argmax(1) == 4 * batch["label"] + turns).float().mean()) / 4
    return right


def test_the_teachers_heads_learn_class_and_turn_together():
    upright = [f"models.t{number}.input=teacher:layer{number}" for number in (1, 2, 3)]
    assert share_of_pairs() > 2 * share_of_pairs(*upright)


def test_hsakd_goes_on_in_the_stage_where_it_was_stopped(tmp_path):
    assert resume_differences(short_recipe("digits/hsakd", steps=2), tmp_path, 3) == []


# ReviewKD

SHALLOW = (
    "terms.ce.weight=0",
    "terms.review={student: ['r1:logits'], teacher: ['teacher:layer1'], weight: 1}",
    "optimizer={type: SGD, lr: 1, momentum: 0, weight_decay: 0}",
)


def layers_taught(*overrides: str) -> set[str]:
    """The layers of the student that the teacher's first layer alone moves."""
    found = build_stage(short_recipe("digits/review", *SHALLOW, *overrides))
    before, after = found.weights(), found.step().weights()
    kernels = [name for name in before if before[name].dim() == 4]
    return {name.split(".")[0] for name in kernels if not torch.equal(before[name], after[name])}


def test_the_teachers_first_layer_teaches_every_layer_of_the_student():
    assert layers_taught() == {"conv1", "layer1", "layer2", "layer3"}


def test_control_without_fusion_it_teaches_the_first_alone():
    alone = ("models.r1.model.fuse=false", "models.r1.input=student:layer1")
    assert layers_taught(*alone) == {"conv1", "layer1"}


def review_differs(*overrides: str) -> float:
    """How far the student's first step is from one by labels and all levels of the review."""
    quick = (SHALLOW[2], "terms.review.weight=5", "precision=float64")
    found = build_stage(short_recipe("digits/review", *quick, *overrides))
    student, teacher = found.model(), found.model("teacher")
    layers = ("layer1", "layer2", "layer3", "pool")

    def features(network: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = []
        hooks = [getattr(network, layer).register_forward_hook(lambda *call: seen.append(call[2])) for layer in layers]
        said = network(image)
        for hook in hooks:
            hook.remove()
        return said, seen

    def levels(ours: Tensor, theirs: Tensor) -> Tensor:
        sizes = [size for size in (4, 2, 1) if ours.dim() == 4 and size < ours.shape[2]]
        apart = [F.mse_loss(ours, theirs)]
        apart += [F.mse_loss(F.adaptive_avg_pool2d(ours, s), F.adaptive_avg_pool2d(theirs, s)) for s in sizes]
        shares = [0.5**power for power in range(len(apart))]
        return sum(share * loss for share, loss in zip(shares, apart, strict=True)) / sum(shares)

    def loss(batch):
        said, seen = features(student, batch["image"])
        with torch.no_grad():
            _, wanted = features(teacher, batch["image"])
        total, deeper = F.cross_entropy(said, batch["label"]), None
        for level in (3, 2, 1, 0):
            fusion = found.model(f"r{level + 1}")
            own = fusion.enter(seen[level] if level < 3 else seen[level][:, :, None, None])
            if deeper is not None:
                below = deeper.repeat_interleave(own.shape[2] // deeper.shape[2], 2)
                below = below.repeat_interleave(own.shape[3] // deeper.shape[3], 3)
                share = fusion.weights(torch.cat([own, below], 1))
                own = own * share[:, 0, None] + below * share[:, 1, None]
            deeper, out = own, fusion.leave(own)
            total = total + 5 * levels(out if level < 3 else out.flatten(1), wanted[level])
        return total

    return first_step_error(found, loss)


def test_the_student_moves_by_every_level_of_the_review():
    assert review_differs() < 1e-10


def test_control_another_order_of_levels_moves_it_elsewhere():
    assert review_differs("models.r1.input=['student:layer1', 'r3:fused']") > 1e-5


def test_review_goes_on_where_it_was_stopped(tmp_path):
    assert resume_differences(short_recipe("digits/review", steps=3), tmp_path, 2) == []


# WSLD


def wsld_differs(*overrides: str) -> float:
    found = build_stage(short_recipe("digits/wsld", "precision=float64", SHALLOW[2], *overrides))
    student, teacher = found.model(), found.model("teacher")

    def loss(batch):
        z, t = student(batch["image"]), teacher(batch["image"]).detach()
        hard, known = (F.cross_entropy(said, batch["label"], reduction="none") for said in (z, t))
        counts = 1 - (-hard.detach() / (known + 1e-7)).exp()
        soft = -((t / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1)
        return hard.mean() + 2.5 * 4 * (counts * soft).mean()

    return first_step_error(found, loss)


def test_soft_labels_count_by_what_the_student_lacks_of_the_hard_one():
    assert wsld_differs() < 1e-10


def test_control_all_samples_alike_or_by_the_teachers_confidence_move_it_elsewhere():
    assert wsld_differs("terms.kd.weigh=null") > 1e-5
    assert wsld_differs("terms.kd.weigh=confidence") > 1e-5


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar"), [("hsakd", 94), ("review", 95), ("wsld", 95)])  # seed 1: 96.2, 97.2, 97.5
def test_a_whole_run_learns(name, bar, tmp_path):
    assert top1_scores(run_recipe(load_recipe(f"digits/{name}", []), tmp_path / "run"))[-1] > bar
