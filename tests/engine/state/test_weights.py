"""Weights from checkpoints of kdbench, of other programs, and of teacher recipes."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch

from helpers.plugin_parts import Layers
from helpers.recipes import (  # noqa: F401
    SYNTHETIC_DATA,
    QuietConsole,
    build_stage,
    comparable_results,
    differing_keys,
    equal_weights,
    plugin_registration,
    recipe_from_text,
    train_recipe_text,
)
from kdbench.config.schema import WeightsConfig
from kdbench.engine.state.weights import load_state, read_checkpoint, select_state, state_hash
from kdbench.errors import CheckpointError, Location, UserError
from kdbench.experiment import context
from kdbench.experiment.run import run as run_experiment
from kdbench.files import read_json

LOCATION = Location("teacher.weights", "own.yaml", 3)


def layers(seed: int = 0, **options) -> Layers:
    torch.manual_seed(seed)
    return Layers(**options)


def selected_state(content, **options) -> dict[str, torch.Tensor]:
    torch.save(content, "weights.pt")
    config = WeightsConfig(path="weights.pt", location=LOCATION, **options)
    return select_state(read_checkpoint("weights.pt", LOCATION), config, Path("weights.pt"))


def test_a_bare_state_dict_is_selected_unchanged():
    state = layers().state_dict()
    assert equal_weights(selected_state(state), state)


def test_key_strip_and_rename_select_from_checkpoints_of_other_programs():
    state = layers().state_dict()
    foreign = {f"module.{name.replace('fc.', 'head.')}": value for name, value in state.items()}
    content = {"epoch": 3, "net": {"ema": foreign}}
    selected = selected_state(content, key="net.ema", strip="module.", rename={"head.": "fc."})
    assert equal_weights(selected, state)


def test_a_wrong_key_reports_the_entries():
    with pytest.raises(CheckpointError, match=r"own.yaml:3 .*weights\.pt has no entry 'modle'.*Did you mean 'model'"):
        selected_state({"model": {}, "epoch": 1}, key="modle")
    with pytest.raises(CheckpointError, match=r"has no state dict.*epoch, model.*`key`"):
        selected_state({"epoch": 1, "model": layers().state_dict()})


def test_mismatches_are_listed():
    state = layers().state_dict()
    state.pop("fc.bias")
    state["head.bias"] = torch.zeros(3)
    state["layer2.0.weight"] = torch.zeros(5, 5)
    with pytest.raises(CheckpointError) as raised:
        load_state(layers(1), state, "own.yaml:3: weights.pt")
    message = str(raised.value)
    assert message.startswith("own.yaml:3: weights.pt")
    for part in (
        "missing (1): fc.bias",
        "unexpected (1): head.bias",
        "layer2.0.weight has shape [5, 5] in the file and [12, 12] in the model",
    ):
        assert part in message


def test_a_rejected_state_changes_nothing():
    model = layers(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = layers(2).state_dict()
    state.pop("fc.bias")
    with pytest.raises(CheckpointError):
        load_state(model, state, "here")
    assert equal_weights(before, model.state_dict())


def test_a_missing_strip_prefix_is_suggested():
    state = {f"module.{name}": value for name, value in layers().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"Try `strip: module\.`"):
        load_state(layers(1), state, "here")


def test_non_strict_loading_reports_mismatches():
    state, model = layers(2).state_dict(), layers(1)
    bias = model.fc.bias.clone()
    state.pop("fc.bias")
    mismatches = load_state(model, state, "here", strict=False)
    assert mismatches == ["missing (1): fc.bias"]
    assert torch.equal(model.fc.bias, bias) and torch.equal(model.fc.weight, state["fc.weight"])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_a_checkpoint_cannot_run_code():
    torch.save({"model": Evil()}, "zipped.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Evil()))
    for file in ("zipped.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=rf"own.yaml:3 .*{file} .*Python objects"):
            read_checkpoint(file, LOCATION)
    assert not Path("touched").exists()


def test_a_missing_file_and_a_folder_are_reported_by_name():
    with pytest.raises(CheckpointError, match=r"own.yaml:3 .*there is no checkpoint nowhere\.pt"):
        read_checkpoint("nowhere.pt", LOCATION)
    Path("folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"own.yaml:3 .*folder\.pt is a folder, not a checkpoint file"):
        read_checkpoint("folder.pt", LOCATION)


def test_every_damage_is_reported_by_name():
    """Covers truncations, random bytes, and files of other kinds."""
    torch.save({"format": 1, "models": {"student": layers().state_dict()}, "text": "x" * 50}, "good.pt")
    good = Path("good.pt").read_bytes()
    draws = random.Random(0)
    damaged = [b"", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x1f\x8b" + good[:99], good[::-1], good * 2]
    damaged += [good[: draws.randrange(len(good))] for _ in range(25)]
    for _ in range(40):
        content = bytearray(good)
        for _ in range(draws.choice([1, 5, 200])):
            content[draws.randrange(len(content))] = draws.randrange(256)
        damaged.append(bytes(content))
    num_rejected = 0
    for content in damaged:
        Path("bad.pt").write_bytes(content)
        try:
            read_checkpoint("bad.pt", LOCATION)
        except CheckpointError as error:
            num_rejected += 1
            assert "own.yaml:3" in str(error) and "bad.pt" in str(error)
    assert num_rejected >= 60


def test_one_flipped_bit_of_a_weight_is_reported():
    torch.save({"weight": torch.zeros(64)}, "good.pt")
    content = bytearray(Path("good.pt").read_bytes())
    position = content.find(bytes(256))
    content[position + 100] ^= 1
    Path("good.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint("good.pt", LOCATION)


def test_the_hash_depends_on_every_bit():
    model = layers()
    first = state_hash(model)
    assert first == state_hash(layers()) and first != state_hash(layers(1))
    with torch.no_grad():
        model.fc.bias[0] = torch.nextafter(model.fc.bias[0], torch.tensor(9.0))
    assert state_hash(model) != first


TEACHER = """
student: {model: {type: t_layers, hidden: 16}}
terms: {ce: cross_entropy}
optimizer: {type: SGD, lr: 0.1}
epochs: 3
batch_size: 16
tensorboard: false
"""
PUPIL = """
student: t_layers
teacher: {model: {type: t_layers, hidden: 16}, weights: WEIGHTS}
terms: {ce: cross_entropy, kd: kd}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
batch_size: 16
tensorboard: false
out: OUT
"""


def pupil(weights: str = "{recipe: teacher.yaml}", out: str = "run") -> str:
    Path("teacher.yaml").write_text(SYNTHETIC_DATA + TEACHER)
    return PUPIL.replace("WEIGHTS", weights).replace("OUT", out)


@pytest.fixture
def networks(monkeypatch) -> list:
    """Collects the networks that runs build, in order."""
    networks = []
    original = context.build_network

    def build(*args, **kwargs):
        networks.append(original(*args, **kwargs))
        return networks[-1]

    monkeypatch.setattr(context, "build_network", build)
    return networks


def teacher_folder() -> Path:
    (folder,) = Path("runs/teacher").iterdir()
    return folder


def test_a_teacher_recipe_is_trained_once_and_loaded_completely(networks):
    train_recipe_text(pupil(), "epochs=1")
    assert len(networks) == 2
    saved = torch.load(teacher_folder() / "checkpoints/last.pt", weights_only=True)
    assert saved["step"] == 3 * 4, "`epochs=1` of the referring command line does not shorten the teacher"
    assert equal_weights(saved["models"]["student"], networks[1].role("teacher").model.state_dict())
    assert "teacher.yaml" in read_json("run/manifest.json")["roles"]["teacher"]["weights"]["source"]
    stamp = (teacher_folder() / "checkpoints/last.pt").stat().st_mtime_ns
    train_recipe_text(pupil(out="second"), "seed=2", "epochs=2")
    assert len(networks) == 3, "the second run loads the trained teacher"
    assert (teacher_folder() / "checkpoints/last.pt").stat().st_mtime_ns == stamp


def test_a_teacher_run_equals_a_run_of_its_recipe():
    train_recipe_text(pupil(), "seed=5")
    recipe = recipe_from_text(TEACHER, "out=own", name="teacher")
    run_experiment(recipe, console=QuietConsole())
    assert differing_keys(comparable_results("own"), comparable_results(teacher_folder())) == []


def test_the_model_of_a_teacher_recipe_can_be_replaced(networks):
    text = pupil("{recipe: teacher.yaml, model: {type: t_layers, hidden: 20}}")
    train_recipe_text(text.replace("hidden: 16}, w", "hidden: 20}, w"))
    assert networks[1].role("teacher").model.layer1[0].out_features == 20


def test_an_epoch_of_a_teacher_recipe_is_loaded_from_its_checkpoint(networks):
    train_recipe_text(pupil("{recipe: teacher.yaml, epoch: 2}"))
    epoch_file = torch.load(teacher_folder() / "checkpoints/epoch_0002.pt", weights_only=True)
    last = torch.load(teacher_folder() / "checkpoints/last.pt", weights_only=True)
    state = networks[1].role("teacher").model.state_dict()
    assert equal_weights(epoch_file["models"]["student"], state) and not equal_weights(last["models"]["student"], state)


def test_an_epoch_without_checkpoint_is_reported_with_the_command():
    train_recipe_text(pupil())
    with pytest.raises(UserError, match=r"own.yaml:4 .*epoch_0002\.pt.*keep_epochs=\[2\].*fresh=true"):
        train_recipe_text(pupil("{recipe: teacher.yaml, epoch: 2}", out="other"))


def test_weights_from_a_file_are_part_of_the_identity_and_of_the_manifest(networks):
    torch.save({"state": {f"module.{n}": v for n, v in layers(3, hidden=16).state_dict().items()}}, "foreign.pt")
    text = pupil("{path: foreign.pt, key: state, strip: module.}")
    first = train_recipe_text(text)
    assert equal_weights(networks[0].role("teacher").model.state_dict(), layers(3, hidden=16).state_dict())
    entry = read_json("run/manifest.json")["roles"]["teacher"]["weights"]
    assert entry["source"] == "foreign.pt" and entry["sha256"] == state_hash(layers(3, hidden=16))
    torch.save({"state": {f"module.{n}": v for n, v in layers(4, hidden=16).state_dict().items()}}, "foreign.pt")
    with pytest.raises(UserError, match="belongs to another run"):
        train_recipe_text(text)
    assert first.summary["identity"] != train_recipe_text(text, "out=other").summary["identity"]


def test_missing_weights_are_a_notice_with_strict_false():
    state = layers(3, hidden=16).state_dict()
    state.pop("fc.bias")
    torch.save(state, "foreign.pt")
    with pytest.raises(CheckpointError, match=r"own.yaml:4 teacher\.weights: foreign\.pt: .*missing \(1\): fc\.bias"):
        train_recipe_text(pupil("{path: foreign.pt}"))
    console = QuietConsole()
    train_recipe_text(pupil("{path: foreign.pt, strict: false}", out="loose"), console=console)
    assert any("teacher" in text and "missing (1): fc.bias" in text for text in console.notices)
    assert read_json("loose/manifest.json")["roles"]["teacher"]["weights"]["mismatches"] == ["missing (1): fc.bias"]


def test_a_checkpoint_of_kdbench_is_read_by_its_path(networks):
    train_recipe_text(pupil())
    file = teacher_folder() / "checkpoints/last.pt"
    train_recipe_text(pupil(f"{{path: {file}}}", out="by_path"))
    assert equal_weights(
        networks[-1].role("teacher").model.state_dict(), networks[1].role("teacher").model.state_dict()
    )


def test_a_teacher_checkpoint_of_another_run_is_rejected():
    """The result would silently be that of another teacher."""
    train_recipe_text(pupil())
    other_recipe = recipe_from_text(TEACHER, "out=other_teacher", "seed=2", name="teacher")
    run_experiment(other_recipe, console=QuietConsole())
    last = teacher_folder() / "checkpoints/last.pt"
    last.write_bytes(Path("other_teacher/checkpoints/last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"own.yaml:4 .*last\.pt belongs to another run"):
        train_recipe_text(pupil(out="second"), "seed=2")


@pytest.mark.parametrize("entry", ["format", "identity", "export", "models", "effective", "average"])
def test_a_teacher_checkpoint_without_an_entry_is_reported_by_name(entry):
    train_recipe_text(pupil())
    last = teacher_folder() / "checkpoints/last.pt"
    tree = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in tree.items() if key != entry}, last)
    with pytest.raises(CheckpointError, match=rf"own.yaml:4 .*last\.pt .*'{entry}'"):
        train_recipe_text(pupil(out="second"), "seed=2")
