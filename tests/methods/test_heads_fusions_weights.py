"""Methods written by a newcomer from the documentation alone, each a recipe with at most one new registered class.

Like those of test_openness.py, none of them touched `kdbench/engine`, a schema or the loader. What each needed:

    digits/cv_dd (CV-DD, m090): the recipe alone.
    digits/infer (INFER, m089): the recipe and one class, the model `shared_pattern` (kdbench/models/generators.py).
    digits/hsakd (HSAKD): the recipe and one class, the term `joint_cross_entropy` (kdbench/terms/joint.py).
    digits/review (ReviewKD): the recipe and one class, the model `review_fusion` (kdbench/models/review.py).
    digits/wsld (WSLD): the recipe and one class, the weigher `loss_ratio` (kdbench/terms/weighers.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from made_data import first_move, made, pool
from support import bench
from torch import Tensor, nn
from torch.nn import functional as F
from wiring import play, resume_differs, scores, shortened

from kdbench.config.load import load_recipe

# CV-DD

PRIOR = torch.tensor([93.7, 93.8, 95.0]).double()
SGD = "optimizer={type: SGD, lr: 1, momentum: 0, nesterov: false, weight_decay: 0}"


def statistics_apart(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a network says of images, and how far what its BatchNorms see is from their memory; the first counts ten."""
    apart, hooks = [], []

    def compare(norm: nn.BatchNorm2d, seen: tuple[Tensor], _: Tensor) -> None:
        rows = seen[0].transpose(0, 1).flatten(1)
        mean, variance = rows.mean(1), rows.var(1, unbiased=False)
        apart.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(compare))
    said = network(images)
    for hook in hooks:
        hook.remove()
    return said, sum(apart) + 9 * apart[0]


def images_differ(*overrides: str) -> float:
    """How far the images' first step is from the committee's, of the length of that step."""
    found = bench(shortened("digits/cv_dd", "precision=float64", f"stages.recover.{SGD}", *overrides))
    bank, before = found.model("bank"), found.weights("bank")["pixels"]
    votes = (PRIOR / 5).softmax(0)

    def loss(batch):
        total = 0
        for vote, name in zip(votes, "abc", strict=True):
            said, apart = statistics_apart(found.model(name), bank(batch["index"]))
            total = total + vote * (F.cross_entropy(said, batch["label"]) + 0.1 * apart)
        return total

    apart = first_move(found, loss, role="bank", source="targets")
    return apart / float((found.weights("bank")["pixels"] - before).abs().max())


def test_each_network_votes_on_the_images_by_what_it_does_alone():
    assert images_differ() < 1e-3  # the recipe has the votes with four digits


def test_control_equal_votes_or_one_network_move_the_images_elsewhere():
    equal = [f"stages.recover.terms.{term}_{name}.weight=0.3333" for term in ("class", "first") for name in "abc"]
    assert images_differ(*equal) > 0.03
    assert images_differ("stages.recover.terms.class_c=null") > 0.03


LEARN = ("stages.learn.data.train.made=null", "stages.learn.data.train.dataset=digits", f"stages.learn.{SGD}")


def labels_differ(*overrides: str) -> float:
    """How far the student's first step is from one towards the committee normalised by the batch itself."""
    found = bench(shortened("digits/cv_dd", "precision=float64", *LEARN, *overrides), stage=1)
    student = found.model()
    committee = [copy.deepcopy(found.model(name)).train() for name in "abc"]
    shares = (PRIOR / 10).softmax(0)

    def loss(batch):
        with torch.no_grad():
            said = sum(share * network(batch["image"]) for share, network in zip(shares, committee, strict=True))
        log_p = (student(batch["image"]) / 20).log_softmax(1)
        return F.kl_div(log_p, (said / 20).softmax(1), reduction="batchmean")

    before = found.weights()
    apart = first_move(found, loss)
    after = found.weights()
    return apart / max(float((after[name] - before[name]).abs().max()) for name in before if "weight" in name)


def test_the_student_follows_the_committee_normalised_by_each_batch():
    assert labels_differ() < 1e-3


def test_control_frozen_teachers_normalise_by_their_memory():
    assert labels_differ(*(f"stages.learn.models.{name}.frozen=true" for name in "abc")) > 0.1


def test_no_update_moves_the_committee():
    found = bench(shortened("digits/cv_dd", *LEARN), stage=1)
    before, after = found.weights("a"), found.step().weights("a")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("running" in name or "tracked" in name for name in moved), "statistics, and nothing else"


def test_cv_dd_goes_on_in_the_stage_where_it_was_stopped(tmp_path):
    assert resume_differs(shortened("digits/cv_dd", steps=2), tmp_path, 3) == []


# INFER


def pattern_differs(role: str, network: str, *overrides: str) -> float:
    """How far the first step of one network's pattern is from one by classes and statistics of all fifty images."""
    found = bench(shortened("digits/infer", "precision=float64", f"stages.compensate.{SGD}", *overrides))
    pattern = found.model(role).pattern

    def loss(batch):
        said, apart = statistics_apart(found.model(network), batch["image"] + pattern)
        return F.cross_entropy(said, batch["label"]) + apart

    return first_move(found, loss, role=role)


@pytest.mark.parametrize(("role", "network"), [("with_a", "a"), ("with_b", "b")])
def test_each_pattern_fits_its_own_network_on_images_of_all_classes(role, network):
    assert pattern_differs(role, network) < 1e-9


def test_control_without_statistics_or_for_another_network_it_moves_elsewhere():
    assert pattern_differs("with_a", "a", "stages.compensate.terms.first=null") > 1e-3
    assert pattern_differs("with_a", "b") > 1e-3


def spread_of_what_was_added(tmp_path, *overrides: str) -> tuple[float, float]:
    """How unlike the fifty images' additions are, and how large they are at most."""
    recipe = shortened("digits/infer", *overrides, steps=3)
    added = made(play(recipe, tmp_path), "compensate.images_a")["images"] - pool(recipe, "compensate")["image"]
    return float(added.std(0).max()), float(added.abs().max())


def test_all_classes_are_given_the_same_pattern(tmp_path):
    spread, size = spread_of_what_was_added(tmp_path / "run")
    assert spread < 1e-6 and size > 0.1
    augmented = "stages.compensate.models.with_a.model={type: affine_augmentor}"
    spread, size = spread_of_what_was_added(tmp_path / "control", augmented)
    assert spread > 1e-3, "control: a change of each image's own"


def mixtures_differ(*overrides: str) -> float:
    """How far the student's first step is from one towards both networks' mean logits on mixtures of three sets."""
    sources = [f"stages.learn.data.made_{name}.{key}" for name in "ab" for key in ("made=null", "dataset=digits")]
    quick = ("precision=float64", f"stages.learn.{SGD}", *sources)
    found = bench(shortened("digits/infer", *quick, *overrides), stage=1)
    student, networks = found.model(), [found.model(name) for name in "ab"]
    window = next(found.windows())[0]
    shown = [window[source]["image"] for source in ("train", "made_a", "made_b")]

    def loss(_):
        total = 0
        for image in shown:
            said = sum(network(image) for network in networks).detach() / 2
            total = total + F.kl_div(
                (student(image) / 30).log_softmax(1), (said / 30).softmax(1), reduction="batchmean"
            )
        return total

    before = found.weights()
    apart, after = first_move(found, loss), found.weights()
    return apart / max(float((after[name] - before[name]).abs().max()) for name in before if "weight" in name)


def test_the_student_follows_both_networks_on_each_mixed_set():
    assert mixtures_differ() < 1e-3  # 30^2 times the recipe's weight is 0.9999


def test_control_one_network_for_each_set_moves_it_elsewhere():
    assert mixtures_differ("stages.learn.terms.kd.teacher=[a, a_a, b_b]") > 0.05


def test_infer_goes_on_in_the_stage_where_it_was_stopped(tmp_path):
    assert resume_differs(shortened("digits/infer", steps=2), tmp_path, 3) == []


# HSAKD


def heads_differ(*overrides: str) -> float:
    """How far the student's first step is from one by labels, turned logits and each of its heads on turned images."""
    found = bench(shortened("digits/hsakd", "precision=float64", f"stages.distil.{SGD}", *overrides), stage=1)
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

    return first_move(found, loss)


def test_each_head_on_turned_images_follows_the_teachers_head_of_that_stage():
    assert heads_differ() < 1e-10


def test_control_upright_images_or_heads_of_other_stages_move_the_student_elsewhere():
    assert heads_differ("stages.distil.models.student_turned.input=train.image") > 1e-5
    assert heads_differ("stages.distil.terms.heads.teacher=[t3,t1,t2]") > 1e-5


def share_of_pairs(*overrides: str) -> float:
    """How often the deepest of the teacher's heads says both class and turn of the images that it learnt from."""
    found = bench(shortened("digits/hsakd", *overrides, steps=150)).step(150)
    backbone, head, maps = found.model("teacher"), found.model("t3").eval(), []
    backbone.layer3.register_forward_hook(lambda *call: maps.append(call[2]))
    batch = next(iter(found.sources["train"].in_order(300)))
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
    assert resume_differs(shortened("digits/hsakd", steps=2), tmp_path, 3) == []


# ReviewKD

SHALLOW = (
    "terms.ce.weight=0",
    "terms.review={student: ['r1:logits'], teacher: ['teacher:layer1'], weight: 1}",
    "optimizer={type: SGD, lr: 1, momentum: 0, weight_decay: 0}",
)


def layers_taught(*overrides: str) -> set[str]:
    """The layers of the student that the teacher's first layer alone moves."""
    found = bench(shortened("digits/review", *SHALLOW, *overrides))
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
    found = bench(shortened("digits/review", *quick, *overrides))
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

    return first_move(found, loss)


def test_the_student_moves_by_every_level_of_the_review():
    assert review_differs() < 1e-10


def test_control_another_order_of_levels_moves_it_elsewhere():
    assert review_differs("models.r1.input=['student:layer1', 'r3:fused']") > 1e-5


def test_review_goes_on_where_it_was_stopped(tmp_path):
    assert resume_differs(shortened("digits/review", steps=3), tmp_path, 2) == []


# WSLD


def wsld_differs(*overrides: str) -> float:
    found = bench(shortened("digits/wsld", "precision=float64", SHALLOW[2], *overrides))
    student, teacher = found.model(), found.model("teacher")

    def loss(batch):
        z, t = student(batch["image"]), teacher(batch["image"]).detach()
        hard, known = (F.cross_entropy(said, batch["label"], reduction="none") for said in (z, t))
        counts = 1 - (-hard.detach() / (known + 1e-7)).exp()
        soft = -((t / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1)
        return hard.mean() + 2.5 * 4 * (counts * soft).mean()

    return first_move(found, loss)


def test_soft_labels_count_by_what_the_student_lacks_of_the_hard_one():
    assert wsld_differs() < 1e-10


def test_control_all_samples_alike_or_by_the_teachers_confidence_move_it_elsewhere():
    assert wsld_differs("terms.kd.weigh=null") > 1e-5
    assert wsld_differs("terms.kd.weigh=confidence") > 1e-5


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bar"), [("cv_dd", 96), ("infer", 93), ("hsakd", 94), ("review", 95), ("wsld", 95)]
)  # 98.4, 96.4, 96.2, 97.2 and 97.5 with seed 1
def test_a_whole_run_learns(name, bar, tmp_path):
    assert scores(play(load_recipe(f"digits/{name}", []), tmp_path / "run"))[-1] > bar
