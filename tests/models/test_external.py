"""Models of torchvision and timm: names without an import, classifiers, pretrained weights, errors."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

import kdbench
from kdbench.errors import CheckpointError, ConfigError
from kdbench.models.catalog import _builder_files
from kdbench.registry import MODELS

ROOT = Path(kdbench.__file__).parents[1]
has_timm = importlib.util.find_spec("timm") is not None


def test_torchvision_names_are_all_its_classifiers():
    from torchvision import models

    names = {name.removeprefix("torchvision/") for name in MODELS.names() if name.startswith("torchvision/")}
    assert names == set(models.list_models(module=models))


def test_names_and_parameters_are_available_without_importing_torch():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from kdbench.registry import MODELS\n"
        "assert 'torchvision/resnet18' in MODELS.names()\n"
        "entry = MODELS.check('torchvision/resnet18', {'num_classes': 10})\n"
        "assert entry.summary.startswith('ResNet-18'), entry.summary\n"
        "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)\n"
        "print(time.perf_counter() - start)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1.0


def test_scanning_the_library_takes_less_than_100_ms():
    _builder_files.cache_clear()
    start = time.process_time()
    assert _builder_files("torchvision")
    assert time.process_time() - start < 0.1


def test_torchvision_model_has_the_classes_of_the_dataset():
    with torch.device("meta"):
        model = MODELS.build("torchvision/resnet18", {}, num_classes=7, in_channels=3)
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 513 * 1000 + 513 * 7  # torchvision's own table


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_output_is_a_tensor_in_train_mode(name):
    with torch.device("meta"):
        model = MODELS.build(f"torchvision/{name}", {}, num_classes=7)
    assert model.train()(torch.zeros(2, 3, 299, 299, device="meta")).shape == (2, 7)


def test_unknown_names_report_the_nearest():
    with pytest.raises(ConfigError, match="'torchvision/resnet18'"):
        MODELS.check("torchvision/resnet81", {})
    with pytest.raises(ConfigError, match=r"no parameter 'num_clases'.*'num_classes'"):
        MODELS.check("torchvision/resnet18", {"num_clases": 3})
    with pytest.raises(ConfigError, match="DEFAULT"):
        MODELS.build("torchvision/resnet18", {"weights": "DEFALT"})


def test_a_failed_download_of_weights_is_reported(monkeypatch):
    from torchvision.models import WeightsEnum

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(CheckpointError, match=r"DEFAULT cannot be downloaded from https://.*no network"):
        MODELS.build("torchvision/squeezenet1_1", {"weights": "DEFAULT"})


@pytest.mark.parametrize(("name", "head"), [("squeezenet1_1", "classifier.1."), ("googlenet", "fc.")])
def test_weights_with_another_number_of_classes_keep_the_initial_classifier(name, head, monkeypatch):
    from torchvision import models

    released = models.get_model(
        name, num_classes=1000, weights=None, **({"init_weights": False} if name == "googlenet" else {})
    )
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda self, **_: released.state_dict())
    for classes in (1000, 7):
        model = MODELS.build(f"torchvision/{name}", {"weights": "DEFAULT"}, num_classes=classes)
        for key, value in model.state_dict().items():
            equal = value.shape == released.state_dict()[key].shape and torch.equal(value, released.state_dict()[key])
            assert equal == (classes == 1000 or not key.startswith(head)), key


@pytest.mark.skipif(has_timm, reason="timm is installed")
def test_timm_model_without_timm_reports_the_install_command():
    with pytest.raises(ConfigError, match="pip install"):
        MODELS.check("timm/resnet18", {})


@pytest.mark.extra("timm")
def test_timm_model_has_the_classes_and_channels_of_the_dataset():
    for name in ("resnet10t", "vit_tiny_patch16_224"):  # the second has a fixed image size
        model = MODELS.build(f"timm/{name}", {}, num_classes=7, in_channels=1, image_size=64)
        assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.extra("timm")
def test_timm_names_are_all_its_models():
    import timm

    names = {name.removeprefix("timm/") for name in MODELS.names() if name.startswith("timm/")}
    assert names == set(timm.list_models())
