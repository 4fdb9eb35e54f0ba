"""`kdbench inspect`: the content of its table, and its errors."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import kdbench
from kdbench.cli.inspect import inspect_model
from kdbench.errors import ConfigError


def table(*args, **kwargs) -> dict[str, list[str]]:
    """Returns the words of each row by path, and the title under "title"."""
    file = io.StringIO()
    assert inspect_model(*args, file=file, **kwargs) == 0
    title, header, *rows = file.getvalue().splitlines()
    assert header.split() == ["path", "type", "output", "parameters", "notes"]
    return {"title": [title], **{row.split("  ")[0].strip(): row.split() for row in rows}}


def test_table_contains_paths_shapes_and_parameters():
    rows = table("resnet20")
    assert rows["title"] == ["resnet20: 278,324 parameters, CifarResNet, image 3 x 32 x 32"]
    assert rows["layer3.0.conv1"] == ["layer3.0.conv1", "Conv2d", "64", "x", "8", "x", "8", "18,432"]
    assert rows["logits"] == ["logits", "CifarResNet", "100", "278,324"]


def test_head_with_a_vector_input_is_traced_with_a_vector():
    rows = table("gate_mlp")
    assert rows["title"] == ["gate_mlp: 262 parameters, GateMLP, vector 10"] and rows["logits"][2] == "2"


@pytest.mark.parametrize("name", ["image_bank", "masked_vit", "hidden_patches"])
def test_part_that_takes_no_image_is_rejected_with_a_hint(name):
    with pytest.raises(ConfigError, match=f"'{name}' does not accept an image.*kdbench check RECIPE"):
        table(name)


def test_output_that_a_later_layer_overwrites_has_a_note():
    rows = table("torchvision/resnet18", depth=2)
    assert "overwritten" in rows["bn1"] and "overwritten" not in rows["relu"]
    assert "layer1.0" in rows and "layer1.0.conv1" not in rows


def test_repeated_calls_have_numbers():
    rows = table("torchvision/resnet18")
    assert "layer1.0.relu@2" in rows
    assert rows["layer1.0.relu"][-3:] == ["called", "2", "times"]


def test_parameters_and_options_change_the_shapes():
    rows = table("digits_mlp", {"hidden": 5}, num_classes=3)
    assert rows["layer1"][2] == "5" and rows["logits"][2] == "3"
    assert table("resnet20", image=(1, 16, 16))["layer3"][2:7] == ["64", "x", "4", "x", "4"]


def test_model_that_reads_values_is_built_on_the_cpu(monkeypatch):
    from torch import nn

    import kdbench.models.small.mlp as digits

    class Reader(digits.DigitsMLP):
        def __init__(self, **params):
            super().__init__(**params)
            self.scale = float(nn.Parameter(self.fc.weight).sum())

    monkeypatch.setattr(digits, "DigitsMLP", Reader)
    assert table("digits_mlp")["layer1"][2] == "48"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("rsnet20",), "no model 'rsnet20'. Did you mean 'resnet20'"),
        (("digits_mlp", {"hiden": 3}), "no parameter 'hiden'"),
        (("vgg8", {}, (3, 4, 4)), "does not accept an image of 3 x 4 x 4"),
        (("vgg8", {}, (3, 4)), "channels, height and width"),
    ],
)
def test_mistake_is_reported(args, message):
    name, params, image = (*args, *(None, None))[:3]
    with pytest.raises(ConfigError, match=message):
        inspect_model(name, params, image=image, file=io.StringIO())


def test_wrong_name_is_reported_without_torch():
    code = (
        "import sys\n"
        "from kdbench.cli.inspect import inspect_model\n"
        "from kdbench.errors import ConfigError\n"
        "try: inspect_model('resnet21')\n"
        "except ConfigError: sys.exit('torch' in sys.modules)\n"
        "sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(kdbench.__file__).parents[1]).returncode == 0


def test_terminal_table_contains_every_full_path():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    inspect_model("digits_cnn", file=file)
    assert all(path in file.getvalue() for path in ("layer1.0", "layer3.2", "pool"))
