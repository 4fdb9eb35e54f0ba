"""Wirings that cannot be: each is refused when the recipe is read or planned, in words and with its place."""

from __future__ import annotations

import pytest
from support import parts, plan_of, recipe  # noqa: F401

from kdbench.errors import ConfigError

HEAD = """
student: {model: t_layers}
teacher: {model: {type: t_layers, hidden: 16}}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
batch_size: 16
"""


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as told:
        plan_of(recipe(HEAD + text, *overrides))
    return str(told.value)


WRONG = {
    "averages of each other": (
        "models: {a: {ema: b}, b: {ema: a}}\nterms: {ce: cross_entropy}",
        ["follow each other in a circle"],
    ),
    "inputs in a circle": (
        "models: {a: {model: t_layers, input: 'b:logits'}, b: {model: t_layers, input: 'a:logits'}}\n"
        "terms: {ce: cross_entropy}",
        ["in a circle", "a -> b -> a"],
    ),
    "nothing to update": (
        "terms: {kd: {type: kd, student: teacher, teacher: student}}",
        ["nothing to update", "student"],
    ),
    "an update of nothing": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [], terms: [ce]}]",
        ["an update needs `models`"],
    ),
    "one model in two updates at once": (
        "terms: {ce: cross_entropy, kd: kd}\n"
        "updates: [[{models: [student], terms: [ce]}, {models: [student], terms: [kd]}]]",
        ["two updates of one group", "no order"],
    ),
    "a group of one": (
        "terms: {ce: cross_entropy}\nupdates: [[{models: [student], terms: [ce]}]]",
        ["needs two or more"],
    ),
    "repeated at once": (
        "models: {a: {model: t_layers}}\nterms: {ce: cross_entropy, other: {type: cross_entropy, student: a}}\n"
        "updates: [[{models: [student], terms: [ce], repeat: 2}, {models: [a], terms: [other]}]]",
        ["cannot be repeated"],
    ),
    "a router over one teacher": (
        "terms: {kd: {type: kd, route: uniform}}",
        ["chooses among edges", "list of teachers"],
    ),
    "a router over a term without weights": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms: {it: {type: t_coupled, teacher: [teacher, second], route: uniform}, ce: cross_entropy}",
        ["takes no weights"],
    ),
    "a weigher that does not fit": (
        "terms: {hint: {type: hint, student: conv2, teacher: conv2, weigh: disagreement}}",
        ["weigher", "one for each"],
        ["student={model: t_conv}", "teacher={model: t_conv}"],
    ),
    "labels where there are none": (
        "models: {maker: {model: t_generator, input: noise.z}, own: {model: t_layers, input: 'maker:image'}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\n"
        "terms: {ce: {type: cross_entropy, student: own}}",
        ["reads 'label'", "source 'noise' has not"],
    ),
    "a term that is read before it": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms:\n  balance: {type: load_balance, student: 'term:kd.route'}\n"
        "  kd: {type: kd, teacher: [teacher, second], route: uniform}",
        ["no earlier term 'kd'"],
    ),
    "an output that no term has": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms:\n  kd: {type: kd, teacher: [teacher, second], route: uniform}\n"
        "  balance: {type: load_balance, student: 'term:kd.rout'}",
        ["Did you mean 'route'?"],
    ),
    "a term of another update": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms:\n  kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2, read: 'student:layer1'}}\n"
        "  balance: {type: load_balance, student: 'term:kd.gate'}\n"
        "updates: [{models: [student], terms: [kd]}, {models: [student], terms: [balance]}]",
        ["which this update does not compute before it"],
    ),
    "an operand that is missing": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms: {kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2}}}",
        ["reads the operand `read`"],
    ),
    "a combination of one": (
        "terms: {kd: {type: kd, teacher: {combine: mean_logits, of: [teacher]}}}",
        ["two or more operands"],
    ),
    "a field that no source has": (
        "terms: {mse: {type: logit_mse, teacher: train.soft}}",
        ["has no field 'soft'"],
    ),
    "something that nobody made": (
        "terms: {mse: {type: logit_mse, teacher: 'made:first.soft'}}",
        ["no earlier stage makes 'first.soft'"],
    ),
    "statistics of what has none": (
        "terms: {it: {type: bn_statistics, student: 'teacher:layer1/in', teacher: 'teacher:layer1/stats'}}",
        ["keeps no running mean"],
    ),
    "weights of a part that is another's": (
        "models: {part: {same: 'teacher:fc', input: 'student:layer1', weights: {path: x.pt}}}\n"
        "terms: {kd: {type: kd, student: part}}",
        ["the very network of 'teacher'"],
    ),
    "a transform of what stands still": (
        "terms: {ce: cross_entropy, kd: kd}",
        ["belongs to a role that trains"],
        ["teacher.transform=[{type: quantize}]"],
    ),
    "a snapshot of a part": (
        "models: {old: {snapshot: 'student:fc'}}\nterms: {kd: {type: kd, teacher: old}}",
        ["can only be shared"],
    ),
    "a selection among parts of a batch": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: [ce], select: {type: random, keep: 4}}]",
        ["the rows of the whole batch", "accumulate: 2"],
        ["accumulate=2"],
    ),
    "a result that has no classes": (
        "models: {maker: {model: t_generator, input: noise.z}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\n"
        "terms: {ce: cross_entropy}\nexport: maker",
        ["role 'maker' gives [1, 8, 8] per sample", "each of the 4 classes", "`export`"],
    ),
    "two sources side by side": (
        "models: {both: {model: t_two, input: [train.image, noise.z]}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}, train: {subset: 50}}\n"
        "terms: {ce: {type: cross_entropy, student: both}}",
        ["'both' sees noise and train side by side", "train: 16, the last one 2"],
    ),
    "nothing to measure": ("terms: {ce: cross_entropy}\nmetrics: []", ["one or more"]),
    "a selection without a number": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: [ce], select: {type: random}}]",
        ["say how many rows stay"],
    ),
}


def test_a_null_in_models_removes_what_stands_at_the_top():
    text = HEAD + "terms: {ce: {type: cross_entropy, student: own}}\nmodels: {own: {model: t_layers}, student: null}"
    assert sorted(recipe(text).stages[0].roles) == ["own", "teacher"]


def test_two_sources_of_whole_batches_may_stand_side_by_side():
    text = "models: {both: {model: t_two, input: [train.image, noise.z]}}\n"
    text += (
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\nterms: {ce: {type: cross_entropy, student: both}}"
    )
    assert plan_of(recipe(HEAD + text)).updates


@pytest.mark.parametrize("name", WRONG)
def test_a_wiring_that_cannot_be_is_refused_in_words(name):
    text, words, *overrides = WRONG[name]
    told = refused(text, *(overrides[0] if overrides else ()))
    assert "own.yaml" in told or "=" in told, "it has a place"
    for word in words:
        assert word in told


def test_an_adapter_on_a_detached_operand_alone_cannot_learn():
    """It would be a random projection that nobody trains."""
    told = refused(
        "terms: {mse: {type: logit_mse, student: teacher, teacher: {path: layer1, role: student, adapter: linear}}}"
    )
    assert "nothing to update" in told and "only an adapter" in told
