"""Metrics against plain loops in float64, and the properties that masks and ranks must have."""

import math

import pytest
import torch

from kdbench.config.schema import PartConfig
from kdbench.engine.evaluation.metrics import IGNORE_INDEX, MetricSet, higher_is_better
from kdbench.errors import ConfigError
from kdbench.registry import METRICS

ALL = ["top1", "top5", "nll", "ece", "agreement", "per_class", "confusion"]
CLASSES = 7


def batch(seed: int = 0, rows: int = 40, classes: int = CLASSES):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=draw)
    teacher = logits + torch.randn(rows, classes, generator=draw)
    label = torch.randint(classes, (rows,), generator=draw)
    return logits, label, teacher


def probabilities(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    return [value / sum(exps) for value in exps]


def reference(logits, label, teacher, bins: int = 15) -> dict[str, float]:
    """Every metric by plain Python, sample by sample, with nothing of torch but the numbers."""
    rows, labels, others = logits.double().tolist(), label.tolist(), teacher.double().tolist()
    n = len(rows)
    top1 = top5 = nll = same = kl = 0.0
    by_bin = [[0, 0.0, 0.0] for _ in range(bins)]
    by_class = {c: [0, 0] for c in range(len(rows[0]))}
    for row, target, other in zip(rows, labels, others, strict=True):
        p, q = probabilities(row), probabilities(other)
        order = sorted(range(len(row)), key=lambda c: -row[c])
        hit = order[0] == target
        top1 += hit
        top5 += target in order[:5]
        nll -= math.log(p[target])
        same += order[0] == max(range(len(other)), key=lambda c: other[c])
        kl += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        m = next(i for i in range(bins) if max(p) <= (i + 1) / bins)
        by_bin[m][0] += 1
        by_bin[m][1] += max(p)
        by_bin[m][2] += hit
        by_class[target][0] += 1
        by_class[target][1] += hit
    ece = sum(count / n * abs(right / count - confidence / count) for count, confidence, right in by_bin if count)
    values = {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "nll": nll / n, "ece": 100 * ece}
    values |= {"agreement": 100 * same / n, "teacher_kl": kl / n}
    return values | {f"per_class/{c}": 100 * right / seen for c, (seen, right) in by_class.items()}


def test_all_equal_a_plain_loop_over_samples():
    logits, label, teacher = batch(rows=200)
    metrics = MetricSet(ALL, CLASSES)
    for part in range(4):
        rows = slice(50 * part, 50 * part + 50)
        metrics.update(logits[rows], label[rows], teacher[rows])
    assert metrics.compute() == pytest.approx(reference(logits, label, teacher), rel=1e-6)


def test_the_confusion_matrix_counts_label_by_prediction():
    logits, label, _ = batch()
    metrics = MetricSet(["confusion"], CLASSES)
    metrics.update(logits, label)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for row, target in zip(logits, label, strict=True):
        expected[target, row.argmax()] += 1
    assert torch.equal(metrics.confusion(), expected)
    assert metrics.compute() == {}


def test_padded_rows_and_hidden_labels_equal_left_out_rows():
    logits, label, teacher = batch(rows=60)
    kept = torch.arange(60) % 3 != 0
    expected = MetricSet(ALL, CLASSES)
    expected.update(logits[kept], label[kept], teacher[kept])

    padded = MetricSet(ALL, CLASSES)
    padded.update(torch.where(kept[:, None], logits, float("nan")), label, teacher, valid=kept)
    assert padded.compute() == expected.compute()
    assert torch.equal(padded.confusion(), expected.confusion())

    reads_labels = [name for name in ALL if name != "agreement"]
    hidden = MetricSet(reads_labels, CLASSES)
    hidden.update(logits, torch.where(kept, label, IGNORE_INDEX))
    shown = MetricSet(reads_labels, CLASSES)
    shown.update(logits[kept], label[kept])
    assert hidden.compute() == shown.compute()
    assert torch.equal(hidden.confusion(), shown.confusion())


def test_agreement_counts_samples_with_a_hidden_label_too():
    logits, label, teacher = batch()
    metrics, blind = MetricSet(["agreement"], CLASSES), MetricSet(["agreement"], CLASSES)
    metrics.update(logits, label, teacher)
    blind.update(logits, torch.full_like(label, IGNORE_INDEX), teacher)
    assert metrics.compute() == blind.compute()


def test_agreement_with_itself_is_whole_and_its_divergence_zero():
    logits, label, _ = batch()
    metrics = MetricSet(["agreement"], CLASSES)
    metrics.update(logits, label, logits.clone())
    assert metrics.compute() == {"agreement": 100.0, "teacher_kl": pytest.approx(0, abs=1e-9)}


def test_without_a_teacher_its_metrics_are_left_out():
    logits, label, _ = batch()
    metrics = MetricSet(["top1", "agreement"], CLASSES)
    metrics.update(logits, label)
    assert list(metrics.compute()) == ["top1"]
    assert metrics.needs_teacher and not MetricSet(["top1"], CLASSES).needs_teacher


def test_ece_of_a_calibrated_predictor_is_small_and_of_a_boaster_is_its_error():
    sure = torch.full((10, 2), 0.0)
    sure[:, 0] = 50.0
    label = torch.tensor([0] * 6 + [1] * 4)
    metrics = MetricSet(["ece"], 2)
    metrics.update(sure, label)
    assert metrics.compute()["ece"] == pytest.approx(40.0)
    fair = torch.log(torch.tensor([[0.6, 0.4]])).repeat(10, 1)
    metrics.reset()
    metrics.update(fair, label)
    assert metrics.compute()["ece"] == pytest.approx(0.0, abs=1e-5)


def test_ece_puts_a_confidence_on_the_edge_into_the_lower_bin():
    metrics = MetricSet([PartConfig(type="ece", params={"bins": 2})], 2)
    metrics.update(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]))
    assert metrics.metrics["ece"].state["seen"].tolist() == [1, 0]


def test_top5_with_fewer_than_five_classes_is_whole():
    logits, label, _ = batch(classes=3)
    metrics = MetricSet(["top5"], 3)
    metrics.update(logits, label)
    assert metrics.compute()["top5"] == 100.0


def test_ranks_added_up_equal_one_process():
    logits, label, teacher = batch(rows=90)
    whole = MetricSet(ALL, CLASSES)
    whole.update(logits, label, teacher)
    ranks = [MetricSet(ALL, CLASSES) for _ in range(3)]
    for rank, metrics in enumerate(ranks):
        metrics.update(logits[rank::3], label[rank::3], teacher[rank::3])
    shared: list[list[torch.Tensor]] = []
    for metrics in ranks:
        mine: list[torch.Tensor] = []
        metrics.reduce(mine.append)
        shared.append(mine)
    for tensors in zip(*shared, strict=True):  # what an all-reduce does
        total = torch.stack(tensors).sum(0)
        for tensor in tensors:
            tensor.copy_(total)
    for metrics in ranks:
        assert metrics.compute() == pytest.approx(whole.compute(), rel=1e-12)
        assert torch.equal(metrics.confusion(), whole.confusion())


def test_update_reads_nothing_from_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        metrics = MetricSet(ALL, CLASSES)
        label = torch.zeros(8, dtype=torch.int64)
        metrics.update(torch.randn(8, CLASSES), label, torch.randn(8, CLASSES), torch.ones(8, dtype=torch.bool))


def test_goes_on_counting_from_its_state():
    logits, label, teacher = batch()
    whole, first, second = (MetricSet(ALL, CLASSES) for _ in range(3))
    whole.update(logits, label, teacher)
    first.update(logits[:17], label[:17], teacher[:17])
    second.load_state_dict(first.state_dict())
    second.update(logits[17:], label[17:], teacher[17:])
    assert second.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_nothing_counted_is_nan_not_zero():
    assert all(math.isnan(value) for value in MetricSet(["top1", "nll", "ece"], 3).compute().values())


def test_half_precision_logits_are_widened_before_the_softmax():
    logits, label, teacher = batch()
    half, wide = MetricSet(ALL, CLASSES), MetricSet(ALL, CLASSES)
    half.update(logits.bfloat16(), label, teacher.bfloat16())
    wide.update(logits.bfloat16().float(), label, teacher.bfloat16().float())
    assert half.compute() == wide.compute()


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="'top1' is named twice"):
        MetricSet(["top1", "top1"], 3)
    with pytest.raises(ConfigError, match="Did you mean 'top5'"):
        MetricSet(["topp5"], 3)
    with pytest.raises(ConfigError, match="no parameter 'bin'"):
        MetricSet([PartConfig(type="ece", params={"bin": 10})], 3)


def test_every_metric_says_which_way_is_better():
    for name, entry in METRICS.entries.items():
        assert name == "confusion" or "higher" in entry.facts
    assert higher_is_better("top1") and higher_is_better("per_class/3")
    assert not higher_is_better("nll") and not higher_is_better("teacher_kl")
