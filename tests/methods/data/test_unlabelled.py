"""Tests methods that learn from images without labels: DHO, SEED, DisCo and temporal ensembling."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.recipes import StageHarness, build_stage, equal_weights
from helpers.shipped_recipes import resume_differences, run_recipe, short_recipe, top1_scores
from kdbench.config.load import load_recipe
from kdbench.data.loading.batch import MicroBatch


def build_method(name: str, *overrides: str, stage: int = 0) -> StageHarness:
    return build_stage(short_recipe(f"digits/{name}", "precision=float64", *overrides), stage=stage)


def batches(run: StageHarness, count: int = 1) -> list[MicroBatch]:
    """Returns the next batches by source."""
    run.network.train()
    return [window[0] for window in islice(run.windows(), count)]


def step_losses(run: StageHarness) -> dict[str, float]:
    """Takes a step and returns the loss of every term."""
    run.step(1)
    return dict(run.runner.read_log()[0].losses)


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    q, p = (target / temperature).softmax(1), (logits / temperature).softmax(1)
    return temperature**2 * (q * (q / p).log()).sum(1).mean()


# DHO


def dho_error(*overrides: str) -> float:
    """Returns the relative error of the three losses against the authors' formulas."""
    reference = build_method("dho")
    batch = batches(reference)[0]
    body, head, teacher = reference.model("body"), reference.model(), reference.model("teacher")

    def outputs(source: str) -> tuple[Tensor, Tensor, Tensor]:
        image = batch[source].fields["image"]
        feature = body.layer2(body.layer1(image.flatten(1)))
        return head.ce(feature), head.kd(feature), teacher(image)

    (ce, kd, target), (_, kd_all, target_all) = outputs("train"), outputs("all")
    expected = {
        "ce": F.cross_entropy(ce, batch["train"].fields["label"]),
        "kd": kl(target, kd, 2),
        "kd_all": kl(target_all, kd_all, 2),
    }
    losses = step_losses(build_method("dho", *overrides))
    return max(abs(losses[name] / value.item() - 1) for name, value in expected.items())


def test_dho_labels_train_one_head_and_the_teacher_trains_the_other():
    assert dho_error() < 1e-5
    assert dho_error("terms.kd.student=student:ce") > 1e-3  # control: one head for both
    labelled_images_alone = ("models.all_body.input=train.image", "models.all_teacher.input=train.image")
    assert dho_error(*labelled_images_alone) > 1e-3  # control


def head_changes(*overrides: str) -> tuple[float, float]:
    """Returns the largest weight change by one step in the labels' head and in the teacher's head."""
    run = build_method("dho", "optimizer={type: SGD, lr: 0.1}", *overrides)
    before, after = run.weights(), run.step(1).weights()
    ce_head, kd_head = (
        float((after[f"{name}.weight"] - before[f"{name}.weight"]).abs().max()) for name in ("ce", "kd")
    )
    return ce_head, kd_head


def test_dho_gradients_of_each_target_reach_its_head_alone():
    labels, teacher = head_changes("terms.kd=null", "terms.kd_all=null"), head_changes("terms.ce=null")
    assert labels[0] > 1e-4 and labels[1] == 0
    assert teacher[1] > 1e-4 and teacher[0] == 0
    shared = head_changes("terms.ce=null", "terms.kd.student=student:ce")
    assert shared[0] > 1e-4, "control: the teacher on the labels' head"


# SEED

FOLLOW = 1


def seed_error(*overrides: str, queue: bool = True) -> float:
    """Returns the error of the second step's loss against the cross-entropy over image and queue of the first step."""
    run = build_method("seed_queue", *overrides, stage=FOLLOW)
    first, second = batches(run, 2)
    teacher, student = run.model("teacher"), run.model()
    adapter = run.network.term("similar").edges[0].student.adapter
    step_losses(run)
    teacher.eval()
    with torch.no_grad():
        keys, teacher_embedding = (
            F.normalize(
                teacher.pool(teacher.layer3(teacher.layer2(teacher.layer1(b["train"].fields["image"]))))
            ).flatten(1)
            for b in (first, second)
        )
        student_embedding = F.normalize(
            adapter(student.layer2(student.layer1(second["train"].fields["image"].flatten(1))))
        )

    def similarities(rows: Tensor, temperature: float) -> Tensor:
        positive = (rows * teacher_embedding).sum(1, keepdim=True)
        return (torch.cat([positive, rows @ keys.T], 1) if queue else positive) / temperature

    expected = (
        -(similarities(teacher_embedding, 0.01).softmax(1) * similarities(student_embedding, 0.2).log_softmax(1))
        .sum(1)
        .mean()
    )
    return abs(step_losses(run)["similar"] - float(expected))


def test_seed_loss_compares_similarities_to_the_queue():
    assert seed_error() < 1e-6
    assert seed_error(queue=False) > 1e-3  # control: no queue
    assert seed_error("stages.follow.terms.similar.teacher_temperature=0.2") > 1e-3


def weights_after_following(*overrides: str) -> dict[str, Tensor]:
    return build_method("seed_queue", *overrides, stage=FOLLOW).step(3).weights()


def test_seed_student_is_independent_of_labels():
    wrong = "relabel={type: random_labels}"
    assert equal_weights(weights_after_following(), weights_after_following(wrong))
    labels = "stages.follow.terms.ce=cross_entropy"
    assert not equal_weights(weights_after_following(labels), weights_after_following(labels, wrong)), (
        "control: with a label loss, labels matter"
    )


# DisCo


def disco_views_error(*overrides: str) -> float:
    """Returns the relative error of the first stage against the squared errors of students' and teacher's tokens."""
    reference = build_method("disco")
    image = batches(reference)[0]["all"].fields["image"]

    def tokens(role: str) -> list[Tensor]:
        outputs: list[Tensor] = []
        model = reference.model(role)
        hooks = [model.blocks[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))]
        hooks += [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.blocks]
        with torch.no_grad():
            model(image)
        for hook in hooks:
            hook.remove()
        return outputs

    reference.model("teacher").eval()
    a, b, teacher = tokens("a"), tokens("b"), tokens("teacher")
    expected = {
        "lower": sum(F.mse_loss(s, t) for s, t in zip(a, teacher[:3], strict=True)),
        "upper": sum(F.mse_loss(s, t) for s, t in zip(b, teacher[2:], strict=True)),
    }
    losses = step_losses(build_method("disco", *overrides))
    return max(abs(losses[name] / float(value) - 1) for name, value in expected.items())


def test_each_disco_student_follows_one_half_of_the_teachers_layers():
    assert disco_views_error() < 1e-5
    same_half = "stages.views.terms.upper.teacher=['teacher:blocks.0/in', 'teacher:blocks.0', 'teacher:blocks.1']"
    assert disco_views_error(same_half) > 1e-3  # control


def disco_agreement_error(*overrides: str) -> tuple[float, float]:
    """Returns the relative error of the agreement loss against the squared error of the logits, and its weight."""
    reference = build_method("disco", stage=1)
    batch = batches(reference)[0]["all"].fields
    with torch.no_grad():
        logits_a, logits_b = reference.model("a")(batch["image"]), reference.model("b")(batch["other"])
    run = build_method("disco", *overrides, stage=1)
    run.step(1)
    means = run.runner.read_log()[0]
    error = abs(means.losses["agree"] / (2 * F.mse_loss(logits_a, logits_b).item()) - 1)
    return error, means.weighted["agree"] / means.losses["agree"]


def test_disco_students_agree_across_their_augmentations():
    error, weight = disco_agreement_error()
    assert error < 1e-5 and weight == pytest.approx(1 / 80)
    assert disco_agreement_error("stages.together.models.b_all.input=all.image")[0] > 1e-3  # control: one view for both


def test_disco_target_has_no_gradient():
    """Without labels, a student's update does not depend on the update of the other student."""
    agreement_alone = ("stages.together.terms.ce=null", "optimizer={type: SGD, lr: 0.1}")
    both = build_method("disco", *agreement_alone, stage=1).step(1).weights("a")
    one_sided = build_method(
        "disco",
        *agreement_alone,
        "stages.together.terms.agree.student=a_all",
        "stages.together.terms.agree.teacher=b_all",
        stage=1,
    )
    assert all(torch.allclose(value, both[name]) for name, value in one_sided.step(1).weights("a").items())
    with_gradient = (
        build_method("disco", *agreement_alone, "stages.together.terms.agree.teacher_grad=true", stage=1)
        .step(1)
        .weights("a")
    )
    assert not all(torch.allclose(value, both[name]) for name, value in with_gradient.items()), "control"


# Temporal ensembling


def temporal_ensembling_error(*overrides: str) -> tuple[float, float]:
    """Returns the consistency loss of the first epoch, and the relative error of the next step's loss.

    The expected loss of that step compares its predictions with those of the first epoch.
    """
    run = build_method("temporal_ensembling", *overrides)
    epoch = run.feed.steps_per_epoch
    expected_batches = batches(run, epoch + 1)
    predictions: list[Tensor] = []
    hook = run.model().register_forward_hook(lambda *call: predictions.append(call[2].detach().softmax(1)))
    run.step(epoch)
    hook.remove()
    first_epoch_loss = run.runner.read_log()[0].losses["consistency"]
    targets = torch.zeros(1000, 10, dtype=torch.float64)
    for batch, p in zip(expected_batches, predictions, strict=False):
        targets[batch["train"].fields["index"]] = p
    last = expected_batches[-1]["train"].fields
    with torch.no_grad():
        student = run.model()(last["image"]).softmax(1)
    expected = (student - targets[last["index"]]).square().mean().item()
    return first_epoch_loss, abs(step_losses(run)["consistency"] / expected - 1)


def test_temporal_ensembling_target_is_the_prediction_of_the_previous_epoch():
    first_epoch_loss, error = temporal_ensembling_error()
    assert first_epoch_loss == 0 and error < 1e-5
    assert temporal_ensembling_error("terms.consistency.mask=labelled")[1] > 1e-2  # control: labelled images alone


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("dho", 1), ("seed_queue", 3), ("disco", 3), ("temporal_ensembling", 1)])
def test_interrupted_run_resumes_with_its_queue_and_stage(name, step, tmp_path):
    assert resume_differences(short_recipe(f"digits/{name}"), tmp_path, step) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "role", "accuracy"), [("dho", "student", 93), ("seed_queue", "probe", 80)])
def test_full_run_learns_from_images_without_labels(name, role, accuracy, tmp_path):
    """Measured (seed 1): dho 96.9 with 50 labels; the probe of seed_queue 86.2, and 77.2 on an untrained student."""
    assert top1_scores(run_recipe(load_recipe(f"digits/{name}"), tmp_path / "run"), role)[-1] > accuracy


@pytest.mark.slow
def test_temporal_ensembling_improves_accuracy(tmp_path):
    """Measured (seed 1): 80.2 with the stored predictions, 68.5 from the 50 labels alone."""
    accuracy = top1_scores(run_recipe(load_recipe("digits/temporal_ensembling"), tmp_path / "run"))[-1]
    labels_alone = top1_scores(
        run_recipe(load_recipe("digits/temporal_ensembling", ["terms.consistency=null"]), tmp_path / "alone")
    )[-1]
    assert accuracy > labels_alone + 4
