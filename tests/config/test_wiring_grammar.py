"""Invalid wirings are rejected when a recipe is loaded or planned, with their location."""

from __future__ import annotations

import re

import pytest

from helpers.recipes import plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.errors import ConfigError
from kdbench.experiment.artifacts import plan_stages

HEAD = """
student: {model: t_layers}
teacher: {model: {type: t_layers, hidden: 16}}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
batch_size: 16
"""


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        plan_stages(recipe_from_text(HEAD + text, *overrides))  # what `kdbench check` does before it prints
    return str(raised.value)


NOISE = (
    "models: {maker: {model: t_generator, input: noise.z}, own: {model: t_layers, input: 'maker:image'}}\n"
    "data: {noise: {type: gaussian, shape: [6], samples: 64}}\n"
)
"""A role that sees no image, and so no label."""

GATED = (
    "models: {judge: {reuse: student, input: held.image}, gate: {model: {type: t_linear, num_classes: 1}}, "
    "free: {model: t_layers}}\ndata: {held: {}}\n"
    "terms: {kd: {type: kd, sample_weight: {type: learnt, by: gate}}, ce: cross_entropy, "
    "held: {type: cross_entropy, student: judge}, idle: {type: kd, weight: 0}}\n"
)


def with_inner_step(step: str, outer: str = "models: [gate], terms: [held]", more: str = "") -> str:
    """Returns a recipe with a student that learns by kd, and a gate that learns after an inner step."""
    return GATED + f"updates: [{{{outer}, inner_step: {step}}}, {{models: [student], terms: [kd, ce]}}{more}]"


INNER_STEPS = {
    "an inner step without roles and terms": (
        with_inner_step("{models: [], terms: []}"),
        ["updates.0.inner_step: an inner step needs `terms`", "updates.0.inner_step: an inner step needs `models`"],
    ),
    "an inner step of a role that is not there": (
        with_inner_step("{models: [studnet], terms: [kd]}"),
        ["updates.0.inner_step.models: no role 'studnet'. Did you mean 'student'?"],
    ),
    "an inner step of a frozen role": (
        with_inner_step("{models: [teacher], terms: [kd]}"),
        ["updates.0.inner_step.models: role 'teacher' is frozen; an inner step can only change trainable roles"],
    ),
    "an inner step by a term that is not there": (
        with_inner_step("{models: [student], terms: [dk]}"),
        ["updates.0.inner_step.terms: no term 'dk'. Did you mean 'kd'?"],
    ),
    "an inner step with an unknown key": (
        with_inner_step("{models: [student], terms: [kd], rate: 0.1}"),
        ["updates.0.inner_step.rate: unknown key"],
    ),
    "an inner step at rate 0": (
        with_inner_step("{models: [student], terms: [kd], lr: 0}"),
        ["updates.0.inner_step.lr: must be above 0, got 0"],
    ),
    "an inner step that is not a mapping": (
        with_inner_step("student"),
        ["updates.0.inner_step: an inner step must be a mapping"],
    ),
    "an inner step by a term of weight 0": (
        with_inner_step("{models: [student], terms: [idle]}"),
        ["updates.0.inner_step: the inner step is empty: all of its terms have weight 0"],
    ),
    "an inner step that moves nothing": (
        with_inner_step("{models: [free], terms: [kd], lr: 1}"),
        ["updates.0.inner_step: the inner step is empty: no term of kd reaches a parameter of free"],
    ),
    "an inner step that nothing reads": (
        with_inner_step("{models: [student], terms: [kd]}", "models: [gate], terms: [own]").replace(
            "idle:", "own: {type: cross_entropy, student: free}, idle:"
        ),
        ["updates.0.inner_step: no term of own reads anything that the inner step of student trains"],
    ),
    "an inner step that the learner does not touch": (
        with_inner_step("{models: [student], terms: [ce]}"),
        ["updates.0: nothing to update", "does not reach a parameter of gate through the inner step of student by ce"],
    ),
    "an inner step without a rate, of what no update moves": (
        with_inner_step("{models: [free], terms: [own]}", "models: [gate], terms: [own]").replace(
            "idle:", "own: {type: cross_entropy, student: free, sample_weight: {type: learnt, by: gate}}, idle:"
        ),
        ["updates.0.inner_step: the inner step needs a learning rate", "no update trains free.layer1"],
    ),
    "an inner step without a rate, of what two updates move": (
        with_inner_step("{models: [student], terms: [kd]}", more=", {models: [student], terms: [ce]}"),
        ["updates.0.inner_step: the inner step needs a learning rate", "2 updates train student.layer1"],
    ),
    "an inner step by what has no second derivative": (
        with_inner_step("{models: [student], terms: [kd, once]}").replace(
            "idle:", "once: {type: t_once, sample_weight: {type: learnt, by: gate}}, idle:"
        ),
        ["updates.0.inner_step: the gradient flows through", "kd, once cannot be differentiated twice"],
    ),
    "an inner step beside a selection": (
        with_inner_step("{models: [student], terms: [kd]}, select: {type: random, keep: 4}"),
        ["updates.0.select: `select` cannot be combined with `inner_step`"],
    ),
    "an inner step in fp16": (
        with_inner_step("{models: [student], terms: [kd]}") + "\nprecision: fp16",
        ["precision: fp16 cannot be combined with `inner_step`", "use bf16", "updates.0.inner_step"],
    ),
    "an exported role that reads labels": (
        "models: {leaky: {model: fusion_gate, input: ['student:logits', 'teacher:logits', train.label]}}\n"
        "terms: {ce: cross_entropy}\nexport: leaky",
        ["models.leaky.input: role 'leaky' reads labels, but role 'leaky' is evaluated"],
    ),
}
"""Invalid inner steps."""

INVALID = {
    **INNER_STEPS,
    "averages of each other": (
        "models: {a: {ema: b}, b: {ema: a}}\nterms: {ce: cross_entropy}",
        ["derived from each other in a cycle"],
    ),
    "an average of itself": ("models: {a: {ema: a}}\nterms: {ce: cross_entropy}", ["cycle: a -> a"]),
    "a cycle through a reused network": (
        "models:\n  a: {reuse: b, input: 'c:layer1'}\n  b: {model: t_layers}\n"
        "  c: {model: t_layers, input: 'a:logits'}\nterms: {ce: {type: cross_entropy, student: a}}",
        ["in a cycle: a -> c -> a"],
    ),
    "inputs in a cycle": (
        "models: {a: {model: t_layers, input: 'b:logits'}, b: {model: t_layers, input: 'a:logits'}}\n"
        "terms: {ce: cross_entropy}",
        ["in a cycle", "a -> b -> a"],
    ),
    "nothing to update": (
        "terms: {kd: {type: kd, student: teacher, teacher: student}}",
        ["nothing to update", "student"],
    ),
    "an update without roles": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [], terms: [ce]}]",
        ["an update needs `models`"],
    ),
    "an update without terms": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: []}]",
        ["an update needs `terms`"],
    ),
    "an update that reaches nothing": (
        "terms: {ce: cross_entropy, kd: {type: kd, student: teacher, teacher: student}}\n"
        "updates: [{models: [student], terms: [ce]}, {models: [student], terms: [kd]}]",
        ["updates.1: nothing to update: no term of kd reaches a trainable parameter of student"],
    ),
    "an update that reaches only one of its roles": (
        "models: {b: {model: t_layers}}\nterms: {ce: cross_entropy}\nupdates: [{models: [student, b], terms: [ce]}]",
        ["nothing to update: no term of ce reaches a trainable parameter of b", "remove it"],
    ),
    "a model and a term twice in one update": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student, student], terms: [ce, ce]}]",
        ["updates.0.models: 'student' is listed twice", "updates.0.terms: 'ce' is listed twice"],
    ),
    "one term in two simultaneous updates": (
        "models: {b: {model: t_layers}}\nterms: {ce: {type: cross_entropy, student: [student, b]}}\n"
        "updates: [[{models: [student], terms: [ce]}, {models: [b], terms: [ce]}]]",
        ["term 'ce' is in two simultaneous updates of one group"],
    ),
    "a reused network in an update": (
        "models: {h: {reuse: student}}\nterms: {ce: cross_entropy, kd: {type: kd, student: h}}\n"
        "updates: [[{models: [student], terms: [ce]}, {models: [h], terms: [kd]}]]",
        ["role 'h' is a reused network; an update can only change trainable roles"],
    ),
    "one role in two simultaneous updates": (
        "terms: {ce: cross_entropy, kd: kd}\n"
        "updates: [[{models: [student], terms: [ce]}, {models: [student], terms: [kd]}]]",
        ["two simultaneous updates of one group"],
    ),
    "a group of one": (
        "terms: {ce: cross_entropy}\nupdates: [[{models: [student], terms: [ce]}]]",
        ["needs two or more"],
    ),
    "repetition in a group": (
        "models: {a: {model: t_layers}}\nterms: {ce: cross_entropy, other: {type: cross_entropy, student: a}}\n"
        "updates: [[{models: [student], terms: [ce], repeat: 2}, {models: [a], terms: [other]}]]",
        ["`repeat` is not allowed in a group"],
    ),
    "a router over one teacher": (
        "terms: {kd: {type: kd, route: uniform}}",
        ["a router weights the teachers of a term", "list of teachers"],
    ),
    "a router over one teacher, listed": (
        "terms: {kd: {type: kd, teacher: [teacher], route: uniform}}",
        ["a router weights the teachers of a term", "list of teachers"],
    ),
    "a router over one teacher, twice": (
        "terms: {kd: {type: kd, teacher: [teacher, teacher], route: uniform}}",
        ["a router weights the teachers of a term", "are equal: teacher:logits"],
    ),
    "a router over one teacher of two students": (
        "models: {b: {model: t_layers}}\n"
        "terms: {kd: {type: kd, student: [student, b], teacher: teacher, route: uniform}}",
        ["a router weights the teachers of a term", "are equal: teacher:logits"],
    ),
    "a router over a term without weights": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms: {it: {type: t_coupled, teacher: [teacher, second], route: uniform}, ce: cross_entropy}",
        ["so `route` cannot be used"],
    ),
    "a sample weight of another shape": (
        "terms: {hint: {type: hint, student: conv2, teacher: conv2, sample_weight: disagreement}}",
        ["the sample weight returned", "one for each"],
        ["student={model: t_conv}", "teacher={model: t_conv}"],
    ),
    "labels where there are none": (
        "models: {maker: {model: t_generator, input: noise.z}, own: {model: t_layers, input: 'maker:image'}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\n"
        "terms: {ce: {type: cross_entropy, student: own}}",
        ["reads 'label'", "source 'noise' has no field"],
    ),
    "a sample weight that reads missing labels": (
        NOISE + "terms: {kd: {type: kd, student: own, teacher: own, sample_weight: {type: focal, power: 1}}}",
        ["terms.kd.sample_weight: sample weight 'focal'", "reads 'label'", "no labels"],
    ),
    "a sample weight that reads a missing teacher": (
        "terms: {ce: {type: cross_entropy, sample_weight: confidence}}",
        ["terms.ce.sample_weight: sample weight 'confidence'", "reads 'teacher'"],
    ),
    "a selector that reads labels where there are none": (
        NOISE + "terms: {kd: {type: kd, student: own, teacher: own}}\n"
        "updates: [{models: [own], terms: [kd], select: {type: learnability, keep: 8, student: own, reference: own}}]",
        ["updates.0.select: selector 'learnability'", "reads 'label'"],
    ),
    "an artifact builder that reads labels where there are none": (
        NOISE
        + "terms: {ce: cross_entropy}\nartifacts: {means: {type: class_means, source: noise, features: 'own:layer1'}}",
        ["artifacts.means: class_means reads the labels of source 'noise', which has none"],
    ),
    "a selector of an artifact that reads labels where there are none": (
        NOISE
        + "terms: {ce: cross_entropy}\nartifacts: {picked: {type: choose, source: noise, budget: 4, "
        + "by: {type: low_loss, student: own}}}",
        ["artifacts.picked: selector 'low_loss'", "reads 'label'"],
    ),
    "labels to keep where there are none": (
        "data: {noise: {type: gaussian, shape: [6], label_fraction: 4}}\nterms: {ce: cross_entropy}",
        ["data.noise.label_fraction", "of source 'noise', which has none"],
    ),
    "more labels than samples": (
        "terms: {ce: cross_entropy}\nlabel_fraction: 100",
        ["label_fraction: 100 labels, but source 'train' has only 64 samples"],
    ),
    "a larger subset than there are samples": (
        "terms: {ce: cross_entropy}\ndata: {train: {subset: 100}}",
        ["data.train.subset: 100 samples were asked for, but there are only 64"],
    ),
    "a larger part of a subset than there are samples": (
        "terms: {ce: cross_entropy}\ndata: {train: {subset: [32, {type: random, amount: 40}]}}",
        ["data.train.subset.1: 40 samples were asked for, but there are only 32"],
    ),
    "more validation than samples": (
        "terms: {ce: cross_entropy}\nvalidation: 70",
        ["validation: 70 samples were asked for, but there are only 64"],
    ),
    "a larger batch than there are samples": (
        "terms: {ce: cross_entropy}\ndata: {train: {subset: 10}}",
        ["batch_size: batch_size 16 is more than the 10 samples of source 'train'"],
    ),
    "more rows to keep than a batch has": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: [ce], select: {type: random, keep: 40}}]",
        ["updates.0.select: `keep: 40` is more than the 16 rows"],
    ),
    "a budget larger than the pool": (
        "terms: {ce: cross_entropy}\n"
        "artifacts: {pick: {type: choose, by: {type: entropy, student: student}, budget: 65, count: 2}}",
        ["artifacts.pick: choose has a budget of 65, but its source has only 64 samples"],
    ),
    "a budget larger than a part of the pool": (
        "terms: {ce: cross_entropy}\ndata: {train: {subset: 32}}\n"
        "artifacts: {pick: {type: choose, by: {type: entropy, student: student}, budget: 33, count: 2}}",
        ["artifacts.pick: choose has a budget of 33, but its source has only 32 samples"],
    ),
    "a budget that is spent before the first round": (
        "terms: {ce: cross_entropy}\nlabel_fraction: {artifact: query.pick, initial: 20}\n"
        "stages: {active: {rounds: 2, stages: {train: {epochs: 1}, query: {epochs: 0, artifacts: {pick: "
        "{type: choose, by: {type: entropy, student: student}, budget: 10, count: 5}}}}}}",
        ["artifacts.pick: choose has a budget of 10, but its source already has 20 labels"],
    ),
    "more in a round than in all": (
        "terms: {ce: cross_entropy}\n"
        "artifacts: {pick: {type: choose, by: {type: entropy, student: student}, budget: 10, count: 20}}",
        ["artifacts.pick: choose: count (20) must not be above the budget (10)"],
    ),
    "a part of a file where there is none": (
        "terms: {ce: cross_entropy}\naugment: {image: [flip], other: {from: image, then: [random_resized_crop]}}",
        ["augment.other.then.0: view 'other': random_resized_crop crops while a file is decoded", "in memory"],
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
        ["is not earlier in this list"],
    ),
    "an operand that is missing": (
        "models: {second: {model: t_layers, frozen: true}}\n"
        "terms: {kd: {type: kd, teacher: [teacher, second], route: {type: top_k, k: 2}}}",
        ["needs the operand `read`"],
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
        "terms: {mse: {type: logit_mse, teacher: 'artifact:first.soft'}}",
        ["no earlier stage produces the artifact 'first.soft'"],
    ),
    "a dataset that nobody made": (
        "terms: {ce: cross_entropy}\ndata: {pool: {artifact: first.pool}}",
        ["data.pool.artifact: no earlier stage produces the artifact 'first.pool'"],
    ),
    "a choice that nobody made": (
        "terms: {ce: cross_entropy}\ndata: {train: {subset: {artifact: first.pick}}}",
        ["data.train.subset.artifact: no earlier stage produces the artifact 'first.pick'"],
    ),
    "labels that nobody chose": (
        "terms: {ce: cross_entropy}\nlabel_fraction: {artifact: first.pick}",
        ["label_fraction.artifact: no earlier stage produces the artifact 'first.pick'"],
    ),
    "a model that nobody chose": (
        "models: {b: {model: {artifact: first.best}}}\nterms: {ce: {type: cross_entropy, student: b}}",
        ["models.b: no earlier stage produces the artifact 'first.best'"],
    ),
    "a choice of a later stage": (
        "terms: {ce: cross_entropy}\nstages:\n  one: {data: {train: {subset: {artifact: two.pick}}}}\n"
        "  two: {artifacts: {pick: {type: choose, by: {type: entropy, student: student}, budget: 4}}}",
        ["stages.one.data.train.subset.artifact: no earlier stage produces the artifact 'two.pick'"],
    ),
    "statistics of what has none": (
        "terms: {it: {type: bn_statistics, student: 'teacher:layer1/in', teacher: 'teacher:layer1/stats'}}",
        ["has no running mean"],
    ),
    "weights of a reused network": (
        "models: {part: {reuse: 'teacher:fc', input: 'student:layer1', weights: {path: x.pt}}}\n"
        "terms: {kd: {type: kd, student: part}}",
        ["reuses the network of role 'teacher'"],
    ),
    "a transform of a frozen role": (
        "terms: {ce: cross_entropy, kd: kd}",
        ["applies only to a trainable role"],
        ["teacher.transform=[{type: quantize}]"],
    ),
    "a snapshot of a module": (
        "models: {old: {snapshot: 'student:fc'}}\nterms: {kd: {type: kd, teacher: old}}",
        ["only `reuse` takes a module path"],
    ),
    "a selection from micro-batches": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: [ce], select: {type: random, keep: 4}}]",
        ["the rows of the full batch", "accumulate: 2"],
        ["accumulate=2"],
    ),
    "a result that has no classes": (
        "models: {maker: {model: t_generator, input: noise.z}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\n"
        "terms: {ce: cross_entropy}\nexport: maker",
        ["role 'maker' returns [1, 8, 8] for one sample", "each of the 4 classes", "`export`"],
    ),
    "two sources of different batch sizes": (
        "models: {both: {model: t_two, input: [train.image, noise.z]}}\n"
        "data: {noise: {type: gaussian, shape: [6], samples: 64}, train: {subset: 50}}\n"
        "terms: {ce: {type: cross_entropy, student: both}}",
        ["'both' combines rows of the sources noise and train", "noise: 16; train: 16, then 2"],
    ),
    "two sources in one combination": (
        NOISE + "terms: {ce: cross_entropy, kd: {type: kd, teacher: {combine: mean_logits, of: [teacher, own]}}}",
        ["terms.kd", "batches differ in size (noise: 16; train: 16, then 2)"],
        ["data.train={subset: 50}"],
    ),
    "two sources in a term over the batch": (
        NOISE + "terms: {ce: cross_entropy, rkd: {type: rkd, student: layer1, teacher: 'own:layer1'}}",
        ["terms.rkd", "batches differ in size"],
        ["data.train={subset: 50}"],
    ),
    "no metric": ("terms: {ce: cross_entropy}\nmetrics: []", ["one or more"]),
    "a selection without a number": (
        "terms: {ce: cross_entropy}\nupdates: [{models: [student], terms: [ce], select: {type: random}}]",
        ["the key `keep` (fraction or number of rows to keep) is missing"],
    ),
}


def test_null_in_models_removes_a_role_of_the_top_level():
    text = HEAD + "terms: {ce: {type: cross_entropy, student: own}}\nmodels: {own: {model: t_layers}, student: null}"
    assert sorted(recipe_from_text(text).stages[0].roles) == ["own", "teacher"]


def test_two_sources_of_equal_batches_may_be_inputs_of_one_role():
    text = "models: {both: {model: t_two, input: [train.image, noise.z]}}\n"
    text += (
        "data: {noise: {type: gaussian, shape: [6], samples: 64}}\nterms: {ce: {type: cross_entropy, student: both}}"
    )
    assert stage_plan(recipe_from_text(HEAD + text)).updates


@pytest.mark.parametrize("name", INVALID)
def test_invalid_wiring_is_rejected_with_its_location(name):
    text, fragments, *overrides = INVALID[name]
    message = error_of(text, *(overrides[0] if overrides else ()))
    for line in message.splitlines()[1 if " mistakes:" in message else 0 :]:
        assert re.match(r"own\.yaml:\d+ |override '", line), f"no location: {line}"
    for fragment in fragments:
        assert fragment in message


ADAPTED = "{type: logit_mse, student: teacher, teacher: {path: layer1, role: student, adapter: linear}}"


@pytest.mark.parametrize("other_terms", ["", "ce: cross_entropy, "])
def test_adapter_of_a_detached_operand_alone_cannot_learn(other_terms):
    """Checks a term whose only trainable parameters are those of an adapter, with and without other terms."""
    message = error_of(f"terms: {{{other_terms}mse: {ADAPTED}}}")
    assert message.startswith("own.yaml:8 terms.mse: ") and "reaches no parameter of student" in message
    assert "only an adapter" in message


def test_adapter_of_the_teacher_trains_beside_a_trainable_student():
    text = "terms: {mse: {type: logit_mse, teacher: {path: layer1, role: teacher, adapter: linear}}}"
    parameters = stage_plan(recipe_from_text(HEAD + text)).updates[0].parameters
    assert any(".adapter." in name for name in parameters) and any(name.startswith("student.") for name in parameters)


def test_sources_of_equal_batches_may_be_combined():
    text = "terms: {ce: cross_entropy, kd: {type: kd, teacher: {combine: mean_logits, of: [teacher, own]}}}"
    assert stage_plan(recipe_from_text(HEAD + NOISE + text)).updates


def test_smaller_last_batch_of_another_source_is_rejected_with_several_processes():
    text = "data: {memory: {subset: 50}}\nmodels: {again: {reuse: student, input: memory.image}}\n"
    text += "terms: {pcr: {type: proxy_contrastive, replayed: again, replayed_label: memory.label}}"
    assert stage_plan(recipe_from_text(HEAD + text)).updates
    with pytest.raises(ConfigError, match=r"own.yaml:10 terms.pcr.replayed.*2 processes would pad it"):
        stage_plan(recipe_from_text(HEAD + text), world_size=2)
    assert stage_plan(recipe_from_text(HEAD + text, "data.memory.subset=64"), world_size=2).updates


def test_previous_skips_a_stage_that_removed_the_role():
    text = (
        "models: {own: {model: t_layers}}\nstages:\n  one: {terms: {ce: cross_entropy}}\n"
        "  two: {models: {student: null}, terms: {ce: {type: cross_entropy, student: own}}, export: own}\n"
        "  three: {student: {weights: {stage: previous}}, terms: {ce: cross_entropy}}"
    )
    weights = recipe_from_text(HEAD + text).stages[2].roles["student"].weights
    assert weights is not None and weights.stage == "one"
