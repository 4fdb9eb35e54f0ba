"""Selected rows against plain loops in float64."""

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


def random_inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": 2 * torch.randn(ROWS, CLASSES, generator=generator),
        "reference": 2 * torch.randn(ROWS, CLASSES, generator=generator),
        "label": torch.randint(CLASSES, (ROWS,), generator=generator),
        "index": torch.arange(ROWS),
    }


def select(
    name: str, count: int = COUNT, excluded: Tensor | None = None, inputs: dict | None = None, **params
) -> list[int]:
    entry = SELECTORS.entry(name)
    selector: Selector = SELECTORS.build(name, params)
    operands = {key: value for key, value in (inputs or random_inputs()).items() if key in entry.inputs}
    if "seed" in entry.inputs:
        operands["seed"] = 3
    return selector(count, excluded, **operands).tolist()


def top_rows(scores: list[float], count: int = COUNT) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda row: -scores[row])[:count])


def probabilities(logits: Tensor) -> list[list[float]]:
    return logits.double().softmax(-1).tolist()


def losses(logits: Tensor, label: Tensor) -> list[float]:
    return [-p[y] for p, y in zip(logits.double().log_softmax(-1).tolist(), label.tolist(), strict=True)]


def test_row_scores_equal_their_formulas():
    inputs = random_inputs()
    p = probabilities(inputs["student"])
    assert select("entropy") == top_rows([-sum(x * torch.tensor(x).log().item() for x in row) for row in p])
    assert select("margin") == top_rows([-(sorted(row)[-1] - sorted(row)[-2]) for row in p])
    assert select("confidence") == top_rows([max(row) for row in p])
    assert select("confidence", least=True) == top_rows([-max(row) for row in p])
    student, reference = (losses(inputs[role], inputs["label"]) for role in ("student", "reference"))
    assert select("low_loss") == top_rows([-loss for loss in student])
    assert select("learnability") == top_rows([a - b for a, b in zip(student, reference, strict=True)])


def test_learnability_depends_on_the_reference():
    """Negative control: with a uniform reference the score is the student's loss."""
    inputs = random_inputs()
    uniform = {**inputs, "reference": torch.zeros_like(inputs["reference"])}
    hardest = top_rows(losses(inputs["student"], inputs["label"]))
    assert select("learnability", inputs=uniform) == hardest != select("learnability", inputs=inputs)


@pytest.mark.parametrize("name", ["low_loss", "learnability"])
def test_unlabelled_rows_rank_last(name):
    """With a loss of 0, unlabelled rows would rank first in `low_loss`."""
    inputs = random_inputs()
    unlabelled = torch.arange(ROWS) % 3 == 0
    inputs["label"] = torch.where(unlabelled, -100, inputs["label"])
    labelled_count = int((~unlabelled).sum())
    assert not unlabelled[select(name, labelled_count, inputs=inputs)].any()
    rows = select(name, labelled_count + 2, inputs=inputs)
    assert int(unlabelled[rows].sum()) == 2
    excluded = torch.arange(ROWS) < 5
    assert not excluded[select(name, ROWS - 5, excluded, inputs=inputs)].any(), "excluded rows rank after unlabelled"


def greedy_k_center(points: Tensor, excluded: list[int], count: int) -> list[int]:
    """Selects the point with the largest distance to its nearest center, `count` times."""
    points = points.double()
    centers, rows = list(excluded), []
    for _ in range(count):
        if centers:
            distances = [min(float((points[x] - points[c]).norm()) for c in centers) for x in range(len(points))]
        else:
            distances = [float((points[x] - points.mean(0)).norm()) for x in range(len(points))]
        free = [x for x in range(len(points)) if x not in excluded and x not in rows]
        row = max(free, key=lambda x: distances[x])
        rows.append(row)
        centers.append(row)
    return sorted(rows)


@pytest.mark.parametrize("excluded", [[], [3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("space", ["raw", "probabilities", "directions"])
def test_k_center_equals_the_greedy_algorithm(space, excluded, monkeypatch):
    monkeypatch.setattr("kdbench.artifacts.selectors.CENTER_BLOCK", 5)  # several blocks of distances
    inputs = random_inputs(1)
    transforms = {
        "raw": lambda x: x,
        "probabilities": lambda x: x.softmax(-1),
        "directions": lambda x: F.normalize(x, dim=-1),
    }
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[excluded] = True
    expected = greedy_k_center(transforms[space](inputs["student"].double()), excluded, COUNT)
    assert select("k_center", excluded=mask if excluded else None, inputs=inputs, space=space) == expected


def test_k_center_covers_better_than_random_rows():
    inputs = random_inputs(2)
    points = inputs["student"].double()

    def radius(rows: list[int]) -> float:
        return float(torch.cdist(points, points[rows]).amin(-1).max())

    draws = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(n))[:COUNT].tolist() for n in range(50)]
    radii = sorted(radius(rows) for rows in draws)
    assert radius(select("k_center", inputs=inputs)) < radii[len(radii) // 4]
    assert radius(select("k_center", inputs=inputs)) <= 2 * radii[0], "greedy k-center is a 2-approximation"


def test_random_rows_are_uniform_and_a_function_of_the_seed():
    selector: Selector = SELECTORS.build("random", {})
    index = torch.arange(6)
    counts = torch.zeros(6)
    for seed in range(600):
        counts[selector(2, None, index=index, seed=seed)] += 1
    assert (counts - 200).abs().max() < 50
    assert torch.equal(selector(2, None, index=index, seed=5), selector(2, None, index=index, seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_returns_count_sorted_rows_and_no_excluded_one(name):
    excluded = torch.zeros(ROWS, dtype=torch.bool)
    excluded[select(name)] = True
    for count in (1, COUNT, ROWS - COUNT):
        rows = select(name, count, excluded)
        assert len(rows) == len(set(rows)) == count and rows == sorted(rows)
        assert not excluded[rows].any()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_selection_does_not_depend_on_the_order_of_the_rows(name):
    inputs = random_inputs(3)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    permuted = {key: value[order] for key, value in inputs.items()}
    assert sorted(order[select(name, inputs=permuted)].tolist()) == select(name, inputs=inputs)


@pytest.mark.parametrize(("name", "masked"), list(itertools.product(NAMES, [False, True])))
def test_no_selector_reads_a_value_on_the_host(name, masked):
    """A selector can run in a training step: no synchronisation, and no shape that depends on a value."""
    entry = SELECTORS.entry(name)
    with FakeTensorMode() as mode:
        operands = {k: mode.from_tensor(v) for k, v in random_inputs().items() if k in entry.inputs}
        excluded = torch.zeros(ROWS, dtype=torch.bool) if masked else None
        rows = SELECTORS.build(name, {})(COUNT, excluded, **operands)
        assert tuple(rows.shape) == (COUNT,) and rows.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_declares_its_operands(name):
    entry = SELECTORS.entry(name)
    fields = {"label", "index", "labelled", "seed", "count", "excluded"}
    assert set(entry.facts.get("operands", ())) == set(entry.inputs) - fields
    assert inspect.getdoc(entry.load())
