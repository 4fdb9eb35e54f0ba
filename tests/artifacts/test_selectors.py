"""Which rows selectors choose, against plain loops in float64."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kdbench.artifacts.base import Selector
from kdbench.registry import SELECTORS

ROWS, CLASSES, COUNT = 24, 5, 7
NAMES = sorted(SELECTORS.entries)


def given(seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "student": 2 * torch.randn(ROWS, CLASSES, generator=drawn),
        "reference": 2 * torch.randn(ROWS, CLASSES, generator=drawn),
        "label": torch.randint(CLASSES, (ROWS,), generator=drawn),
        "index": torch.arange(ROWS),
    }


def select(name: str, count: int = COUNT, taken: Tensor | None = None, data: dict | None = None, **params) -> list[int]:
    entry = SELECTORS.entry(name)
    selector: Selector = SELECTORS.build(name, params)
    operands = {key: value for key, value in (data or given()).items() if key in entry.inputs}
    if "seed" in entry.inputs:
        operands["seed"] = 3
    return selector(count, taken, **operands).tolist()


def best(scores: list[float], count: int = COUNT) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda row: -scores[row])[:count])


def probabilities(logits: Tensor) -> list[list[float]]:
    return logits.double().softmax(-1).tolist()


def losses(logits: Tensor, label: Tensor) -> list[float]:
    return [-p[own] for p, own in zip(logits.double().log_softmax(-1).tolist(), label.tolist(), strict=True)]


def test_scores_of_one_row_at_a_time():
    data = given()
    p = probabilities(data["student"])
    assert select("entropy") == best([-sum(x * torch.tensor(x).log().item() for x in row) for row in p])
    assert select("margin") == best([-(sorted(row)[-1] - sorted(row)[-2]) for row in p])
    assert select("confidence") == best([max(row) for row in p])
    assert select("confidence", least=True) == best([-max(row) for row in p])
    own, reference = losses(data["student"], data["label"]), losses(data["reference"], data["label"])
    assert select("low_loss") == best([-loss for loss in own])
    assert select("learnability") == best([a - b for a, b in zip(own, reference, strict=True)])


def test_learnability_is_not_the_loss_alone():
    """Negative control: with a reference that knows nothing, it is the student's loss."""
    data = given()
    flat = {**data, "reference": torch.zeros_like(data["reference"])}
    hardest = best(losses(data["student"], data["label"]))
    assert select("learnability", data=flat) == hardest != select("learnability", data=data)


@pytest.mark.parametrize("name", ["low_loss", "learnability"])
def test_rows_without_a_label_come_last(name):
    """A loss of 0 for them would make them the first that `low_loss` takes."""
    data = given()
    hidden = torch.arange(ROWS) % 3 == 0
    data["label"] = torch.where(hidden, -100, data["label"])
    known = int((~hidden).sum())
    assert not hidden[select(name, known, data=data)].any()
    rows = select(name, known + 2, data=data)
    assert int(hidden[rows].sum()) == 2
    taken = torch.arange(ROWS) < 5
    assert not taken[select(name, ROWS - 5, taken, data=data)].any(), "what is taken comes behind even those"


def greedy(points: Tensor, taken: list[int], count: int) -> list[int]:
    """The plain algorithm: each time the point whose nearest centre is farthest."""
    points = points.double()
    centres, chosen = list(taken), []
    for _ in range(count):
        if centres:
            gaps = [min(float((points[x] - points[c]).norm()) for c in centres) for x in range(len(points))]
        else:
            gaps = [float((points[x] - points.mean(0)).norm()) for x in range(len(points))]
        free = [x for x in range(len(points)) if x not in taken and x not in chosen]
        row = max(free, key=lambda x: gaps[x])
        chosen.append(row)
        centres.append(row)
    return sorted(chosen)


@pytest.mark.parametrize("taken", [[], [3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("space", ["raw", "probabilities", "directions"])
def test_k_center_is_the_greedy_algorithm(space, taken, monkeypatch):
    monkeypatch.setattr("kdbench.artifacts.selectors.CENTRE_BLOCK", 5)  # several blocks of distances
    data = given(1)
    points = {
        "raw": lambda x: x,
        "probabilities": lambda x: x.softmax(-1),
        "directions": lambda x: F.normalize(x, dim=-1),
    }
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[taken] = True
    expected = greedy(points[space](data["student"].double()), taken, COUNT)
    assert select("k_center", taken=mask if taken else None, data=data, space=space) == expected


def test_k_center_covers_better_than_a_draw():
    data = given(2)
    points = data["student"].double()

    def radius(rows: list[int]) -> float:
        return float(torch.cdist(points, points[rows]).amin(-1).max())

    draws = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(n))[:COUNT].tolist() for n in range(50)]
    radii = sorted(radius(rows) for rows in draws)
    assert radius(select("k_center", data=data)) < radii[len(radii) // 4]
    assert radius(select("k_center", data=data)) <= 2 * radii[0], "at most twice the best there is"


def test_a_draw_is_uniform_and_a_function_of_its_seed():
    selector: Selector = SELECTORS.build("random", {})
    index = torch.arange(6)
    counts = torch.zeros(6)
    for seed in range(600):
        counts[selector(2, None, index=index, seed=seed)] += 1
    assert (counts - 200).abs().max() < 50
    assert torch.equal(selector(2, None, index=index, seed=5), selector(2, None, index=index, seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_keeps_to_its_count_and_leaves_the_taken(name):
    taken = torch.zeros(ROWS, dtype=torch.bool)
    taken[select(name)] = True
    for count in (1, COUNT, ROWS - COUNT):
        rows = select(name, count, taken)
        assert len(rows) == len(set(rows)) == count and rows == sorted(rows)
        assert not taken[rows].any()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_the_order_of_the_rows_does_not_matter(name):
    data = given(3)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    moved = {key: value[order] for key, value in data.items()}
    assert sorted(order[select(name, data=moved)].tolist()) == select(name, data=data)


@pytest.mark.parametrize(("name", "masked"), list(itertools.product(NAMES, [False, True])))
def test_no_selector_reads_a_value_on_the_host(name, masked):
    """It may stand in a training step: nothing waits for the device, and no shape depends on a value."""
    entry = SELECTORS.entry(name)
    with FakeTensorMode() as mode:
        operands = {k: mode.from_tensor(v) for k, v in given().items() if k in entry.inputs}
        taken = torch.zeros(ROWS, dtype=torch.bool) if masked else None
        rows = SELECTORS.build(name, {})(COUNT, taken, **operands)
        assert tuple(rows.shape) == (COUNT,) and rows.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_declares_what_it_reads(name):
    entry = SELECTORS.entry(name)
    fields = {"label", "index", "labelled", "seed", "count", "excluded"}
    assert set(entry.facts.get("operands", ())) == set(entry.inputs) - fields
    assert inspect.getdoc(entry.load())
