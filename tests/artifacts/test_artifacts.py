"""What makers make of a pool, against plain references, and the bounds that they keep."""

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


def fields(seed: int = 0, samples: int = SAMPLES) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(samples, 1, 8, 8, generator=drawn),
        "label": torch.arange(samples) % CLASSES,
        "index": torch.arange(samples),
        "teacher": 2 * torch.randn(samples, CLASSES, generator=drawn),
        "teacher_1": 2 * torch.randn(samples, CLASSES, generator=drawn),
        "student": 2 * torch.randn(samples, CLASSES, generator=drawn),
        "features": torch.randn(samples, 3, generator=drawn),
    }


def pool(rows: dict[str, Tensor], reads: tuple[str, ...] = (), **more: Any) -> SampleOutputs:
    """A pool over given rows, in batches of 16; epoch n shows the images plus n, in another order."""
    count = len(rows["index"])

    def batches(epoch: int | None) -> Iterator[dict[str, Tensor]]:
        order = (
            torch.arange(count)
            if epoch is None
            else torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        )
        seen = (
            rows
            if epoch is None
            else {**rows, "image": rows["image"] + epoch, "teacher": rows["teacher"] * (epoch + 1)}
        )
        for part in order.split(16):
            yield {name: value[part] for name, value in seen.items()}

    source: Any = SimpleNamespace(population=count + 10, num_samples=count)
    facts = ArtifactContext(classes=tuple("abcd"), samples=count, population=count + 10)
    named = {name: OperandConfig(role=name) for name in reads}
    settings = {"seed": 1, "device": torch.device("cpu"), "context": facts, "operands": named, "make_batches": batches}
    return SampleOutputs(source, **{**settings, **more})


def make(kind: str, on: SampleOutputs, **params: Any) -> dict[str, Any]:
    return ARTIFACTS.build(kind, params)(on)


# Tensors


def test_class_means_are_the_means_of_known_labels():
    rows = fields()
    rows["label"][:6] = -100
    rows["label"][rows["label"] == 3] = 2
    made = make("class_means", pool(rows))
    for c in range(3):
        torch.testing.assert_close(made["value"][c], rows["features"][rows["label"] == c].mean(0))
    assert (made["value"][3] == 0).all() and made["summary"]["classes without samples"] == ["d"]


def test_class_counts_are_those_of_known_labels():
    rows = fields()
    rows["label"][:6] = -100
    made = make("class_counts", pool(rows))
    assert made["value"].tolist() == [sum(int(x) == c for x in rows["label"]) for c in range(CLASSES)]
    assert made["summary"]["samples"] == SAMPLES - 6


def test_outputs_are_addressed_by_the_index():
    rows = fields() | {"value": torch.randn(SAMPLES, 2, 3)}
    rows["index"] = rows["index"].flip(0) + 5
    made = make("outputs", pool(rows))["value"]
    assert made.shape == (SAMPLES + 10, 2, 3)
    assert torch.equal(made[rows["index"]], rows["value"]) and (made[:5] == 0).all()


def test_tensors_have_the_shapes_that_the_plan_was_told():
    rows = fields() | {"value": torch.randn(SAMPLES, 2, 3)}
    facts = ArtifactContext(tuple("abcd"), SAMPLES, SAMPLES + 10, {"value": (2, 3), "features": (3,)})
    for kind in ("class_means", "outputs"):
        assert tuple(make(kind, pool(rows))["value"].shape) == ARTIFACTS.build(kind, {}).shape(facts)


# Choices


def labelled(count: int) -> Tensor:
    return torch.arange(SAMPLES) < count


@pytest.mark.parametrize("by", ["random", "entropy", "margin", "k_center", "confidence"])
def test_the_budget_is_never_exceeded_over_rounds(by):
    rows = fields() | {"labelled": labelled(5)}
    previous = None
    for round_ in range(6):
        made = make("choose", pool(rows, previous=previous, seed=round_), by={"type": by}, budget=18, count=6)
        index = made["index"].tolist()
        assert len(index) == len(set(index)) == min(18, 5 + 6 * (round_ + 1)) and index == sorted(index)
        assert set(range(5)) <= set(index)
        if previous is not None:
            assert set(previous["index"].tolist()) <= set(index), "what was labelled stays labelled"
        previous = made


def test_the_first_choice_is_the_selectors():
    rows = fields()
    made = make("choose", pool(rows), by={"type": "confidence"}, budget=9)
    sure = rows["student"].double().softmax(-1).amax(-1)
    assert made["index"].tolist() == sorted(sure.argsort(descending=True)[:9].tolist())


def test_the_choice_is_made_of_positions_in_the_split():
    rows = fields()
    rows["index"] = rows["index"] * 2 + 1
    made = make("choose", pool(rows), by={"type": "confidence"}, budget=9)
    assert set(made["index"].tolist()) <= set(rows["index"].tolist())


def test_what_was_chosen_elsewhere_counts_and_stays():
    """The rounds may look at different parts of the split; the budget is one."""
    rows = fields()
    early = {name: value[:20] for name, value in rows.items()}
    late = {name: value[20:] for name, value in rows.items()}
    first = make("choose", pool(early), by={"type": "entropy"}, budget=10, count=6)
    second = make("choose", pool(late, previous=first), by={"type": "entropy"}, budget=10, count=6)
    assert set(first["index"].tolist()) < set(second["index"].tolist()) and len(second["index"]) == 10


def test_more_labels_than_the_budget_are_refused():
    rows = fields() | {"labelled": labelled(12)}
    with pytest.raises(ConfigError, match="12 labels to begin with, more than the budget of 11"):
        make("choose", pool(rows), by={"type": "entropy"}, budget=11)


def test_a_budget_larger_than_the_pool_is_refused():
    with pytest.raises(ValueError, match="budget of 41, but its source has only 40"):
        ARTIFACTS.build("choose", {"by": {"type": "random"}, "budget": 41}).check(ArtifactContext(samples=40))
    ARTIFACTS.build("choose", {"by": {"type": "random"}, "budget": 40}).check(ArtifactContext(samples=40))


@pytest.mark.parametrize("memory", [1, 7, 30])
def test_a_reservoir_never_exceeds_its_memory(memory):
    previous = None
    for stage in range(4):
        rows = fields(stage)
        rows["index"] = rows["index"] + SAMPLES * stage
        previous = make("reservoir", pool(rows, previous=previous, seed=stage), memory=memory)
        assert len(previous["index"]) == memory and previous["index"].tolist() == sorted(
            set(previous["index"].tolist())
        )
    assert previous is not None and previous["summary"]["of"] == 4 * SAMPLES


def test_a_reservoir_is_a_uniform_sample_of_the_whole_stream():
    """Negative control beside it: a memory that always takes the newest holds nothing of the first stage."""
    shares = torch.zeros(4)
    for seed in range(150):
        previous = None
        for stage in range(4):
            rows = fields(0)
            rows["index"] = rows["index"] + SAMPLES * stage
            previous = make("reservoir", pool(rows, previous=previous, seed=10 * seed + stage), memory=16)
        assert previous is not None
        shares += torch.bincount(previous["index"] // SAMPLES, minlength=4)
    shares = shares / shares.sum()
    assert (shares - 0.25).abs().max() < 0.03, shares


def test_samples_that_come_again_do_not_get_a_second_chance():
    rows = fields()
    first = make("reservoir", pool(rows, seed=1), memory=8)
    again = make("reservoir", pool(rows, seed=2, previous=first), memory=8)
    assert torch.equal(first["index"], again["index"])


def test_herding_is_the_greedy_mean():
    features = torch.nn.functional.normalize(
        torch.randn(12, 3, generator=torch.Generator().manual_seed(4)).double(), dim=-1
    )
    mean, chosen = features.mean(0), []
    for k in range(1, 6):
        rest = [x for x in range(12) if x not in chosen]
        chosen.append(min(rest, key=lambda x: float((mean - (features[[*chosen, x]].sum(0)) / k).norm())))
    assert herding_order(features, 5).tolist() == chosen


def test_exemplars_share_the_memory_among_the_classes_seen():
    rows = fields()
    early = {name: value[rows["label"] < 2] for name, value in rows.items()}
    late = {name: value[rows["label"] >= 2] for name, value in rows.items()}
    first = make("exemplars", pool(early), memory=13)
    assert torch.bincount(first["label"]).tolist() == [6, 6]
    second = make("exemplars", pool(late, previous=first), memory=13)
    assert torch.bincount(second["label"]).tolist() == [3, 3, 3, 3] and len(second["index"]) <= 13
    kept = set(first["index"][first["rank"] < 3].tolist())
    assert kept == {int(i) for i, c in zip(second["index"], second["label"], strict=True) if c < 2}
    assert torch.equal(rows["label"][second["index"]], second["label"])


def test_a_memory_too_small_for_its_classes_is_refused():
    with pytest.raises(ConfigError, match="memory of 3 is too small for 4 classes"):
        make("exemplars", pool(fields()), memory=3)


# Datasets


def test_pseudo_labels_are_the_confident_argmax():
    rows = fields()
    made = make("pseudo_labels", pool(rows, ("teacher",)), threshold=0.7)
    p = rows["teacher"].double().softmax(-1)
    keep = p.amax(-1) >= 0.7
    assert 0 < keep.sum() < SAMPLES
    assert torch.equal(made["labels"], p.argmax(-1)[keep]) and torch.equal(made["images"], rows["image"][keep])
    torch.testing.assert_close(made["fields"]["soft"], p[keep].float())
    assert made["classes"] == list("abcd") and made["mean"] is None
    everything = make("pseudo_labels", pool(rows, ("teacher",)))
    assert len(everything["labels"]) == SAMPLES, "negative control: without the threshold nothing is left out"


def test_agreement_keeps_what_all_teachers_say():
    rows = fields()
    made = make("pseudo_labels", pool(rows, ("teacher", "teacher_1")), agreement=True)
    one, other = rows["teacher"].argmax(-1), rows["teacher_1"].argmax(-1)
    assert 0 < (one == other).sum() < SAMPLES
    assert torch.equal(made["labels"], one[one == other]) and torch.equal(made["images"], rows["image"][one == other])
    with pytest.raises(ValueError, match="one teacher always has"):
        ARTIFACTS.build("pseudo_labels", {"agreement": True}).check(ArtifactContext(shapes={"teacher": (4,)}))


def test_known_labels_stay_where_that_is_asked():
    rows = fields() | {"labelled": labelled(10)}
    rows["label"] = torch.where(rows["labelled"], rows["label"], -100)
    made = make("pseudo_labels", pool(rows, ("teacher",)), threshold=0.9, keep_labels=True)
    assert torch.equal(made["labels"][:10], rows["label"][:10])
    assert torch.equal(made["fields"]["soft"][:10].argmax(-1), rows["label"][:10])


def test_as_many_of_every_class_as_is_asked():
    rows = fields()
    made = make("pseudo_labels", pool(rows, ("teacher",)), per_class=13)
    label, sure = rows["teacher"].argmax(-1), rows["teacher"].softmax(-1).amax(-1)
    assert torch.bincount(made["labels"]).tolist() == [13] * CLASSES
    for c in range(CLASSES):
        own = sorted((i for i in range(SAMPLES) if label[i] == c), key=lambda i: -float(sure[i]))
        expected = [own[k % len(own)] for k in range(13)]
        assert torch.equal(made["images"][made["labels"] == c], rows["image"][expected])


def test_pseudo_labels_are_balanced_the_most_certain_first_and_over_again():
    """Beside every label that is known, once: `per_class` of each class that the teacher names at all."""
    rows = fields() | {"labelled": labelled(4)}
    rows["teacher"][rows["teacher"].argmax(-1) == 3] *= torch.tensor([0.0, 0.0, 9.0, 0.0])  # class 3 never comes
    made = make("pseudo_labels", pool(rows, ("teacher",)), per_class=9, keep_labels=True)
    p = rows["teacher"].double().softmax(-1)
    expected = list(range(4))
    for c in range(3):
        own = sorted((x for x in range(4, SAMPLES) if p[x].argmax() == c), key=lambda x: -float(p[x].max()))
        expected += [own[k % len(own)] for k in range(9)]
    assert torch.equal(made["images"], rows["image"][expected])
    assert made["labels"].tolist() == [0, 1, 2, 3, *[0] * 9, *[1] * 9, *[2] * 9]
    assert made["summary"]["samples"] == 31
    plain = make("pseudo_labels", pool(rows, ("teacher",)), keep_labels=True)["labels"]
    assert len(set(torch.bincount(plain).tolist())) > 1, "negative control: as they come, classes are unequal"
    with pytest.raises(ConfigError, match="per_class must be at least 1"):
        ARTIFACTS.build("pseudo_labels", {"per_class": 0})


def test_when_nothing_passes_it_is_told():
    with pytest.raises(ConfigError, match="none of 40 samples passes"):
        make("pseudo_labels", pool(fields(), ("teacher",)), threshold=1.0)


def test_soft_labels_store_every_crop_with_what_the_teacher_said_of_it():
    rows = fields()
    made = make("soft_labels", pool(rows, ("teacher",)), crops=3, temperature=2.0)
    assert made["images"].shape == (3 * SAMPLES, 1, 8, 8)
    for epoch in range(3):
        part = slice(epoch * SAMPLES, (epoch + 1) * SAMPLES)
        torch.testing.assert_close(made["images"][part], rows["image"] + epoch)
        torch.testing.assert_close(made["fields"]["soft"][part], (rows["teacher"] * (epoch + 1) / 2).softmax(-1))
        assert torch.equal(made["labels"][part], rows["label"])


def test_soft_labels_are_calibrated_by_the_teachers_confidence():
    rows = fields()
    rows["label"][3] = -100
    made = make("soft_labels", pool(rows, ("teacher",)), low=0.5, high=0.8, smoothing=0.2)
    confidence = rows["teacher"].softmax(-1).amax(-1)
    hard = (confidence >= 0.5) & (confidence < 0.8)
    keep = (confidence >= 0.5) & ~(hard & (rows["label"] < 0))
    assert hard.any() and (confidence < 0.5).any() and (confidence >= 0.8).any()
    expected = rows["teacher"].softmax(-1)
    onehot = torch.nn.functional.one_hot(rows["label"].clamp(min=0), CLASSES)
    expected[hard] = (0.8 * onehot + 0.2 / CLASSES)[hard]
    torch.testing.assert_close(made["fields"]["soft"], expected[keep])
    assert made["summary"] == {
        "soft": int((confidence >= 0.8).sum()),
        "hard": int((hard & keep).sum()),
        "left out": int((~keep).sum()),
    }
    torch.testing.assert_close(made["fields"]["soft"].sum(-1), torch.ones(int(keep.sum())))


def test_generated_images_are_labelled_by_the_teacher():
    rows = fields()
    made = make("generate", pool(rows, ("image", "teacher")), threshold=0.6)
    keep = rows["teacher"].softmax(-1).amax(-1) >= 0.6
    assert torch.equal(made["labels"], rows["teacher"].argmax(-1)[keep])
    assert torch.equal(made["images"], rows["image"][keep])
    balanced = make("generate", pool(rows, ("image", "teacher")), balanced=True)
    counts = torch.bincount(balanced["labels"], minlength=CLASSES)
    assert counts.min() == counts.max() == torch.bincount(rows["teacher"].argmax(-1), minlength=CLASSES).min()


def test_logits_are_needed_where_classes_are_read():
    for kind in ("pseudo_labels", "soft_labels", "generate"):
        with pytest.raises(ValueError, match=r"\[8, 4, 4\] per sample"):
            ARTIFACTS.build(kind, {}).check(ArtifactContext(shapes={"teacher": (8, 4, 4)}))


# Search


class Net(nn.Module):
    def __init__(self, width: int = 4, num_classes: int = CLASSES, depth: int = 1) -> None:
        super().__init__()
        widths = [1] + [width] * depth
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*[part for conv in convolutions for part in (conv, nn.ReLU())])
        self.fc = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.body(image).mean((-2, -1)))


def by_hand(net: Net, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices that the authors' code compares, built one by one: (classes, channels, channels), (batch, batch)."""
    gradient = torch.autograd.grad(nn.functional.cross_entropy(net(images), labels), net.fc.weight)[0]
    outer = nn.functional.normalize(torch.bmm(gradient.unsqueeze(2), gradient.unsqueeze(1)), dim=2)
    flat = net.body(images).detach().flatten(1)
    return outer, nn.functional.normalize(flat @ flat.T)


def test_the_measure_is_that_of_the_formula():
    torch.manual_seed(0)
    one, other = Net().double(), Net().double()
    images, labels = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    (outer, gram), (outer_other, gram_other) = (by_hand(net, images, labels) for net in (one, other))
    mine, theirs = (similarity_matrices(net, "body", "fc", images, labels) for net in (one, other))
    torch.testing.assert_close(mine[1], gram)
    semantic = float((outer - outer_other).square().sum() / (CLASSES * 4))
    assert outer_product_distance(mine[0], theirs[0]) == pytest.approx(semantic)
    relation = float((gram - gram_other).square().sum() / 6**2)
    search = {s: ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body", "score": s}) for s in SCORES}
    expected = {"semantic": -semantic, "relation": -relation, "diswot": -semantic - relation}
    assert {s: search[s]._similarity(mine, theirs) for s in SCORES} == pytest.approx(expected)
    dead = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # a channel and a class without any gradient
    assert outer_product_distance(dead, dead) == 0


SCORES = ("semantic", "relation", "diswot")


@pytest.fixture
def nets(monkeypatch):
    built: list[str] = []

    def build(self, name, facts):
        built.append(name)
        return Net(4, depth=self.candidates[name]["depth"])

    monkeypatch.setattr("kdbench.artifacts.search.StudentSearch._build", build)
    return built


CANDIDATES = {f"d{d}": {"type": "net", "depth": d} for d in (1, 2, 3, 4, 5, 6)}


def searching(seed: int = 0) -> SampleOutputs:
    torch.manual_seed(9)
    operand = OperandConfig(role="teacher", path="body")
    return pool(fields(), modules={"teacher": Net(4, depth=8).eval()}, operands={"teacher": operand}, seed=seed)


def test_the_search_finds_the_best_score(nets):
    made = make("search", searching(), candidates=CANDIDATES, feature="body", batch=16)
    scores = made["summary"]["scores"]
    assert set(scores) == set(CANDIDATES) and made["summary"]["chosen"] == max(scores, key=scores.get)
    assert made["params"] == {"depth": CANDIDATES[made["summary"]["chosen"]]["depth"]} and made["type"] == "net"
    parts = [
        make("search", searching(), candidates=CANDIDATES, feature="body", batch=16, score=s)
        for s in ("semantic", "relation")
    ]
    for name in CANDIDATES:
        assert scores[name] == pytest.approx(sum(part["summary"]["scores"][name] for part in parts))


def test_a_network_is_most_like_itself(nets):
    on, rows = searching(), fields()
    teacher = similarity_matrices(on.modules["teacher"], "body", "fc", rows["image"][:16], rows["label"][:16])
    search = ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body"})
    assert search._similarity(teacher, teacher) == pytest.approx(0, abs=1e-12)
    assert all(
        score < 0 for score in make("search", on, candidates=CANDIDATES, feature="body")["summary"]["scores"].values()
    )


def test_the_semantic_measure_needs_equal_channels_and_labels(nets, monkeypatch):
    monkeypatch.setattr("kdbench.artifacts.search.StudentSearch._build", lambda self, name, facts: Net(5))
    wide = {"candidates": CANDIDATES, "feature": "body"}
    with pytest.raises(ConfigError, match=r"teacher has \[4, 4\] \(classes, channels\) and a candidate \[4, 5\]"):
        make("search", searching(), **wide)
    assert make("search", searching(), **wide, score="relation")["summary"]["scores"]
    with pytest.raises(ConfigError, match="classifier 'body' of Net is no linear layer"):
        make("search", searching(), **wide, classifier="body")
    rows = {**fields(), "label": torch.full((SAMPLES,), -100)}
    operand = {"teacher": OperandConfig(role="teacher", path="body")}
    with pytest.raises(ConfigError, match="the source has none"):
        make("search", pool(rows, modules={"teacher": Net().eval()}, operands=operand), **wide)


def test_the_limit_of_parameters_holds(nets):
    made = make("search", searching(), candidates=CANDIDATES, feature="body", max_parameters=360)
    assert set(made["summary"]["scores"]) == {"d1", "d2", "d3"} and made["summary"]["parameters"] <= 360
    search = ARTIFACTS.build("search", {"candidates": CANDIDATES, "feature": "body", "max_parameters": 5})
    with pytest.raises(ValueError, match=r"allows 5 parameters, but the smallest candidate, 'd1', has"):
        search.check(ArtifactContext(shapes={"teacher": (4, 8, 8)}))


def test_evolution_scores_no_more_than_it_may(nets):
    made = make("search", searching(), candidates=CANDIDATES, feature="body", evaluations=4, population=2)
    assert len(made["summary"]["scores"]) == 4 and made["summary"]["chosen"] in made["summary"]["scores"]
    again = make("search", searching(), candidates=CANDIDATES, feature="body", evaluations=4, population=2)
    assert again["summary"] == made["summary"], "a function of the seed"
    whole = make("search", searching(), candidates=CANDIDATES, feature="body", evaluations=99)
    assert set(whole["summary"]["scores"]) == set(CANDIDATES)


@pytest.mark.parametrize("kind", sorted(ARTIFACTS.entries))
def test_every_maker_is_registered_with_what_it_makes(kind):
    entry = ARTIFACTS.entry(kind)
    assert entry.facts["produces"] in ("dataset", "subset", "tensor", "model") and entry.summary
    assert (entry.facts["produces"] == "model") == ("candidates" in entry.facts)
