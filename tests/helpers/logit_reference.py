"""The terms on logits, on generated images and on gates once more, as plain loops over Python floats."""

import math

from helpers.term_reference import _dot, _flat, _kl, _softmax, kd


def divergence(student, teacher, kind="js", temperature=1.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        p, q = _softmax(s, temperature), _softmax(t, temperature)
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        value = {
            "forward_kl": _kl(q, p),
            "reverse_kl": _kl(p, q),
            "js": _kl(p, m) / 2 + _kl(q, m) / 2,
            "soft_cross_entropy": -sum(b * math.log(a) for a, b in zip(p, q, strict=True)),
        }[kind]
        losses.append(temperature**2 * value)
    return losses


def label_mse(student, label):
    return [
        sum((p - (k == y)) ** 2 for k, p in enumerate(_softmax(s))) / len(s)
        for s, y in zip(student, label, strict=True)
    ]


def probability_mse(student, teacher):
    return [
        sum((a - b) ** 2 for a, b in zip(_softmax(s), _softmax(t), strict=True)) / len(s)
        for s, t in zip(student, teacher, strict=True)
    ]


def _standardised(logits):
    mean = sum(logits) / len(logits)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / (deviation + 1e-7) for z in logits]


def standardised_kd(student, teacher, temperature=2.0):
    return kd([_standardised(s) for s in student], [_standardised(t) for t in teacher], temperature)


def entropy(student, of="logits"):
    return [-sum(p * math.log(p) for p in (_softmax(s) if of == "logits" else s)) for s in student]


def self_target(student, label, index, alpha=0.8, before=None):
    losses = []
    for s, own, place in zip(student, label, index, strict=True):
        p = _softmax(s)
        target = [float(k == own) for k in range(len(s))]
        if before is not None and place in before:
            target = [(1 - alpha) * t + alpha * b for t, b in zip(target, before[place], strict=True)]
        losses.append(-sum(t * math.log(a) for t, a in zip(target, p, strict=True)))
    return losses


def tf_kd(student, label, correct=0.99, temperature=20.0):
    losses = []
    for s, own in zip(student, label, strict=True):
        virtual = [correct if k == own else (1 - correct) / (len(s) - 1) for k in range(len(s))]
        losses.append(_kl(_softmax(virtual, temperature), _softmax(s)))
    return losses


def ctkd(student, teacher, lowest=1.0, span=20.0):
    return kd(student, teacher, lowest + span / (1 + math.exp(-1.0)))


def competition(student, teacher, temperature=3.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        p, q = _softmax(s, temperature), _softmax(t, temperature)
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        p, q, m = ([min(max(x, 0.01), 0.99) for x in part] for part in (p, q, m))
        losses.append(1 - min(max(_kl(m, p) / 2 + _kl(m, q) / 2, 0.0), 1.0))
    return losses


def binary(student, target=1.0):
    losses = []
    for value in student:
        sigmoid = 1 / (1 + math.exp(-(value[0] if isinstance(value, list) else value)))
        losses.append(-target * math.log(sigmoid) - (1 - target) * math.log(1 - sigmoid))
    return losses


def one_hot(student):
    return [-math.log(max(_softmax(s))) for s in student]


def information_entropy(student):
    p = [_softmax(s) for s in student]
    mean = [sum(row[k] for row in p) / len(p) for k in range(len(p[0]))]
    return sum(m * math.log(m) for m in mean)


def activation(student):
    return [-sum(abs(x) for x in _flat(s)) / len(_flat(s)) for s in student]


def total_variation(student, norm=1):
    losses = []
    for image in student:
        loss = 0.0
        for down, right in ((0, 1), (1, 0), (1, -1), (1, 1)):
            found = [
                channel[r][c] - channel[r + down][c + right]
                for channel in image
                for r in range(len(channel) - down)
                for c in range(len(channel[0]))
                if 0 <= c + right < len(channel[0])
            ]
            loss += sum(abs(x) for x in found) / len(found) if norm == 1 else math.sqrt(_dot(found, found))
        losses.append(loss)
    return losses


def image_norm(student):
    return [math.sqrt(_dot(_flat(s), _flat(s))) for s in student]


def icarl(student, teacher, label, old):
    losses = []
    for s, t, own in zip(student, teacher, label, strict=True):
        loss = 0.0
        for k in range(len(s)):
            g, q = 1 / (1 + math.exp(-s[k])), 1 / (1 + math.exp(-t[k])) if k in old else float(k == own)
            loss -= q * math.log(g) + (1 - q) * math.log(1 - g)
        losses.append(loss)
    return losses


def proxy_contrastive(student, label, temperature=0.09):
    loss = 0.0
    for s, own in zip(student, label, strict=True):
        loss -= math.log(math.exp(s[own] / temperature) / sum(math.exp(s[other] / temperature) for other in label))
    return loss / len(student)


def proxy_distance(student, teacher, label):
    values = [(s[c] - t[c]) ** 2 for s, t in zip(student, teacher, strict=True) for c in label]
    return sum(values) / len(values)


def load_balance(student, kind="kl"):
    experts = len(student[0])
    mean = [sum(row[k] for row in student) / len(student) for k in range(experts)]
    if kind == "kl":
        return _kl([1 / experts] * experts, mean)
    middle = sum(mean) / experts
    return math.sqrt(sum((m - middle) ** 2 for m in mean) / (experts - 1)) / middle


def bkd(student, teacher, counts, temperature=2.0, beta=0.9999):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        raised = [q * (1 - beta) / (1 - beta**n) for q, n in zip(_softmax(t, temperature), counts, strict=True)]
        target = [x / sum(raised) for x in raised]
        losses.append(temperature**2 * _kl(target, _softmax(s, temperature)))
    return losses


def sinkhorn(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    n = len(student)
    p, q = [_softmax(s, temperature) for s in student], [_softmax(t, temperature) for t in teacher]
    cost = [[sum(abs(a - b) for a, b in zip(p[i], q[j], strict=True)) for j in range(n)] for i in range(n)]
    plan = [[math.exp(-cost[i][j] / epsilon) for j in range(n)] for i in range(n)]
    for _ in range(iterations):
        plan = [[x / sum(row) for x in row] for row in plan]
        columns = [sum(plan[i][j] for i in range(n)) for j in range(n)]
        plan = [[plan[i][j] / columns[j] for j in range(n)] for i in range(n)]
    return sum(plan[i][j] * cost[i][j] for i in range(n) for j in range(n)) / n
