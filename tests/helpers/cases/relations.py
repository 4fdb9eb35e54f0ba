"""Cases of `kdbench.terms.relations`."""

from __future__ import annotations

import math

from helpers.cases.base import BATCH, Mistake, TermCase, scaled, swapped, with_params, without
from helpers.cases.features.vectors import TOKEN_MASK, TOKENS, to_vectors
from helpers.cases.loops import dot, flatten, kl_divergence, softmax, subtract, unit

MAP = (3, 2, 2)
BATCH_MAP, BATCH_VECTOR, BATCH_TOKENS = (8, 3, 4, 4), (8, 10), (8, 5, 6)


def _rows(student, teacher):
    return [flatten(row) for row in student], [flatten(row) for row in teacher]


def sp(student, teacher):
    n, loss = len(student), 0.0
    s, t = _rows(student, teacher)
    for i in range(n):
        s_gram, t_gram = (unit([dot(rows[i], rows[j]) for j in range(n)]) for rows in (s, t))
        loss += sum((a - b) ** 2 for a, b in zip(s_gram, t_gram, strict=True))
    return loss / n**2


def _plain_gram(case, operands):
    s, t = operands["student"].flatten(1), operands["teacher"].flatten(1)
    return (s @ s.t() - t @ t.t()).square().mean()


SP = TermCase(
    "sp",
    sp,
    student=MAP,
    teacher=(7,),
    controls={"rows not normalised": _plain_gram, "mean": scaled(BATCH)},
    mistakes=[Mistake(r"shape \[8\]", shapes={"student": (8,), "teacher": BATCH_VECTOR})],
)


def _huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd(student, teacher, weight_distance=25.0, weight_angle=50.0, weight=None):
    n = len(student)
    c = weight or [1.0] * n
    relative_distances, cosines = [], []
    for rows in _rows(student, teacher):
        d = [[math.sqrt(dot(subtract(a, b), subtract(a, b))) for b in rows] for a in rows]
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        mean = sum(c[i] * c[j] * d[i][j] for i, j in pairs) / sum(c[i] * c[j] for i, j in pairs)
        relative_distances.append([[x / mean for x in row] for row in d])
        angle = {}
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    inner = dot(subtract(rows[j], rows[i]), subtract(rows[k], rows[i]))
                    angle[i, j, k] = inner / (d[i][j] * d[i][k]) if i not in (j, k) else 0.0
        cosines.append(angle)
    distance_loss = angle_loss = 0.0
    for i in range(n):
        for j in range(n):
            distance_loss += c[i] * c[j] * _huber(relative_distances[0][i][j] - relative_distances[1][i][j])
            for k in range(n):
                angle_loss += c[i] * c[j] * c[k] * _huber(cosines[0][i, j, k] - cosines[1][i, j, k])
    return weight_distance * distance_loss / sum(c) ** 2 + weight_angle * angle_loss / sum(c) ** 3


RKD = TermCase(
    "rkd",
    rkd,
    student=(3,),
    teacher=(2, 3),
    controls={"no angles": with_params(weight_angle=0.0), "no distances": with_params(weight_distance=0.0)},
    variants={
        "distance": {"params": {"weight_angle": 0.0}, "controls": {"off": scaled(0)}},
        "angle": {"params": {"weight_distance": 0.0}, "controls": {"off": scaled(0)}},
    },
    mistakes=[
        Mistake("teacher's operand", shapes={"student": BATCH_VECTOR, "teacher": (8,)}),
        Mistake("rkd: weight_angle must be at least 0", {"weight_angle": -50}),
        Mistake("the term has no loss", {"weight_angle": 0, "weight_distance": 0.0}),
    ],
    benchmark={"student": "vector", "teacher": "vector"},
)


def pkt(student, teacher):
    n, eps = len(student), 1e-7
    probabilities = []
    for rows in _rows(student, teacher):
        lengths = [math.sqrt(dot(row, row)) + eps for row in rows]
        kernel = [[(dot(rows[i], rows[j]) / (lengths[i] * lengths[j]) + 1) / 2 for j in range(n)] for i in range(n)]
        probabilities.append([[k / sum(row) for k in row] for row in kernel])
    p, q = probabilities
    total = sum(q[i][j] * math.log((q[i][j] + eps) / (p[i][j] + eps)) for i in range(n) for j in range(n))
    return total / n**2


PKT = TermCase(
    "pkt",
    pkt,
    student=(4,),
    teacher=(2, 3),
    controls={"reversed KL": swapped, "row sums": scaled(BATCH)},
    mistakes=[Mistake("8 rows and the teacher's operand has 4", shapes={"student": BATCH_VECTOR, "teacher": (4, 10)})],
    zero_tolerance=1e-7,  # 1e-7 inside the logarithms
    benchmark={"student": "vector", "teacher": "vector"},
)


def cc(student, teacher, gamma=0.4, order=2):
    n, total = len(student), 0.0
    s, t = ([unit(row) for row in rows] for rows in _rows(student, teacher))
    for i in range(n):
        for j in range(n):
            kernels = []
            for rows in (s, t):
                cosine = dot(rows[i], rows[j])
                series = sum((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))
                kernels.append(math.exp(-2 * gamma) * series)
            total += (kernels[0] - kernels[1]) ** 2
    return total / n**2


CC = TermCase(
    "cc",
    cc,
    student=MAP,
    teacher=(7,),
    controls={"order 1": with_params(order=1), "gamma 1": with_params(gamma=1.0)},
    variants={
        "order": {
            "params": {"gamma": 1.0, "order": 4},
            "student": (3,),
            "teacher": (7,),
            "controls": {"order 3": with_params(order=3)},
        }
    },
    mistakes=[
        Mistake("one number per sample", shapes={"student": (8,), "teacher": BATCH_VECTOR}),
        Mistake("cc: gamma must be above 0", {"gamma": 0.0}),
        Mistake("cc: order must be at least 1, got 0", {"order": 0}),
    ],
    benchmark={"student": "vector", "teacher": "vector"},
)


def token_relation(student, teacher, tokens=None):
    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        mask = tokens[i] if tokens else [1] * len(to_vectors(s))
        matrices = []
        for feature in (s, t):
            vectors = [unit(v) for v, counts in zip(to_vectors(feature), mask, strict=True) if counts]
            matrices.append([unit([dot(a, b) for b in vectors]) for a in vectors])
        rows = [1 - dot(a, b) for a, b in zip(*matrices, strict=True)]
        losses.append(sum(rows) / len(rows) if rows else 0.0)
    return losses


TOKEN_RELATION = TermCase(
    "token_relation",
    token_relation,
    student=TOKENS,
    teacher=(4, 3),
    controls={"sum": scaled(4)},
    variants={
        "map": {"student": MAP, "teacher": (5, 2, 2), "controls": {"sum": scaled(4)}},
        "masked": {"fields": {"tokens": TOKEN_MASK}, "controls": {"all tokens": without("tokens")}},
    },
    mistakes=[
        Mistake("reads tokens", shapes={"student": BATCH_VECTOR, "teacher": BATCH_TOKENS}),
        Mistake("student has 16 tokens and the teacher has 5", shapes={"student": BATCH_MAP, "teacher": BATCH_TOKENS}),
        Mistake(
            r"a mask over 5 tokens, but `tokens` has the shape \[4\]",
            shapes={"student": BATCH_TOKENS, "teacher": BATCH_TOKENS, "tokens": (8, 4)},
        ),
    ],
    benchmark={"student": "tokens", "teacher": "tokens"},
    recipe_operands="student: tokens, teacher: tokens",
)


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
                yield softmax([dot(a, b) / math.sqrt(size) for b in vectors])

    losses = []
    for s, t in zip(student, teacher, strict=True):
        values = [kl_divergence(q, p) for p, q in zip(relations(s), relations(t), strict=True)]
        losses.append(sum(values) / len(values))
    return losses


ATTENTION_RELATION = TermCase(
    "attention_relation",
    attention_relation,
    student=TOKENS,
    teacher=(4, 3),
    controls={"reversed KL": swapped, "sum": scaled(4)},
    variants={
        "keys": {
            "params": {"heads": 2, "part": "key"},
            "teacher": (4, 12),
            "controls": {"one head": with_params(heads=1), "values": with_params(part="value")},
        }
    },
    mistakes=[
        Mistake("4 equal parts", {"heads": 4}, shapes={"student": BATCH_TOKENS, "teacher": BATCH_TOKENS}),
        Mistake("reads tokens", shapes={"student": BATCH_MAP, "teacher": BATCH_MAP}),
        Mistake("heads must be at least 1", {"heads": 0}),
        Mistake("part must be one of whole, query, key, value", {"part": "output"}),
    ],
    benchmark={"student": "tokens", "teacher": "tokens"},
    recipe_operands="student: tokens, teacher: tokens, heads: 2",
)
