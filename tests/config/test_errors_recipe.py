"""Errors of the loader: location, expected value, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from kdbench.cli.main import main
from kdbench.config.load import load_recipe
from kdbench.errors import ConfigError

GOOD = """\
dataset: digits
teacher: {model: digits_cnn}
student: {model: digits_mlp}
epochs: 3
batch_size: 64
optimizer: {type: SGD, lr: 0.1}
scheduler: {type: step, milestones: [1, 2]}
augment: [{type: crop, padding: 1}]
terms:
  ce: {type: cross_entropy, weight: 0.1}
  kd: {type: kd, temperature: 4, weight: 0.9}
"""
STAGED = """\
dataset: digits
optimizer: {type: SGD, lr: 0.1}
teacher: {model: digits_cnn}
student: {model: digits_cnn}
stages:
  hint: {epochs: 1, terms: {hint: {type: hint, student: layer2, teacher: layer2}}}
  kd:
    epochs: 2
    student: {weights: {stage: hint}}
    terms: {kd: {type: kd}}
"""


def error_of(text: str, *overrides: str) -> str:
    Path("r.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_recipe("r.yaml", overrides)
    return str(raised.value)


def test_unchanged_recipes_load():
    for text in (GOOD, STAGED):
        Path("r.yaml").write_text(text)
        assert load_recipe("r.yaml").stages


@pytest.mark.parametrize(
    ("text", "replacement", "location", "hint"),
    [
        # a misspelt key, anywhere
        ("optimizer:", "optimiser:", "r.yaml:6 optimiser: unknown key", "Did you mean 'optimizer'?"),
        ("{model: digits_mlp}", "{modle: digits_mlp}", "r.yaml:3 student.modle: unknown key", "Did you mean 'model'?"),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, frozn: true}",
            "r.yaml:2 teacher.frozn: unknown key",
            "Did you mean 'frozen'?",
        ),
        ("weight: 0.9", "wieght: 0.9", "r.yaml:11 terms.kd.wieght: ", "Did you mean 'weight'?"),
        ("lr: 0.1", "l_r: 0.1", "r.yaml:6 optimizer.l_r: ", "Did you mean 'lr'?"),
        ("milestones:", "milestone:", "r.yaml:7 scheduler.milestone: ", "Did you mean 'milestones'?"),
        ("padding: 1", "pading: 1", "r.yaml:8 augment.0.pading: ", "Did you mean 'padding'?"),
        # a parameter that does not exist
        ("temperature: 4", "temprature: 4", "r.yaml:11 terms.kd.temprature: ", "Did you mean 'temperature'?"),
        # unknown names
        ("dataset: digits", "dataset: digit", "r.yaml:1 dataset: no dataset 'digit'", "Did you mean 'digits'?"),
        ("digits_mlp", "digits_mpl", "r.yaml:3 student.model: no model 'digits_mpl'", "Did you mean 'digits_mlp'?"),
        ("type: kd,", "type: kdd,", "r.yaml:11 terms.kd.type: no term 'kdd'", "Did you mean 'kd'?"),
        ("type: SGD", "type: SDG", "r.yaml:6 optimizer.type: no optimizer 'SDG'", "Did you mean 'SGD'?"),
        ("type: step", "type: stp", "r.yaml:7 scheduler.type: no schedule 'stp'", "Did you mean 'step'?"),
        ("type: crop", "type: crp", "r.yaml:8 augment.0.type: no augmentation 'crp'", "Did you mean 'crop'?"),
        # wrong types and ranges
        ("epochs: 3", "epochs: three", "r.yaml:4 epochs: ", "must be a whole number, got 'three'"),
        ("epochs: 3", "epochs: 2.5", "r.yaml:4 epochs: ", "must be a whole number, got 2.5"),
        ("epochs: 3", "epochs: true", "r.yaml:4 epochs: ", "must be a whole number, got True"),
        ("epochs: 3", "epochs: -1", "r.yaml:4 epochs: ", "must be 0 or more, got -1"),
        ("batch_size: 64", "batch_size: 0", "r.yaml:5 batch_size: ", "must be 1 or more, got 0"),
        ("temperature: 4", "temperature: hot", "r.yaml:11 terms.kd.temperature: ", "a number or a schedule, got 'hot'"),
        ("weight: 0.9", "weight: [1]", "r.yaml:11 terms.kd.weight: ", "a finite number or a schedule"),
        ("weight: 0.9", "weight: .nan", "r.yaml:11 terms.kd.weight: ", "a finite number or a schedule"),
        ("padding: 1", "padding: 1.5", "r.yaml:8 augment.0.padding: ", "padding must be a whole number, got 1.5"),
        ("[1, 2]", "[2, 1]", "r.yaml:7 scheduler.milestones: ", "must be in ascending order"),
        ("lr: 0.1", "lr: fast", "r.yaml:6 optimizer.lr: ", "lr must be a number, got 'fast'"),
        ("dataset: digits", "dataset: [digits]", "r.yaml:1 dataset: ", "a dataset must be a name or {type: NAME"),
        ("  ce: {type: cross_entropy, weight: 0.1}", "  ce: 3", "r.yaml:10 terms.ce: ", "must be a mapping, got 3"),
        # a schedule that is not allowed, or wrong itself
        (
            "weight: 0.9",
            "weight: {type: liner, over: 2}",
            "r.yaml:11 terms.kd.weight.type: no schedule 'liner'",
            "Did you mean 'linear'?",
        ),
        (
            "weight: 0.9",
            "weight: {type: linear, ovr: 2}",
            "r.yaml:11 terms.kd.weight.ovr: schedule 'linear' has no parameter",
            "Did you mean 'over'?",
        ),
        ("lr: 0.1", "lr: {type: cosine}", "r.yaml:6 optimizer.lr: ", "lr cannot be a schedule"),
        # the wiring
        (
            "teacher: {model: digits_cnn}\n",
            "",
            "r.yaml:10 terms.kd: term 'kd' reads a teacher, but the recipe has no role `teacher`",
            "Add `teacher:",
        ),
        ("type: kd,", "type: kd, teacher: 'techer:fc',", "r.yaml:11 terms.kd.teacher: no role 'techer'", "'teacher'?"),
        ("type: kd,", "type: kd, student: layer1,", "r.yaml:11 terms.kd: ", "name also the feature of the teacher"),
        ("type: kd,", "type: at,", "r.yaml:11 terms.kd: term 'at' compares features", "such as `student: layer3`"),
        (
            "type: kd,",
            "type: at, student: teacher, teacher: layer1,",
            "r.yaml:11 terms.kd: term 'at'",
            "is `teacher:logits`",
        ),
        (
            "type: kd,",
            "type: kd, student: 'a b',",
            "r.yaml:11 terms.kd.student: 'a b' is not an address",
            "write ROLE:PATH",
        ),
        (
            "type: kd,",
            "type: kd, student: [layer1, layer2], teacher: [layer1],",
            "r.yaml:11 terms.kd.teacher: the list `teacher` has length 1, but the list `student` has 2",
            "operands of equal position",
        ),
        ("type: kd,", "type: kd, teacher: others,", "r.yaml:11 terms.kd.teacher: `others`", "list of two or more"),
        (
            "type: cross_entropy,",
            "type: cross_entropy, teacher: teacher,",
            "r.yaml:10 terms.ce.teacher: term 'cross_entropy' reads no teacher",
            "Remove `teacher`",
        ),
        (
            "{model: digits_mlp}",
            "{model: digits_mlp, input: trin.image}",
            "r.yaml:3 student.input: no source 'trin'",
            "Did you mean 'train'?",
        ),
        (
            "{model: digits_mlp}",
            "{model: digits_mlp, input: 'teacher:fc'}\nmodels: {teacher: x}",
            "r.yaml:2 teacher: role 'teacher' is defined twice",
            "keep one of the two definitions",
        ),
        (
            "{model: digits_mlp}",
            "{model: digits_mlp, frozen: true}",
            "r.yaml: there is nothing to train",
            "no role is trainable",
        ),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, ema: studnt}",
            "r.yaml:2 teacher.ema: no role 'studnt'",
            "Did you mean 'student'?",
        ),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, weights: {recipe: digits/techer}}",
            "r.yaml:2 teacher.weights.recipe: no recipe 'digits/techer'",
            "Did you mean 'digits/teacher'?",
        ),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, weights: {recipe: r.yaml}}",
            "r.yaml:2 teacher.weights.recipe: the recipes form a cycle",
            "r.yaml",
        ),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, weights: {path: x, stage: y}}",
            "r.yaml:2 teacher.weights: weights need exactly one of",
            "got stage and path",
        ),
        (
            "{model: digits_cnn}",
            "{model: digits_cnn, weights: {recipe: digits/teacher, key: x}}",
            "r.yaml:2 teacher.weights.key: `key` applies to weights with `path`",
            "not with `recipe`",
        ),
    ],
)
def test_mistake_in_a_recipe_is_reported(text: str, replacement: str, location: str, hint: str):
    assert text in GOOD
    message = error_of(GOOD.replace(text, replacement, 1))
    # A misspelt key causes further errors (no optimizer, no model); one line must be about the key itself.
    lines = [line for line in message.splitlines() if line.startswith(location)]
    assert lines and hint in lines[0], message


@pytest.mark.parametrize(
    ("line", "location", "hint"),
    [
        ("label_fraction: 1.5", "r.yaml:12 label_fraction: ", "a fraction in (0, 1], or a whole number"),
        ("validation: 1", "r.yaml:12 validation: ", "a fraction in (0, 1)"),
        ("validation: -0.1", "r.yaml:12 validation: ", "a fraction in (0, 1)"),
        ("precision: bf61", "r.yaml:12 precision: ", "Did you mean 'bf16'?"),
        ("device: gpu", "r.yaml:12 device: ", "auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        ("ema: 1.0", "r.yaml:12 ema: ", "between 0 and 1"),
        ("clip: 0", "r.yaml:12 clip: ", "above 0"),
        ("steps: 3", "r.yaml:12 steps: ", "`epochs` and `steps` exclude each other"),
        ("export: studnt", "r.yaml:12 export: no role 'studnt'", "Did you mean 'student'?"),
        ("metrics: [topp1]", "r.yaml:12 metrics.0: no metric 'topp1'", "Did you mean 'top1'?"),
        ("checkpoint_every: {hours: 1}", "r.yaml:12 checkpoint_every.hours: unknown key", "minutes, steps"),
        ("checkpoint_every: {steps: 0}", "r.yaml:12 checkpoint_every.steps: ", "1 or more"),
        ("published: {top: 70}", "r.yaml:12 published.top: unknown key", "Did you mean 'top1'?"),
        ("published: {top1: 70, epoch: lst}", "r.yaml:12 published.epoch: ", "Did you mean 'last'?"),
        ("published: 170", "r.yaml:12 published.top1: ", "a percentage"),
        ("protocol: cifar", "r.yaml:12 protocol: no protocol 'cifar'", "cifar_240_epochs"),
        ("data: {eval: {spilt: test}}", "r.yaml:12 data.eval.spilt: unknown key", "Did you mean 'split'?"),
        ("data: {extra: {dataset: digts}}", "r.yaml:12 data.extra.dataset: no dataset 'digts'", "'digits'?"),
        ("data: {noise: {type: gaussian, shap: [1]}}", "r.yaml:12 data.noise.shap: ", "Did you mean 'shape'?"),
        ("models: {m: {ema: student, decy: 0.9}}", "r.yaml:12 models.m.decy: unknown key", "Did you mean 'decay'?"),
        (
            "models: {a: {ema: b}, b: {ema: a}}",
            "r.yaml:12 models.a.ema: roles are derived from each other",
            "a -> b -> a",
        ),
        (
            "models: {a: {model: digits_mlp, input: 'b:x'}, b: {model: digits_mlp, input: 'a:x'}}",
            "r.yaml:12 models.a.input: roles read each other's outputs in a cycle",
            "a -> b -> a",
        ),
        (
            "models: {a: {input: train.image}}",
            "r.yaml:12 models.a: role 'a' needs the key `model`",
            "kdbench list models",
        ),
        ("models: {m: {model: digits_mlp, input: imge}}", "r.yaml:12 models.m.input: source 'train' has no", "image"),
        (
            "updates: [{models: [studnt], terms: [kd]}]",
            "r.yaml:12 updates.0.models: no role",
            "Did you mean 'student'?",
        ),
        (
            "updates: [{models: [teacher], terms: [kd]}]",
            "r.yaml:12 updates.0.models: role 'teacher' is frozen",
            "an update can only change trainable roles",
        ),
        ("updates: [{models: [student], terms: [kdd]}]", "r.yaml:12 updates.0.terms: no term 'kdd'", "'kd'?"),
        ("updates: [{models: [student]}]", "r.yaml:12 updates.0: an update needs `terms`", "a list of names"),
        ("updates: [{model: student, terms: [kd]}]", "r.yaml:12 updates.0.model: unknown key", "'models'?"),
        ("stages: {}", "r.yaml:12 stages: ", "must be a non-empty mapping of stage names"),
        ("title: ???", "r.yaml:12 title: a value is required", "set it on the command line"),
        ("width: 3", "r.yaml:12 width: unknown key 'width'", "docs/recipe.md lists all keys"),
        # ambiguous YAML, and code
        ("seed: 010", "r.yaml:12 seed: ", "YAML reads it as 8"),
        ("seed: 1:30", "r.yaml:12 seed: ", "YAML reads it as 90"),
        ("compile: on", "r.yaml:12 compile: ", "write true"),
        ("epochs: 4", "r.yaml:12 epochs: duplicate key 'epochs'", "already set on line 4"),
        ("hydra: {run: {dir: /}}", "r.yaml:12 hydra: ", "is rejected"),
        ("title: ${oc.env:HOME}", "r.yaml:12 title: ", "is rejected"),
        ("vars: {a: {_target_: os.system}}", "r.yaml:12 vars.a._target_: ", "is rejected"),
        ("title: !!python/name:os.system", "r.yaml:12 title: ", "is rejected"),
        ("title: ${optimizer.l_r}", "r.yaml:12 title: ", "Did you mean 'optimizer.lr'?"),
        ("title: ${title}", "r.yaml:12 title: ", "refers to itself"),
    ],
)
def test_mistake_in_an_added_line_is_reported(line: str, location: str, hint: str):
    message = error_of(f"{GOOD}{line}\n")
    lines = [line for line in message.splitlines() if line.startswith(location)]
    assert lines and hint in lines[0], message


@pytest.mark.parametrize(
    ("text", "replacement", "location", "hint"),
    [
        ("{stage: hint}", "{stage: hnt}", "r.yaml:9 stages.kd.student.weights: stage 'hnt' does not exist", "'hint'?"),
        (
            "{stage: hint}",
            "{stage: kd}",
            "r.yaml:9 stages.kd.student.weights: stage 'kd' does not run before this stage",
            "hint",
        ),
        ("{stage: hint}", "{stage: hint, role: stdent}", "r.yaml:9 stages.kd.student.weights: stage", "'student'?"),
        ("epochs: 2", "epoch: 2", "r.yaml:8 stages.kd.epoch: unknown key", "Did you mean 'epochs'?"),
        ("epochs: 2", "seed: 2", "r.yaml:8 stages.kd.seed: ", "belongs to the top level"),
        ("{kd: {type: kd}}", "{kd: {type: kd, tau: 1}}", "r.yaml:10 stages.kd.terms.kd.tau: ", "temperature"),
    ],
)
def test_mistake_in_a_stage_is_reported(text: str, replacement: str, location: str, hint: str):
    assert text in STAGED
    message = error_of(STAGED.replace(text, replacement, 1))
    lines = [line for line in message.splitlines() if line.startswith(location)]
    assert lines and hint in lines[0], message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("terms.kd.temprature=2", "Did you mean 'temperature'?"),
        ("terms.kd.temperature=hot", "must be a number or a schedule, got 'hot'"),
        ("student.model=digits_mpl", "Did you mean 'digits_mlp'?"),
        ("optimizer.typ=AdamW", "Did you mean 'type'?"),
        ("batchsize=3", "Did you mean 'batch_size'?"),
        ("epochs=010", "must be a whole number, got '010'"),
        ("pair=resnet32x4_resnet8x", "Did you mean 'resnet32x4_resnet8x4'?"),
        ("~terms.dk", "Did you mean 'kd'?"),
        ("+seed=x", "must be a whole number, got 'x'"),
    ],
)
def test_mistake_in_an_override_names_the_override(override: str, hint: str):
    lines = [
        line for line in error_of(GOOD, override).splitlines() if line.startswith(f"override '{override.lstrip('+')}'")
    ]
    assert lines and hint in lines[0]


def test_mapping_over_a_list_reports_how_to_write_it():
    list_recipe = GOOD.replace("type: kd,", "type: kd, teacher: [teacher],")
    over = "terms.kd.teacher={combine: mean_logits, of: [teacher, student]}"
    assert error_of(list_recipe, over).endswith("put `terms.kd.teacher=null` before this override.")
    load_recipe("r.yaml", ["terms.kd.teacher=null", over])


def test_cyclic_recipes_are_rejected():
    template = GOOD.replace("{model: digits_cnn}", "{model: digits_cnn, weights: {recipe: OTHER}}")
    Path("other.yaml").write_text(template.replace("OTHER", "r.yaml"))
    assert "the recipes form a cycle: 'other.yaml' takes weights from this recipe" in error_of(
        template.replace("OTHER", "other.yaml")
    )


def test_override_of_epochs_without_effect_is_reported():
    assert "every stage sets its own length; write stages.hint.epochs=" in error_of(STAGED, "epochs=1")


def test_all_mistakes_are_reported_together():
    text = GOOD.replace("digits\n", "digit\n").replace("temperature", "temprature").replace("type: SGD", "type: SDG")
    lines = error_of(text).splitlines()
    assert lines[0] == "r.yaml has 3 mistakes:"
    assert [line.split(" ")[0] for line in lines[1:]] == ["r.yaml:1", "r.yaml:6", "r.yaml:11"]


def test_mistake_in_a_definition_is_not_repeated_where_it_is_used():
    """References to a term or a source whose definition has a mistake are not mistakes of their own."""
    updates = "updates: [{models: [student], terms: [ce, kd]}]\n"
    assert error_of(GOOD.replace("type: kd,", "type: kdd,") + updates).count("\n") == 0
    assert error_of(GOOD.replace("dataset: digits", "dataset: [digits]")).count("\n") == 0
    # Control: a name without any definition is reported.
    assert "no term 'kdd'" in error_of(GOOD + updates.replace("kd]", "kdd]"))


def test_mistake_above_the_stages_is_reported_once():
    assert error_of(STAGED.replace("lr:", "l_r:")).count("l_r") == 2  # the key, and the name of the parameter


def test_missing_file_and_folder_are_reported():
    with pytest.raises(ConfigError, match=r"no recipe 'nowhere\.yaml'"):
        load_recipe("nowhere.yaml")
    Path("d.yaml").mkdir()
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe("d.yaml")


def test_frozen_exported_role_is_rejected(tmp_path):
    file = tmp_path / "own.yaml"
    text = (
        "dataset: digits\nteacher: digits_cnn\nstudent: digits_mlp\nexport: teacher\n"
        "terms: {ce: {type: cross_entropy}}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    )
    file.write_text(text)
    with pytest.raises(
        ConfigError, match=r"own.yaml:4 export: role 'teacher' is frozen in every stage; export a trained role: student"
    ):
        load_recipe(str(file))
    file.write_text(text.replace("export: teacher", "export: student"))
    assert load_recipe(str(file)).stages[0].export == "student"


def test_control_characters_in_file_names_are_escaped(capsys):
    for split in ("train", "test"):
        Path(f"photos/{split}/\x1b[31mdog" if split == "train" else f"photos/{split}/cat").mkdir(parents=True)
    Path("r.yaml").write_text(
        "dataset: {type: image_folder, root: photos, size: 8}\nstudent: resnet20\nterms: {ce: cross_entropy}\n"
        "optimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    )
    for path in list(Path("photos").glob("*/*")):
        Image.new("RGB", (8, 8)).save(path / "a.png")
    assert main(["train", "r.yaml"]) == 2
    output = capsys.readouterr().err
    assert "\x1b" not in output and "\\x1b[31mdog" in output
