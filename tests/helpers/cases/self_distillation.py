"""Cases of `kdbench.terms.self_distillation`."""

from __future__ import annotations

import math

from helpers.cases.base import INDEX, LABELS, Mistake, TermCase, scaled, with_params, without_history
from helpers.cases.logits import kd
from helpers.cases.loops import kl_divergence, softmax

WRONG_CLASSES = Mistake(
    "4 classes of the data, but the student's operand has 5", shapes={"student": (2, 5), "index": (2,)}
)
# Samples 7, 3 and 11 are visited twice or once before; 39 and 0 are new.
EARLIER = [{"index": [3, 25, 7, 30, 12]}, {"index": [7, 11, 3, 8, 30]}]


def _earlier_softmaxes(history, sample):
    """Returns the predictions of a sample in the earlier steps, oldest first."""
    return [softmax(s) for step in history for s, i in zip(step["student"], step["index"], strict=True) if i == sample]


def self_target(student, label, index, history=(), alpha=0.8):
    losses = []
    for s, row_class, sample in zip(student, label, index, strict=True):
        target = [float(k == row_class) for k in range(len(s))]
        earlier = _earlier_softmaxes(history, sample)
        if earlier:
            target = [(1 - alpha) * t + alpha * p for t, p in zip(target, earlier[-1], strict=True)]
        losses.append(-sum(t * math.log(p) for t, p in zip(target, softmax(s), strict=True)))
    return losses


SELF_TARGET = TermCase(
    "self_target",
    self_target,
    {"alpha": 0.6},
    teacher=None,
    fields={"label": LABELS, "index": INDEX},
    history=EARLIER,
    controls={"no memory": without_history, "different alpha": with_params(alpha=0.3)},
    variants={"first": {"history": (), "controls": {"half": scaled(0.5)}}},
    mistakes=[WRONG_CLASSES, Mistake(r"alpha must be in \[0, 1\]", {"alpha": 1.5})],
    unit_interval=["alpha"],
)


def last_batch(student, index, history, temperature=3.0):
    """Compares with the last step only: a visit in an earlier step does not count."""
    previous = dict(zip(history[-1]["index"], history[-1]["student"], strict=True))
    return [
        kd([s], [previous[i]], temperature)[0] if i in previous else 0.0 for s, i in zip(student, index, strict=True)
    ]


LAST_BATCH = TermCase(
    "last_batch",
    last_batch,
    {"temperature": 2.0},
    teacher=None,
    fields={"index": INDEX},
    history=EARLIER,
    controls={"no memory": without_history, "no T^2": scaled(1 / 4), "T 1": with_params(temperature=1.0)},
    mistakes=[WRONG_CLASSES, Mistake("last_batch: temperature must be above 0", {"temperature": 0})],
)


def temporal_ensemble(student, index, history, momentum=0.6):
    losses = []
    for s, sample in zip(student, index, strict=True):
        earlier = _earlier_softmaxes(history, sample)
        if not earlier:
            losses.append(0.0)
            continue
        weights = [momentum ** (len(earlier) - 1 - visit) for visit in range(len(earlier))]
        mean = [sum(w * p[k] for w, p in zip(weights, earlier, strict=True)) / sum(weights) for k in range(len(s))]
        losses.append(sum((a - b) ** 2 for a, b in zip(softmax(s), mean, strict=True)) / len(s))
    return losses


TEMPORAL_ENSEMBLE = TermCase(
    "temporal_ensemble",
    temporal_ensemble,
    teacher=None,
    fields={"index": INDEX},
    history=EARLIER,
    controls={"no memory": without_history, "last visit only": with_params(momentum=0.0), "sum": scaled(4)},
    mistakes=[WRONG_CLASSES, Mistake("momentum must be below 1", {"momentum": 1.0})],
)


def tf_kd(student, label, correct=0.99, temperature=20.0):
    losses = []
    for s, row_class in zip(student, label, strict=True):
        virtual = [correct if k == row_class else (1 - correct) / (len(s) - 1) for k in range(len(s))]
        losses.append(kl_divergence(softmax(virtual, temperature), softmax(s)))
    return losses


TF_KD = TermCase(
    "tf_kd",
    tf_kd,
    teacher=None,
    fields={"label": LABELS},
    controls={"less certain": with_params(correct=0.7), "T 1": with_params(temperature=1.0)},
    mistakes=[
        Mistake("no better than chance over 2 classes", {"correct": 0.5}, shapes={"student": (8, 2), "label": (8,)}),
        Mistake("tf_kd: temperature must be above 0", {"temperature": 0}),
    ],
)
