"""Every loss once more, as plain loops over Python floats (float64), from the formula of the paper or its code.

Operands are nested lists, results lists of floats (sample space) or floats (batch space). Nothing here is vectorised
or shared with kdbench, and gradients come from central differences, so that the two can only agree by being right.
"""

import math


def _softmax(logits, temperature=1.0):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def _kl(q, p):
    return sum(qk * math.log(qk / pk) for qk, pk in zip(q, p, strict=True))


def _flat(nested):
    return [x for part in nested for x in _flat(part)] if isinstance(nested, list) else [nested]


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cross_entropy(student, label, label_other=None, mix=None, label_smoothing=0.0):
    losses = []
    for i, logits in enumerate(student):
        classes = len(logits)
        p = _softmax(logits)
        shares = [(label[i], 1.0)] if mix is None else [(label[i], mix[i]), (label_other[i], 1 - mix[i])]
        loss = 0.0
        for own, share in shares:
            if own < 0:
                continue
            for k in range(classes):
                target = label_smoothing / classes + (1 - label_smoothing) * (k == own)
                loss -= share * target * math.log(p[k])
        losses.append(loss)
    return losses


def joint_cross_entropy(student, kind, label, kinds=4):
    losses = []
    for logits, k, own in zip(student, kind, label, strict=True):
        pairs = [(c, j) for c in range(len(logits) // kinds) for j in range(kinds)]
        p = dict(zip(pairs, _softmax(logits), strict=True))
        losses.append(0.0 if own < 0 else -math.log(p[own, k]))
    return losses


def kd(student, teacher, temperature=4.0):
    return [
        temperature**2 * _kl(_softmax(t, temperature), _softmax(s, temperature))
        for s, t in zip(student, teacher, strict=True)
    ]


def dkd(student, teacher, label, alpha=1.0, beta=8.0, temperature=4.0):
    losses = []
    for s, t, own in zip(student, teacher, label, strict=True):
        if own < 0:
            losses.append(0.0)
            continue
        p, q = _softmax(s, temperature), _softmax(t, temperature)
        target = _kl([q[own], 1 - q[own]], [p[own], 1 - p[own]])
        others = [k for k in range(len(s)) if k != own]
        rest = _kl(_softmax([t[k] for k in others], temperature), _softmax([s[k] for k in others], temperature))
        losses.append(temperature**2 * (alpha * target + beta * rest))
    return losses


def logit_mse(student, teacher, centre=False):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        shift = (sum(s) - sum(t)) / len(s) if centre else 0.0
        losses.append(sum((a - b - shift) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
    return losses


def _correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    x, y = [a - mean_x for a in x], [b - mean_y for b in y]
    return _dot(x, y) / (math.sqrt(_dot(x, x)) * math.sqrt(_dot(y, y)) + 1e-8)


def dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    p = [_softmax(s, temperature) for s in student]
    q = [_softmax(t, temperature) for t in teacher]
    inter = [1 - _correlation(a, b) for a, b in zip(p, q, strict=True)]
    intra = [1 - _correlation([row[k] for row in p], [row[k] for row in q]) for k in range(len(p[0]))]
    return temperature**2 * (beta * sum(inter) / len(inter) + gamma * sum(intra) / len(intra))


def hint(student, teacher):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(_flat(s), _flat(t), strict=True)]
        losses.append(sum(squares) / len(squares))
    return losses


def _pooled(channel, height, width):
    """Average of the cells of each window; only whole windows, which is all that the cases need."""
    tall, wide = len(channel) // height, len(channel[0]) // width
    return [
        [
            sum(channel[r * tall + i][c * wide + j] for i in range(tall) for j in range(wide)) / (tall * wide)
            for c in range(width)
        ]
        for r in range(height)
    ]


def _attention(feature, height, width, p):
    channels = [_pooled(channel, height, width) for channel in feature]
    places = [
        sum(abs(channel[r][c]) ** p for channel in channels) / len(channels)
        for r in range(height)
        for c in range(width)
    ]
    length = math.sqrt(_dot(places, places))
    return [place / length for place in places]


def at(student, teacher, p=2.0):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        height, width = min(len(s[0]), len(t[0])), min(len(s[0][0]), len(t[0][0]))
        ours, theirs = _attention(s, height, width, p), _attention(t, height, width, p)
        losses.append(sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours))
    return losses


def sp(student, teacher):
    n, loss = len(student), 0.0
    s, t = [_flat(row) for row in student], [_flat(row) for row in teacher]
    for i in range(n):
        ours, theirs = [_dot(s[i], s[j]) for j in range(n)], [_dot(t[i], t[j]) for j in range(n)]
        for j in range(n):
            loss += (ours[j] / math.sqrt(_dot(ours, ours)) - theirs[j] / math.sqrt(_dot(theirs, theirs))) ** 2
    return loss / n**2


def _huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def _minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def rkd(student, teacher, weight_distance=25.0, weight_angle=50.0, counts=None):
    n = len(student)
    c = counts or [1.0] * n
    distances, cosines = [], []
    for rows in ([_flat(row) for row in student], [_flat(row) for row in teacher]):
        d = [[math.sqrt(_dot(_minus(a, b), _minus(a, b))) for b in rows] for a in rows]
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        mean = sum(c[i] * c[j] * d[i][j] for i, j in pairs) / sum(c[i] * c[j] for i, j in pairs)
        distances.append([[x / mean for x in row] for row in d])
        angle = {}
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    inner = _dot(_minus(rows[j], rows[i]), _minus(rows[k], rows[i]))
                    angle[i, j, k] = inner / (d[i][j] * d[i][k]) if i not in (j, k) else 0.0
        cosines.append(angle)
    distance = angles = 0.0
    for i in range(n):
        for j in range(n):
            distance += c[i] * c[j] * _huber(distances[0][i][j] - distances[1][i][j])
            for k in range(n):
                angles += c[i] * c[j] * c[k] * _huber(cosines[0][i, j, k] - cosines[1][i, j, k])
    return weight_distance * distance / sum(c) ** 2 + weight_angle * angles / sum(c) ** 3


def pkt(student, teacher):
    n, eps = len(student), 1e-7
    neighbours = []
    for rows in ([_flat(row) for row in student], [_flat(row) for row in teacher]):
        lengths = [math.sqrt(_dot(row, row)) + eps for row in rows]
        kernel = [[(_dot(rows[i], rows[j]) / (lengths[i] * lengths[j]) + 1) / 2 for j in range(n)] for i in range(n)]
        neighbours.append([[k / sum(row) for k in row] for row in kernel])
    p, q = neighbours
    total = sum(q[i][j] * math.log((q[i][j] + eps) / (p[i][j] + eps)) for i in range(n) for j in range(n))
    return total / n**2


def similarity_distribution(student, teacher, temperature=0.09):
    n, distributions = len(student), []
    for rows in ([_flat(row) for row in student], [_flat(row) for row in teacher]):
        lengths = [math.sqrt(_dot(row, row)) for row in rows]
        powers = [
            [math.exp(_dot(rows[i], rows[j]) / (lengths[i] * lengths[j]) / temperature) for j in range(n)]
            for i in range(n)
        ]
        distributions.append(
            [[powers[i][j] / sum(p for k, p in enumerate(powers[i]) if k != i) for j in range(n)] for i in range(n)]
        )
    q, p = distributions
    return -sum(p[i][j] * math.log(q[i][j]) for i in range(n) for j in range(n) if j != i) / n


def numerical_gradient(function, tensor, step=1e-5):
    """Gradient of `function` (nested list -> float) at a float64 tensor, one element at a time."""
    gradient = tensor.new_zeros(tensor.shape)
    for place in range(tensor.numel()):
        up, down = tensor.clone(), tensor.clone()
        up.view(-1)[place] += step
        down.view(-1)[place] -= step
        gradient.view(-1)[place] = (function(up.tolist()) - function(down.tolist())) / (2 * step)
    return gradient
