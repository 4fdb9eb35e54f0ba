"""Artifact builders against plain references: tensors, subsets, datasets and the student search."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.artifacts.base import ArtifactContext, SampleOutputs
from kdbench.artifacts.search import outer_product_distance, similarity_matrices
from kdbench.artifacts.subsets import herding_order
from kdbench.config.schema import OperandConfig
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS

SAMPLES, CLASSES = 40, 4


def random_values(seed: int = 0, samples: int = SAMPLES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(samples, 1, 8, 8, generator=generator),
        "label": torch.arange(samples) % CLASSES,
        "index": torch.arange(samples),
        "teacher": 2 * torch.randn(samples, CLASSES, generator=generator),
        "teacher_1": 2 * torch.randn(samples, CLASSES, generator=generator),
        "student": 2 * torch.randn(samples, CLASSES, generator=generator),
        "features": torch.randn(samples, 3, generator=generator),
    }


def sample_outputs(values: dict[str, Tensor], operand_roles: tuple[str, ...] = (), **overrides: Any) -> SampleOutputs:
    """Yields the values in batches of 16; epoch n is shuffled, adds n to the images and scales the teacher."""
    count = len(values["index"])

    def make_batches(epoch: int | None) -> Iterator[dict[str, Tensor]]:
        if epoch is None:
            order, epoch_values = torch.arange(count), values
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
            augmented = {"image": values["image"] + epoch, "teacher": values["teacher"] * (epoch + 1)}
            epoch_values = {**values, **augmented}
        for rows in order.split(16):
            yield {name: value[rows] for name, value in epoch_values.items()}

    source: Any = SimpleNamespace(population=count + 10, num_samples=count)
    settings = {
        "seed": 1,
        "device": torch.device("cpu"),
        "context": ArtifactContext(classes=tuple("abcd"), samples=count, population=count + 10),
        "operands": {name: OperandConfig(role=name) for name in operand_roles},
        "make_batches": make_batches,
    }
    return SampleOutputs(source, **{**settings, **overrides})


def build(artifact_type: str, outputs: SampleOutputs, **params: Any) -> dict[str, Any]:
    return ARTIFACTS.build(artifact_type, params)(outputs)


# Tensors


def test_class_means_are_means_over_labelled_samples():
    values = random_values()
    values["label"][:6] = -100
    values["label"][values["label"] == 3] = 2
    content = build("class_means", sample_outputs(values))
    for c in range(3):
        torch.testing.assert_close(content["value"][c], values["features"][values["label"] == c].mean(0))
    assert (content["value"][3] == 0).all() and content["summary"]["classes without samples"] == ["d"]


def test_class_counts_ignore_unlabelled_samples():
    values = random_values()
    values["label"][:6] = -100
    content = build("class_counts", sample_outputs(values))
    assert content["value"].tolist() == [sum(int(x) == c for x in values["label"]) for c in range(CLASSES)]
    assert content["summary"]["samples"] == SAMPLES - 6


def test_stored_outputs_are_indexed_by_the_field_index():
    values = random_values() | {"value": torch.randn(SAMPLES, 2, 3)}
    values["index"] = values["index"].flip(0) + 5
    stored = build("outputs", sample_outputs(values))["value"]
    assert stored.shape == (SAMPLES + 10, 2, 3)
    assert torch.equal(stored[values["index"]], values["value"]) and (stored[:5] == 0).all()


def test_tensors_have_the_shape_announced_to_the_dry_run():
    values = random_values() | {"value": torch.randn(SAMPLES, 2, 3)}
    context = ArtifactContext(tuple("abcd"), SAMPLES, SAMPLES + 10, {"value": (2, 3), "features": (3,)})
    for name in ("class_means", "outputs"):
        value = build(name, sample_outputs(values))["value"]
        assert tuple(value.shape) == ARTIFACTS.build(name, {}).output_shape(context)


# Subsets


def first_labelled(count: int) -> Tensor:
    return torch.arange(SAMPLES) < count


@pytest.mark.parametrize("selector", ["random", "entropy", "margin", "k_center", "confidence"])
def test_budget_is_never_exceeded_over_rounds(selector):
    values = random_values() | {"labelled": first_labelled(5)}
    previous = None
    for number in range(6):
        outputs = sample_outputs(values, previous=previous, seed=number)
        content = build("choose", outputs, by={"type": selector}, budget=18, count=6)
        index = content["index"].tolist()
        assert len(index) == len(set(index)) == min(18, 5 + 6 * (number + 1)) and index == sorted(index)
        assert set(range(5)) <= set(index)
        if previous is not None:
            assert set(previous["index"].tolist()) <= set(index), "labelled samples stay labelled"
        previous = content


def test_first_round_selects_the_rows_of_the_selector():
    values = random_values()
    content = build("choose", sample_outputs(values), by={"type": "confidence"}, budget=9)
    confidence = values["student"].double().softmax(-1).amax(-1)
    assert content["index"].tolist() == sorted(confidence.argsort(descending=True)[:9].tolist())


def test_subset_contains_positions_in_the_split():
    values = random_values()
    values["index"] = values["index"] * 2 + 1
    content = build("choose", sample_outputs(values), by={"type": "confidence"}, budget=9)
    assert set(content["index"].tolist()) <= set(values["index"].tolist())


def test_samples_selected_in_another_part_of_the_split_stay_and_count_against_the_budget():
    values = random_values()
    first_half = {name: value[:20] for name, value in values.items()}
    second_half = {name: value[20:] for name, value in values.items()}
    first = build("choose", sample_outputs(first_half), by={"type": "entropy"}, budget=10, count=6)
    second = build("choose", sample_outputs(second_half, previous=first), by={"type": "entropy"}, budget=10, count=6)
    assert set(first["index"].tolist()) < set(second["index"].tolist()) and len(second["index"]) == 10


def test_more_labels_than_the_budget_are_rejected():
    values = random_values() | {"labelled": first_labelled(12)}
    with pytest.raises(ConfigError, match="already has 12 labels, more than the budget of 11"):
        build("choose", sample_outputs(values), by={"type": "entropy"}, budget=11)


def test_budget_above_the_number_of_samples_is_rejected():
    with pytest.raises(ValueError, match="budget of 41, but its source has only 40"):
        ARTIFACTS.build("choose", {"by": {"type": "random"}, "budget": 41}).check(ArtifactContext(samples=40))
    ARTIFACTS.build("choose", {"by": {"type": "random"}, "budget": 40}).check(ArtifactContext(samples=40))


@pytest.mark.parametrize("memory", [1, 7, 30])
def test_reservoir_never_exceeds_its_memory(memory):
    content = None
    for stage in range(4):
        values = random_values(stage)
        values["index"] = values["index"] + SAMPLES * stage
        content = build("reservoir", sample_outputs(values, previous=content, seed=stage), memory=memory)
        assert len(content["index"]) == memory and content["index"].tolist() == sorted(set(content["index"].tolist()))
    assert content is not None and content["summary"]["stream"] == 4 * SAMPLES


def test_reservoir_is_a_uniform_sample_of_the_whole_stream():
    """Negative control: a memory that always stores the newest samples would contain none of the first stage."""
    fractions = torch.zeros(4)
    for seed in range(150):
        content = None
        for stage in range(4):
            values = random_values(0)
            values["index"] = values["index"] + SAMPLES * stage
            content = build("reservoir", sample_outputs(values, previous=content, seed=10 * seed + stage), memory=16)
        assert content is not None
        fractions += torch.bincount(content["index"] // SAMPLES, minlength=4)
    fractions = fractions / fractions.sum()
    assert (fractions - 0.25).abs().max() < 0.03, fractions


def test_repeated_samples_do_not_draw_a_second_key():
    values = random_values()
    first = build("reservoir", sample_outputs(values, seed=1), memory=8)
    second = build("reservoir", sample_outputs(values, seed=2, previous=first), memory=8)
    assert torch.equal(first["index"], second["index"])


def test_herding_minimises_the_distance_to_the_mean_greedily():
    features = torch.nn.functional.normalize(
        torch.randn(12, 3, generator=torch.Generator().manual_seed(4)).double(), dim=-1
    )
    mean, order = features.mean(0), []
    for k in range(1, 6):
        rest = [x for x in range(12) if x not in order]
        order.append(min(rest, key=lambda x: float((mean - (features[[*order, x]].sum(0)) / k).norm())))
    assert herding_order(features, 5).tolist() == order


def test_exemplars_divide_the_memory_equally_among_the_classes_so_far():
    values = random_values()
    first_classes = {name: value[values["label"] < 2] for name, value in values.items()}
    later_classes = {name: value[values["label"] >= 2] for name, value in values.items()}
    first = build("exemplars", sample_outputs(first_classes), memory=13)
    assert torch.bincount(first["label"]).tolist() == [6, 6]
    second = build("exemplars", sample_outputs(later_classes, previous=first), memory=13)
    assert torch.bincount(second["label"]).tolist() == [3, 3, 3, 3] and len(second["index"]) <= 13
    top_ranked = set(first["index"][first["rank"] < 3].tolist())
    assert top_ranked == {int(i) for i, c in zip(second["index"], second["label"], strict=True) if c < 2}
    assert torch.equal(values["label"][second["index"]], second["label"])


def test_memory_smaller_than_the_number_of_classes_is_rejected():
    with pytest.raises(ConfigError, match="memory of 3 samples is too small for 4 classes"):
        build("exemplars", sample_outputs(random_values()), memory=3)


# Datasets


def test_pseudo_labels_are_the_argmax_of_confident_samples():
    values = random_values()
    content = build("pseudo_labels", sample_outputs(values, ("teacher",)), threshold=0.7)
    p = values["teacher"].double().softmax(-1)
    keep = p.amax(-1) >= 0.7
    assert 0 < keep.sum() < SAMPLES
    assert torch.equal(content["labels"], p.argmax(-1)[keep]) and torch.equal(content["images"], values["image"][keep])
    torch.testing.assert_close(content["fields"]["soft"], p[keep].float())
    assert content["classes"] == list("abcd") and content["mean"] is None
    unfiltered = build("pseudo_labels", sample_outputs(values, ("teacher",)))
    assert len(unfiltered["labels"]) == SAMPLES, "negative control: without a threshold every sample is kept"


def test_agreement_keeps_samples_with_the_same_argmax_in_all_teachers():
    values = random_values()
    content = build("pseudo_labels", sample_outputs(values, ("teacher", "teacher_1")), agreement=True)
    first, second = values["teacher"].argmax(-1), values["teacher_1"].argmax(-1)
    agree = first == second
    assert 0 < agree.sum() < SAMPLES
    assert torch.equal(content["labels"], first[agree]) and torch.equal(content["images"], values["image"][agree])
    with pytest.raises(ValueError, match="needs at least two teachers"):
        ARTIFACTS.build("pseudo_labels", {"agreement": True}).check(ArtifactContext(shapes={"teacher": (4,)}))


def test_keep_labels_keeps_every_labelled_sample_with_its_label():
    values = random_values() | {"labelled": first_labelled(10)}
    values["label"] = torch.where(values["labelled"], values["label"], -100)
    content = build("pseudo_labels", sample_outputs(values, ("teacher",)), threshold=0.9, keep_labels=True)
    assert torch.equal(content["labels"][:10], values["label"][:10])
    assert torch.equal(content["fields"]["soft"][:10].argmax(-1), values["label"][:10])


def test_per_class_gives_every_class_the_same_number_of_samples():
    values = random_values()
    content = build("pseudo_labels", sample_outputs(values, ("teacher",)), per_class=13)
    label, confidence = values["teacher"].argmax(-1), values["teacher"].softmax(-1).amax(-1)
    assert torch.bincount(content["labels"]).tolist() == [13] * CLASSES
    for c in range(CLASSES):
        rows = sorted((i for i in range(SAMPLES) if label[i] == c), key=lambda i: -float(confidence[i]))
        expected = [rows[k % len(rows)] for k in range(13)]
        assert torch.equal(content["images"][content["labels"] == c], values["image"][expected])


def test_per_class_repeats_confident_samples_and_leaves_labelled_ones_single():
    """Every labelled sample occurs once, before `per_class` samples of each class that the teacher predicts."""
    values = random_values() | {"labelled": first_labelled(4)}
    values["teacher"][values["teacher"].argmax(-1) == 3] *= torch.tensor([0.0, 0.0, 9.0, 0.0])  # class 3 never occurs
    content = build("pseudo_labels", sample_outputs(values, ("teacher",)), per_class=9, keep_labels=True)
    p = values["teacher"].double().softmax(-1)
    expected = list(range(4))
    for c in range(3):
        rows = sorted((x for x in range(4, SAMPLES) if p[x].argmax() == c), key=lambda x: -float(p[x].max()))
        expected += [rows[k % len(rows)] for k in range(9)]
    assert torch.equal(content["images"], values["image"][expected])
    assert content["labels"].tolist() == [0, 1, 2, 3, *[0] * 9, *[1] * 9, *[2] * 9]
    assert content["summary"]["samples"] == 31
    unbalanced = build("pseudo_labels", sample_outputs(values, ("teacher",)), keep_labels=True)["labels"]
    assert len(set(torch.bincount(unbalanced).tolist())) > 1, "negative control: without per_class classes are unequal"
    with pytest.raises(ConfigError, match="per_class must be at least 1"):
        ARTIFACTS.build("pseudo_labels", {"per_class": 0})


def test_threshold_without_any_sample_above_it_is_reported():
    with pytest.raises(ConfigError, match=r"none of 40 samples has a confidence of at least the threshold 1\.0"):
        build("pseudo_labels", sample_outputs(random_values(), ("teacher",)), threshold=1.0)


def test_soft_labels_store_every_crop_with_its_teacher_probabilities():
    values = random_values()
    content = build("soft_labels", sample_outputs(values, ("teacher",)), crops=3, temperature=2.0)
    assert content["images"].shape == (3 * SAMPLES, 1, 8, 8)
    for epoch in range(3):
        rows = slice(epoch * SAMPLES, (epoch + 1) * SAMPLES)
        torch.testing.assert_close(content["images"][rows], values["image"] + epoch)
        torch.testing.assert_close(content["fields"]["soft"][rows], (values["teacher"] * (epoch + 1) / 2).softmax(-1))
        assert torch.equal(content["labels"][rows], values["label"])


def test_soft_labels_are_calibrated_by_the_confidence_of_the_teacher():
    values = random_values()
    values["label"][3] = -100
    content = build("soft_labels", sample_outputs(values, ("teacher",)), low=0.5, high=0.8, smoothing=0.2)
    confidence = values["teacher"].softmax(-1).amax(-1)
    hard = (confidence >= 0.5) & (confidence < 0.8)
    keep = (confidence >= 0.5) & ~(hard & (values["label"] < 0))
    assert hard.any() and (confidence < 0.5).any() and (confidence >= 0.8).any()
    expected = values["teacher"].softmax(-1)
    one_hot = torch.nn.functional.one_hot(values["label"].clamp(min=0), CLASSES)
    expected[hard] = (0.8 * one_hot + 0.2 / CLASSES)[hard]
    torch.testing.assert_close(content["fields"]["soft"], expected[keep])
    assert content["summary"] == {
        "soft": int((confidence >= 0.8).sum()),
        "hard": int((hard & keep).sum()),
        "dropped": int((~keep).sum()),
    }
    torch.testing.assert_close(content["fields"]["soft"].sum(-1), torch.ones(int(keep.sum())))


def test_generated_images_are_labelled_by_the_teacher():
    values = random_values()
    content = build("generate", sample_outputs(values, ("image", "teacher")), threshold=0.6)
    keep = values["teacher"].softmax(-1).amax(-1) >= 0.6
    assert torch.equal(content["labels"], values["teacher"].argmax(-1)[keep])
    assert torch.equal(content["images"], values["image"][keep])
    balanced = build("generate", sample_outputs(values, ("image", "teacher")), balanced=True)
    counts = torch.bincount(balanced["labels"], minlength=CLASSES)
    assert counts.min() == counts.max() == torch.bincount(values["teacher"].argmax(-1), minlength=CLASSES).min()


def test_feature_maps_are_rejected_as_logits():
    for name in ("pseudo_labels", "soft_labels", "generate"):
        with pytest.raises(ValueError, match=r"\[8, 4, 4\] per sample"):
            ARTIFACTS.build(name, {}).check(ArtifactContext(shapes={"teacher": (8, 4, 4)}))


# Student search


class Net(nn.Module):
    def __init__(self, width: int = 4, num_classes: int = CLASSES, depth: int = 1) -> None:
        super().__init__()
        widths = [1] + [width] * depth
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*[part for conv in convolutions for part in (conv, nn.ReLU())])
        self.fc = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.body(image).mean((-2, -1)))


def reference_matrices(net: Net, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the matrices of the authors' code explicitly: (classes, channels, channels) and (batch, batch)."""
    gradient = torch.autograd.grad(nn.functional.cross_entropy(net(images), labels), net.fc.weight)[0]
    outer = nn.functional.normalize(torch.bmm(gradient.unsqueeze(2), gradient.unsqueeze(1)), dim=2)
    flat = net.body(images).detach().flatten(1)
    return outer, nn.functional.normalize(flat @ flat.T)


def test_scores_equal_the_formulas_of_the_authors_code():
    torch.manual_seed(0)
    networks = [Net().double(), Net().double()]
    images, labels = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    (outer_1, gram_1), (outer_2, gram_2) = (reference_matrices(net, images, labels) for net in networks)
    matrices_1, matrices_2 = (similarity_matrices(net, "body", "fc", images, labels) for net in networks)
    torch.testing.assert_close(matrices_1[1], gram_1)
    semantic = float((outer_1 - outer_2).square().sum() / (CLASSES * 4))
    assert outer_product_distance(matrices_1[0], matrices_2[0]) == pytest.approx(semantic)
    relation = float((gram_1 - gram_2).square().sum() / 6**2)
    search = {s: ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body", "score": s}) for s in SCORES}
    expected = {"semantic": -semantic, "relation": -relation, "diswot": -semantic - relation}
    assert {s: search[s]._similarity(matrices_1, matrices_2) for s in SCORES} == pytest.approx(expected)
    without_gradient = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # one channel and one class have no gradient
    assert outer_product_distance(without_gradient, without_gradient) == 0


SCORES = ("semantic", "relation", "diswot")


@pytest.fixture
def candidate_networks(monkeypatch):
    def build_candidate(self, name, context):
        return Net(4, depth=self.candidates[name]["depth"])

    monkeypatch.setattr("kdbench.artifacts.search.StudentSearch._build", build_candidate)


CANDIDATES = {f"d{d}": {"type": "net", "depth": d} for d in (1, 2, 3, 4, 5, 6)}


def search_outputs(seed: int = 0) -> SampleOutputs:
    torch.manual_seed(9)
    operand = OperandConfig(role="teacher", path="body")
    teacher = {"teacher": Net(4, depth=8).eval()}
    return sample_outputs(random_values(), modules=teacher, operands={"teacher": operand}, seed=seed)


def search(outputs: SampleOutputs | None = None, **params: Any) -> dict[str, Any]:
    return build("search", outputs or search_outputs(), candidates=CANDIDATES, feature="body", **params)


@pytest.mark.usefixtures("candidate_networks")
def test_search_selects_the_candidate_with_the_highest_score():
    content = search(batch=16)
    scores, selected = content["summary"]["scores"], content["summary"]["selected"]
    assert set(scores) == set(CANDIDATES) and selected == max(scores, key=scores.get)
    assert content["params"] == {"depth": CANDIDATES[selected]["depth"]} and content["type"] == "net"
    parts = [search(batch=16, score=score)["summary"]["scores"] for score in ("semantic", "relation")]
    for name in CANDIDATES:
        assert scores[name] == pytest.approx(sum(part[name] for part in parts))


@pytest.mark.usefixtures("candidate_networks")
def test_a_network_is_most_similar_to_itself():
    outputs, values = search_outputs(), random_values()
    teacher = similarity_matrices(outputs.modules["teacher"], "body", "fc", values["image"][:16], values["label"][:16])
    builder = ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body"})
    assert builder._similarity(teacher, teacher) == pytest.approx(0, abs=1e-12)
    assert all(score < 0 for score in search(outputs)["summary"]["scores"].values())


def test_semantic_score_requires_equal_channels_and_labels(monkeypatch):
    monkeypatch.setattr("kdbench.artifacts.search.StudentSearch._build", lambda self, name, context: Net(5))
    with pytest.raises(ConfigError, match=r"teacher has \[4, 4\] \(classes, channels\) and a candidate \[4, 5\]"):
        search()
    assert search(score="relation")["summary"]["scores"]
    with pytest.raises(ConfigError, match=r"classifier 'body' of Net is not an nn\.Linear"):
        search(classifier="body")
    values = {**random_values(), "label": torch.full((SAMPLES,), -100)}
    operand = {"teacher": OperandConfig(role="teacher", path="body")}
    with pytest.raises(ConfigError, match="the source has none"):
        search(sample_outputs(values, modules={"teacher": Net().eval()}, operands=operand))


@pytest.mark.usefixtures("candidate_networks")
def test_candidates_above_the_parameter_limit_are_not_scored():
    content = search(max_parameters=360)
    assert set(content["summary"]["scores"]) == {"d1", "d2", "d3"} and content["summary"]["parameters"] <= 360
    builder = ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body", "max_parameters": 5})
    with pytest.raises(ValueError, match=r"allows 5 parameters, but the smallest candidate, 'd1', has"):
        builder.check(ArtifactContext(shapes={"teacher": (4, 8, 8)}))


@pytest.mark.usefixtures("candidate_networks")
def test_evolution_scores_at_most_the_given_number_of_candidates():
    summary = search(evaluations=4, population=2)["summary"]
    assert len(summary["scores"]) == 4 and summary["selected"] in summary["scores"]
    assert search(evaluations=4, population=2)["summary"] == summary, "the search is a function of the seed"
    assert set(search(evaluations=99)["summary"]["scores"]) == set(CANDIDATES)


@pytest.mark.parametrize("name", sorted(ARTIFACTS.entries))
def test_every_artifact_builder_declares_the_kind_it_produces(name):
    entry = ARTIFACTS.entry(name)
    assert entry.facts["produces"] in ("dataset", "subset", "tensor", "model") and entry.summary
    assert (entry.facts["produces"] == "model") == ("candidates" in entry.facts)
