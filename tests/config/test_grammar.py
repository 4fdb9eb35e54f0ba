"""The grammar of a recipe: shorthands, addresses, defaults."""

from __future__ import annotations

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.schema import PartConfig, Recipe

BASE = "dataset: digits\nepochs: 1\noptimizer: {type: SGD, lr: 0.1}\n"


def edges(recipe: Recipe, term: str, stage: int = 0) -> list[tuple[str, str]]:
    return [(str(edge.student), str(edge.teacher)) for edge in recipe.stages[stage].terms[term].edges]


def test_plain_recipe_is_completed_with_defaults(load):
    recipe = load()
    (stage,) = recipe.stages
    assert (recipe.name, recipe.seed, stage.name, stage.export) == ("r", 1, "main", "student")
    assert {name: role.mode for name, role in stage.roles.items()} == {"teacher": "frozen", "student": "trainable"}
    assert {role.input for role in stage.roles.values()} == {"train.image"}
    assert {name: (s.split, s.batch_size) for name, s in stage.data.items()} == {
        "train": ("train", 64),
        "eval": ("test", 512),
    }
    assert edges(recipe, "ce") == [("student:logits", "None")]
    assert edges(recipe, "kd") == [("student:logits", "teacher:logits")]
    assert [metric.type for metric in stage.metrics] == ["top1", "top5", "nll", "ece", "agreement"]


def test_peers_teach_each_other(load):
    recipe = load(
        BASE
        + """\
models: {a: {model: digits_mlp}, b: {model: digits_mlp}, c: {model: digits_cnn}}
terms:
  ce: {type: cross_entropy, student: [a, b, c]}
  kl: {type: kd, temperature: 1, student: [a, b, c], teacher: others}
export: a
"""
    )
    assert [student for student, _ in edges(recipe, "ce")] == ["a:logits", "b:logits", "c:logits"]
    pairs = {(student[0], teacher[0]) for student, teacher in edges(recipe, "kl")}
    assert pairs == {(s, t) for s in "abc" for t in "abc" if s != t} and len(edges(recipe, "kl")) == 6


STAGED = (
    "dataset: digits\noptimizer: {type: SGD, lr: 0.1}\nteacher: digits_cnn\nstudent: digits_cnn\n"
    """\
stages:
  hint: {epochs: 30, terms: {hint: {type: hint, student: layer2, teacher: layer2, weight: 100}}}
  distil:
    epochs: 210
    optimizer: {lr: 0.2}
    student: {weights: {stage: hint}}
    terms: {ce: cross_entropy, kd: {type: kd, temperature: 4, weight: 0.9}}
"""
)


def test_stages_merge_over_the_top_level(load):
    recipe = load(STAGED)
    hint, distil = recipe.stages
    assert [(s.name, s.epochs, list(s.terms)) for s in recipe.stages] == [
        ("hint", 30, ["hint"]),
        ("distil", 210, ["ce", "kd"]),
    ]
    assert (hint.optimizer.params["lr"], distil.optimizer.params["lr"]) == (0.1, 0.2)
    assert hint.roles["student"].weights is None and distil.roles["student"].weights.stage == "hint"
    assert edges(recipe, "hint") == [("student:layer2", "teacher:layer2")]


def test_stage_replaces_epochs_by_steps_and_weights_as_a_whole(load):
    text = STAGED.replace("teacher: digits_cnn\n", "teacher: {model: digits_cnn, weights: {recipe: digits/teacher}}\n")
    text = text.replace("epochs: 210", "steps: 9\n    teacher: {weights: {path: t.pt}}")
    hint, distil = load("epochs: 3\n" + text.replace("epochs: 30, ", "")).stages
    assert (hint.epochs, hint.steps, distil.epochs, distil.steps) == (3, None, None, 9)
    assert hint.roles["teacher"].weights.recipe == "digits/teacher"
    assert (distil.roles["teacher"].weights.recipe, distil.roles["teacher"].weights.path) == (None, "t.pt")


def test_teacher_and_student_read_the_output_of_a_generator(load):
    recipe = load(
        """\
epochs: 1
optimizer: {type: Adam, lr: 1e-3}
models:
  generator: {model: digits_mlp, input: noise.z}
teacher: {model: digits_cnn, weights: {recipe: digits/teacher}, input: "generator:image"}
student: {model: digits_mlp, input: "generator:image"}
data:
  noise: {type: gaussian, shape: [64], batch_size: 256}
  eval: {dataset: digits, split: test}
terms:
  fool: {type: kd, weight: -1, teacher_grad: true}
  mimic: {type: kd, temperature: 1}
updates:
  - {models: [generator], terms: [fool]}
  - {models: [student], terms: [mimic], repeat: 5, optimizer: {type: SGD, lr: 0.5}}
"""
    )
    (stage,) = recipe.stages
    assert {name: role.input for name, role in stage.roles.items()} == {
        "generator": "noise.z",
        "teacher": "generator:image",
        "student": "generator:image",
    }
    assert stage.data["noise"].dataset == PartConfig(type="gaussian", params={"shape": [64]})
    assert stage.data["noise"].batch_size == 256
    assert [(u.models, u.terms, u.repeat) for u in stage.updates] == [
        (("generator",), ("fool",), 1),
        (("student",), ("mimic",), 5),
    ]
    assert stage.updates[1].optimizer.params == {"lr": 0.5} and stage.updates[0].optimizer is None
    assert stage.terms["fool"].teacher_grad and stage.terms["fool"].weight == -1


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("layer2", "layer2", [("student:layer2", "teacher:layer2")]),
        ("student:layer2@2", "teacher:layer3/in", [("student:layer2@2", "teacher:layer3/in")]),
        (
            "[layer1, layer2]",
            "[layer2, layer3]",
            [("student:layer1", "teacher:layer2"), ("student:layer2", "teacher:layer3")],
        ),
        ("[layer1, layer2]", "layer3", [("student:layer1", "teacher:layer3"), ("student:layer2", "teacher:layer3")]),
        ("layer1", "[layer2, layer3]", [("student:layer1", "teacher:layer2"), ("student:layer1", "teacher:layer3")]),
        ("blocks.-1.attn", "student:layer2", [("student:blocks.-1.attn", "student:layer2")]),
        ("{path: layer2, adapter: conv1x1}", "{role: teacher, path: layer1}", [("student:layer2", "teacher:layer1")]),
        ("student", "teacher", [("student:logits", "teacher:logits")]),
        ("logits", "'teacher:'", [("student:logits", "teacher:logits")]),
    ],
)
def test_addresses_are_parsed(load, student: str, teacher: str, expected: list[tuple[str, str]]):
    recipe = load(KD_RECIPE.replace("type: kd, ", f"type: kd, student: {student}, teacher: {teacher}, "))
    assert edges(recipe, "kd") == expected


def test_operand_with_an_adapter(load):
    text = (
        KD_RECIPE
        + "  hint: {type: hint, student: {path: layer2, adapter: {type: linear, bias: false}}, teacher: layer2}\n"
    )
    (edge,) = load(text).stages[0].terms["hint"].edges
    assert edge.student.adapter == PartConfig(type="linear", params={"bias": False}) and edge.teacher.adapter is None


def test_word_that_names_a_role_is_that_role(load):
    text = BASE + "models: {layer2: digits_cnn, student: digits_mlp}\nterms: {kd: {type: kd, teacher: layer2}}\n"
    assert edges(load(text), "kd") == [("student:logits", "layer2:logits")]


def test_derived_and_frozen_roles(load):
    text = BASE + (
        "student: {model: digits_mlp, freeze: layer1}\n"
        "models:\n  mean: {ema: student, decay: 0.99}\n  old: {snapshot: student, every: 2}\n"
        "  fixed: {model: digits_cnn, frozen: true, require: {top1: 90}}\n"
        "terms: {kd: {type: kd, teacher: mean}}\n"
    )
    roles = load(text).stages[0].roles
    assert (roles["mean"].mode, roles["mean"].source_role, roles["mean"].decay) == ("ema", "student", 0.99)
    assert (roles["old"].mode, roles["old"].source_role, roles["old"].every_epochs) == ("snapshot", "student", 2)
    assert (roles["fixed"].mode, roles["fixed"].require) == ("frozen", {"top1": 90})
    assert roles["student"].freeze == ("layer1",)


def test_teacher_can_be_trainable(load):
    roles = (
        load(KD_RECIPE.replace("teacher: digits_cnn", "teacher: {model: digits_cnn, trainable: true}")).stages[0].roles
    )
    assert roles["teacher"].mode == "trainable"


def test_weights_come_from_recipes_stages_and_files(load):
    text = KD_RECIPE.replace(
        "teacher: digits_cnn", "teacher: {model: digits_cnn, weights: {recipe: digits/teacher, epoch: 5}}"
    )
    weights = load(text).stages[0].roles["teacher"].weights
    assert (weights.recipe, weights.epoch) == ("digits/teacher", 5)
    file = "{path: w.pth, key: state_dict, strip: module., rename: {head.: fc.}, strict: false}"
    weights = load(KD_RECIPE.replace("teacher: digits_cnn", f"teacher: {{model: digits_cnn, weights: {file}}}")).stages[
        0
    ]
    weights = weights.roles["teacher"].weights
    assert (weights.path, weights.key, weights.strip, weights.rename, weights.strict) == (
        "w.pth",
        "state_dict",
        "module.",
        {"head.": "fc."},
        False,
    )


def test_recipe_of_weights_is_relative_to_the_folder_of_the_recipe(load, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "teacher.yaml").write_text(BASE + "student: digits_cnn\nterms: {ce: cross_entropy}\n")
    text = KD_RECIPE.replace("teacher: digits_cnn", "teacher: {model: digits_cnn, weights: {recipe: teacher.yaml}}")
    weights = load(text, name="mine/kd.yaml").stages[0].roles["teacher"].weights
    assert weights.recipe == str((tmp_path / "mine" / "teacher.yaml").resolve())


def test_augmentations_belong_to_their_view(load):
    views = load(KD_RECIPE + "augment: [{type: crop, padding: 1}, flip]\n").stages[0].data
    assert [a.type for a in views["train"].views["image"]] == ["crop", "flip"]
    assert views["eval"].views == {"image": ()}
    text = KD_RECIPE.replace("student: digits_mlp", "student: {model: digits_mlp, input: strong}")
    stage = load(text + "augment: {image: [flip], strong: [{type: cutout, size: 2}]}\n").stages[0]
    assert set(stage.data["train"].views) == {"image", "strong"} and stage.roles["student"].input == "train.strong"


def test_sources_inherit_options_of_the_top_level(load):
    text = (
        KD_RECIPE
        + "batch_size: 32\nlabel_fraction: 50\ndata:\n  extra: {split: train, subset: 0.5}\n  train: {batch_size: 16}\n"
    )
    data = load(text).stages[0].data
    assert {name: source.dataset.type for name, source in data.items()} == dict.fromkeys(
        ("train", "eval", "extra"), "digits"
    )
    assert (data["train"].batch_size, data["extra"].batch_size, data["eval"].batch_size) == (16, 32, 512)
    assert (data["train"].label_fraction, data["extra"].label_fraction, data["extra"].subset) == (50, None, 0.5)


def test_weight_and_parameter_of_a_term_may_be_schedules(load):
    text = KD_RECIPE.replace("temperature: 4", "temperature: {type: linear, start: 1, end: 4, over: 2}")
    text = text.replace("weight: 0.9", "weight: {type: warmup, over: 2, by: step}")
    term = load(text).stages[0].terms["kd"]
    assert term.params["temperature"] == PartConfig(type="linear", params={"start": 1, "end": 4, "over": 2})
    assert term.weight == PartConfig(type="warmup", params={"over": 2, "by": "step"})


def test_scheduler_has_a_warmup(load):
    assert load(KD_RECIPE + "scheduler: cosine\n").stages[0].scheduler == PartConfig(type="cosine")
    scheduler = load(KD_RECIPE + "scheduler: {type: step, milestones: [1, 2], warmup: 1}\n").stages[0].scheduler
    assert scheduler == PartConfig(type="step", params={"milestones": [1, 2], "warmup": 1})
    chain = "{type: chain, parts: [{type: warmup, over: 1, length: 1}, cosine]}"
    scheduler = load(KD_RECIPE + f"scheduler: {chain}\n").stages[0].scheduler
    assert scheduler.params["parts"] == [{"type": "warmup", "over": 1, "length": 1}, {"type": "cosine"}]


def test_optimizer_has_groups(load):
    text = KD_RECIPE.replace("momentum: 0.9", "groups: [{type: norm, weight_decay: 0}, {path: layer1, lr: 0.01}]")
    optimizer = load(text).stages[0].optimizer
    assert optimizer.groups == ({"type": "norm", "weight_decay": 0}, {"path": "layer1", "lr": 0.01})


def test_published_figures_by_pair_or_model(load):
    assert load(KD_RECIPE + "published: 70.5\n").published.top1 == 70.5
    text = (
        KD_RECIPE + "published: {source: CRD, epoch: last, tolerance: 0.3, models: {digits_mlp: 71, digits_cnn: 72}}\n"
    )
    published = load(text).published
    assert (published.top1, published.source, published.epoch, published.tolerance) == (71, "CRD", "last", 0.3)
    assert load(text, "student=digits_cnn").published.top1 == 72
    assert load(KD_RECIPE + "published: {pairs: {a_b: 71}}\n").published is None
