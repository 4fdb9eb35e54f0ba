"""Metrics equal plain Python loops in float64, and have the properties that masks and ranks require."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdbench.config.schema import PartConfig
from kdbench.engine.evaluation.metrics import IGNORE_INDEX, MetricSet, higher_is_better
from kdbench.errors import ConfigError
from kdbench.registry import METRICS

ALL = ["top1", "top5", "nll", "ece", "agreement", "per_class", "confusion"]
CLASSES = 7


def random_batch(seed: int = 0, rows: int = 40, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Returns student logits, labels and teacher logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    teacher = logits + torch.randn(rows, classes, generator=generator)
    label = torch.randint(classes, (rows,), generator=generator)
    return logits, label, teacher


def probabilities(row: list[float]) -> list[float]:
    largest = max(row)
    exponentials = [math.exp(value - largest) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def reference(logits: Tensor, label: Tensor, teacher: Tensor, bins: int = 15) -> dict[str, float]:
    """Computes every metric in plain Python, sample by sample, without torch operations."""
    rows, labels, teacher_rows = logits.double().tolist(), label.tolist(), teacher.double().tolist()
    n = len(rows)
    top1 = top5 = nll = agreeing = kl = 0.0
    by_bin = [[0, 0.0, 0.0] for _ in range(bins)]
    by_class = {c: [0, 0] for c in range(len(rows[0]))}
    for row, target, teacher_row in zip(rows, labels, teacher_rows, strict=True):
        p, q = probabilities(row), probabilities(teacher_row)
        order = sorted(range(len(row)), key=lambda c: -row[c])
        hit = order[0] == target
        top1 += hit
        top5 += target in order[:5]
        nll -= math.log(p[target])
        agreeing += order[0] == max(range(len(teacher_row)), key=lambda c: teacher_row[c])
        kl += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        m = next(i for i in range(bins) if max(p) <= (i + 1) / bins)
        by_bin[m][0] += 1
        by_bin[m][1] += max(p)
        by_bin[m][2] += hit
        by_class[target][0] += 1
        by_class[target][1] += hit
    ece = sum(count / n * abs(correct / count - confidence / count) for count, confidence, correct in by_bin if count)
    values = {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "nll": nll / n, "ece": 100 * ece}
    values |= {"agreement": 100 * agreeing / n, "teacher_kl": kl / n}
    return values | {f"per_class/{c}": 100 * correct / count for c, (count, correct) in by_class.items()}


def test_all_metrics_equal_a_plain_loop_over_samples():
    logits, label, teacher = random_batch(rows=200)
    metrics = MetricSet(ALL, CLASSES)
    for part in range(4):
        rows = slice(50 * part, 50 * part + 50)
        metrics.update(logits[rows], label[rows], teacher[rows])
    assert metrics.compute() == pytest.approx(reference(logits, label, teacher), rel=1e-6)


def test_confusion_matrix_counts_label_by_prediction():
    logits, label, _ = random_batch()
    metrics = MetricSet(["confusion"], CLASSES)
    metrics.update(logits, label)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for row, target in zip(logits, label, strict=True):
        expected[target, row.argmax()] += 1
    confusion = metrics.confusion()
    assert confusion is not None and torch.equal(confusion, expected)
    assert metrics.compute() == {}


def test_padded_rows_and_hidden_labels_equal_absent_rows():
    logits, label, teacher = random_batch(rows=60)
    included = torch.arange(60) % 3 != 0
    expected = MetricSet(ALL, CLASSES)
    expected.update(logits[included], label[included], teacher[included])

    padded = MetricSet(ALL, CLASSES)
    padded.update(torch.where(included[:, None], logits, float("nan")), label, teacher, valid=included)
    assert padded.compute() == expected.compute()
    assert_equal_confusion(padded, expected)

    label_metrics = [name for name in ALL if name != "agreement"]
    hidden = MetricSet(label_metrics, CLASSES)
    hidden.update(logits, torch.where(included, label, IGNORE_INDEX))
    visible = MetricSet(label_metrics, CLASSES)
    visible.update(logits[included], label[included])
    assert hidden.compute() == visible.compute()
    assert_equal_confusion(hidden, visible)


def assert_equal_confusion(first: MetricSet, second: MetricSet) -> None:
    matrices = first.confusion(), second.confusion()
    assert matrices[0] is not None and matrices[1] is not None and torch.equal(matrices[0], matrices[1])


def test_agreement_includes_samples_with_a_hidden_label():
    logits, label, teacher = random_batch()
    metrics, without_labels = MetricSet(["agreement"], CLASSES), MetricSet(["agreement"], CLASSES)
    metrics.update(logits, label, teacher)
    without_labels.update(logits, torch.full_like(label, IGNORE_INDEX), teacher)
    assert metrics.compute() == without_labels.compute()


def test_agreement_with_equal_logits_is_100_and_divergence_0():
    logits, label, _ = random_batch()
    metrics = MetricSet(["agreement"], CLASSES)
    metrics.update(logits, label, logits.clone())
    assert metrics.compute() == {"agreement": 100.0, "teacher_kl": pytest.approx(0, abs=1e-9)}


def test_without_a_teacher_its_metrics_have_no_value():
    logits, label, _ = random_batch()
    metrics = MetricSet(["top1", "agreement"], CLASSES)
    metrics.update(logits, label)
    assert list(metrics.compute()) == ["top1"]
    assert metrics.needs_teacher and not MetricSet(["top1"], CLASSES).needs_teacher


def test_ece_is_0_for_calibrated_and_the_error_for_fully_confident_predictions():
    confident = torch.full((10, 2), 0.0)
    confident[:, 0] = 50.0
    label = torch.tensor([0] * 6 + [1] * 4)
    metrics = MetricSet(["ece"], 2)
    metrics.update(confident, label)
    assert metrics.compute()["ece"] == pytest.approx(40.0)
    calibrated = torch.log(torch.tensor([[0.6, 0.4]])).repeat(10, 1)
    metrics.reset()
    metrics.update(calibrated, label)
    assert metrics.compute()["ece"] == pytest.approx(0.0, abs=1e-5)


def test_ece_counts_a_confidence_on_an_edge_in_the_lower_bin():
    metrics = MetricSet([PartConfig(type="ece", params={"bins": 2})], 2)
    metrics.update(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]))
    assert metrics.metrics["ece"].state["count"].tolist() == [1, 0]


def test_top5_below_five_classes_is_100():
    logits, label, _ = random_batch(classes=3)
    metrics = MetricSet(["top5"], 3)
    metrics.update(logits, label)
    assert metrics.compute()["top5"] == 100.0


def test_sum_over_ranks_equals_one_process():
    logits, label, teacher = random_batch(rows=90)
    expected = MetricSet(ALL, CLASSES)
    expected.update(logits, label, teacher)
    ranks = [MetricSet(ALL, CLASSES) for _ in range(3)]
    for rank, metrics in enumerate(ranks):
        metrics.update(logits[rank::3], label[rank::3], teacher[rank::3])
    states_by_rank: list[list[Tensor]] = []
    for metrics in ranks:
        states: list[Tensor] = []
        metrics.reduce(states.append)
        states_by_rank.append(states)
    for rank_states in zip(*states_by_rank, strict=True):  # the effect of an all-reduce
        total = torch.stack(rank_states).sum(0)
        for state in rank_states:
            state.copy_(total)
    for metrics in ranks:
        assert metrics.compute() == pytest.approx(expected.compute(), rel=1e-12)
        assert_equal_confusion(metrics, expected)


def test_update_reads_no_value_on_the_host():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        metrics = MetricSet(ALL, CLASSES)
        label = torch.zeros(8, dtype=torch.int64)
        metrics.update(torch.randn(8, CLASSES), label, torch.randn(8, CLASSES), torch.ones(8, dtype=torch.bool))
        with pytest.raises(DataDependentOutputException):  # control: a value that is read on the host raises
            label.sum().item()


def test_loaded_state_continues_the_count():
    logits, label, teacher = random_batch()
    expected, first, second = (MetricSet(ALL, CLASSES) for _ in range(3))
    expected.update(logits, label, teacher)
    first.update(logits[:17], label[:17], teacher[:17])
    second.load_state_dict(first.state_dict())
    second.update(logits[17:], label[17:], teacher[17:])
    assert second.compute() == pytest.approx(expected.compute(), rel=1e-12)


def test_metrics_over_no_rows_are_nan_not_zero():
    assert all(math.isnan(value) for value in MetricSet(["top1", "nll", "ece"], 3).compute().values())


def test_half_precision_logits_are_converted_before_the_softmax():
    logits, label, teacher = random_batch()
    half, single = MetricSet(ALL, CLASSES), MetricSet(ALL, CLASSES)
    half.update(logits.bfloat16(), label, teacher.bfloat16())
    single.update(logits.bfloat16().float(), label, teacher.bfloat16().float())
    assert half.compute() == single.compute()


def test_mistakes_in_metric_names_and_parameters_are_reported():
    with pytest.raises(ConfigError, match="'top1' is listed twice"):
        MetricSet(["top1", "top1"], 3)
    with pytest.raises(ConfigError, match="Did you mean 'top5'"):
        MetricSet(["topp5"], 3)
    with pytest.raises(ConfigError, match="no parameter 'bin'"):
        MetricSet([PartConfig(type="ece", params={"bin": 10})], 3)


def test_every_metric_declares_its_direction():
    for name, entry in METRICS.entries.items():
        assert name == "confusion" or "higher" in entry.facts
    assert higher_is_better("top1") and higher_is_better("per_class/3")
    assert not higher_is_better("nll") and not higher_is_better("teacher_kl")
