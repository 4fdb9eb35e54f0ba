"""The losses on features, tokens and auxiliary heads as plain loops over Python floats; see `term_reference`."""

import math

from helpers.term_reference import _dot, _flat, _kl, _pooled, _softmax


def _unit(vector):
    length = math.sqrt(_dot(vector, vector))
    return [x / length for x in vector]


def _common_size(s, t):
    return min(len(s[0]), len(t[0])), min(len(s[0][0]), len(t[0][0]))


def _channels(feature, size):
    """Each channel as a flat list of places, pooled to `size`."""
    return [_flat(_pooled(channel, *size)) for channel in feature]


def fsp(student, teacher, student_from, teacher_from):
    losses = []
    for s, t, s_from, t_from in zip(student, teacher, student_from, teacher_from, strict=True):
        matrices = []
        for first, second in ((s_from, s), (t_from, t)):
            size = _common_size(first, second)
            first, second = _channels(first, size), _channels(second, size)
            matrices.append([[_dot(a, b) / len(a) for b in second] for a in first])
        ours, theirs = _flat(matrices[0]), _flat(matrices[1])
        losses.append(sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours))
    return losses


def ab(student, teacher, margin=1.0):
    """The authors' formula, with its two conditions."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        loss = 0.0
        for a, b in zip(_flat(s), _flat(t), strict=True):
            if b > 0 and a <= margin:
                loss += (a - margin) ** 2
            if b <= 0 and a > -margin:
                loss += (a + margin) ** 2
        losses.append(loss)
    return losses


def ft(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = _unit(_flat(s)), _unit(_flat(t))
        losses.append(sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours))
    return losses


def reconstruction(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(_flat(s), _flat(t), strict=True)]
        losses.append(sum(squares) / len(squares))
    return losses


def nd(student, teacher, means, label):
    losses = []
    for s, t, own in zip(student, teacher, label, strict=True):
        if own < 0:
            losses.append(0.0)
            continue
        longer = max(math.sqrt(_dot(s, s)), math.sqrt(_dot(t, t)))
        losses.append(1 - _dot(s, _unit(means[own])) / longer)
    return losses


def nst(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        size = _common_size(s, t)
        ours, theirs = [_unit(c) for c in _channels(s, size)], [_unit(c) for c in _channels(t, size)]

        def kernel(first, second):
            return sum(_dot(a, b) ** 2 for a in first for b in second) / (len(first) * len(second))

        losses.append(kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs))
    return losses


def cc(student, teacher, gamma=0.4, order=2):
    n, total = len(student), 0.0
    ours, theirs = [_unit(_flat(s)) for s in student], [_unit(_flat(t)) for t in teacher]
    for i in range(n):
        for j in range(n):
            values = []
            for rows in (ours, theirs):
                cosine = _dot(rows[i], rows[j])
                series = sum((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))
                values.append(math.exp(-2 * gamma) * series)
            total += (values[0] - values[1]) ** 2
    return total / n**2


def mmd(student, teacher):
    """Mean feature of each batch, one element at a time."""
    rows, n = list(zip((_flat(s) for s in student), (_flat(t) for t in teacher), strict=True)), len(student)
    elements = range(len(rows[0][0]))
    return sum((sum(s[e] for s, _ in rows) / n - sum(t[e] for _, t in rows) / n) ** 2 for e in elements)


def hcl(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):

        def squares(first, second):
            first, second = _flat(first), _flat(second)
            return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)

        loss, share, shares = squares(s, t), 1.0, 1.0
        if isinstance(s[0], list):
            for size in (4, 2, 1):
                if size < len(s[0]):
                    share /= 2
                    shares += share
                    small = [[_pooled(channel, size, size) for channel in feature] for feature in (s, t)]
                    loss += share * squares(*small)
        losses.append(loss / shares)
    return losses


def ofa(student, teacher, label, power=1.0, temperature=1.0):
    losses = []
    for s, t, own in zip(student, teacher, label, strict=True):
        p, q, loss = _softmax(s, temperature), _softmax(t, temperature), 0.0
        for k in range(len(s)):
            hit = 1.0 if k == own else 0.0
            loss -= ((q[k] + hit) ** power - hit) * math.log(p[k])
        losses.append(0.0 if own < 0 else loss)
    return losses


def dhkd(student, teacher, temperature=2.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        loss = 0.0
        for a, b in zip(s, t, strict=True):
            p = 1 / (1 + math.exp(-(a - b) / temperature))
            loss += _kl([0.5, 0.5], [p, 1 - p])
        losses.append(temperature**2 * loss)
    return losses


def _vectors(feature):
    """A feature as vectors: the tokens themselves, the places of a map, or the one vector of a sample."""
    if not isinstance(feature[0], list):
        return [feature]
    if isinstance(feature[0][0], list):
        rows, columns = len(feature[0]), len(feature[0][0])
        return [[channel[r][c] for channel in feature] for r in range(rows) for c in range(columns)]
    return feature


def _counted(values, marks):
    kept = [value for value, mark in zip(values, marks, strict=True) if mark]
    return sum(kept) / len(kept) if kept else 0.0


def feature_distance(student, teacher, tokens=None, distance="l2", scale="none"):
    def scaled(vector):
        if scale == "length":
            return _unit(vector)
        if scale == "layer_norm":
            mean = sum(vector) / len(vector)
            variance = sum((x - mean) ** 2 for x in vector) / len(vector)
            return [(x - mean) / math.sqrt(variance + 1e-5) for x in vector]
        return vector

    def apart(gap):
        smooth = 0.5 * gap * gap if abs(gap) < 1 else abs(gap) - 0.5
        return {"l1": abs(gap), "l2": gap * gap, "smooth_l1": smooth}[distance]

    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        values = []
        for a, b in zip(_vectors(s), _vectors(t), strict=True):
            a, b = scaled(a), scaled(b)
            values.append(sum(apart(x - y) for x, y in zip(a, b, strict=True)) / len(a))
        losses.append(_counted(values, tokens[i] if tokens else [1] * len(values)))
    return losses


def cosine(student, teacher, tokens=None):
    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        values = [1 - _dot(_unit(a), _unit(b)) for a, b in zip(_vectors(s), _vectors(t), strict=True)]
        losses.append(_counted(values, tokens[i] if tokens else [1] * len(values)))
    return losses


def token_relation(student, teacher, tokens=None):
    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        marks = tokens[i] if tokens else [1] * len(_vectors(s))
        matrices = []
        for feature in (s, t):
            kept = [_unit(v) for v, mark in zip(_vectors(feature), marks, strict=True) if mark]
            matrices.append([_unit([_dot(a, b) for b in kept]) for a in kept])
        rows = [1 - _dot(a, b) for a, b in zip(*matrices, strict=True)]
        losses.append(sum(rows) / len(rows) if rows else 0.0)
    return losses


def attention_relation(student, teacher, heads=1, part="whole"):
    def relations(feature):
        third = {"whole": None, "query": 0, "key": 1, "value": 2}[part]
        if third is not None:
            width = len(feature[0]) // 3
            feature = [token[third * width : (third + 1) * width] for token in feature]
        size = len(feature[0]) // heads
        for head in range(heads):
            vectors = [token[head * size : (head + 1) * size] for token in feature]
            for a in vectors:
                yield _softmax([_dot(a, b) / math.sqrt(size) for b in vectors])

    losses = []
    for s, t in zip(student, teacher, strict=True):
        values = [_kl(q, p) for p, q in zip(relations(s), relations(t), strict=True)]
        losses.append(sum(values) / len(values))
    return losses


def info_nce(student, teacher, temperature=0.07):
    ours, theirs = [_unit(_flat(s)) for s in student], [_unit(_flat(t)) for t in teacher]
    losses = [-math.log(_softmax([_dot(s, t) / temperature for t in theirs])[i]) for i, s in enumerate(ours)]
    return sum(losses) / len(losses)
