"""Optimizers built from `optimizer:` of a recipe: parameter groups, learning rates and errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kdbench
from kdbench.config.schema import OptimizerConfig
from kdbench.engine.train.optimizers import build_optimizer, set_lr_factor
from kdbench.errors import ConfigError, Location
from kdbench.registry import MODELS, OPTIMIZERS

LOCATION = Location(key="optimizer", file="my.yaml", line=7)


def config(type: str = "SGD", *groups: dict, **params) -> OptimizerConfig:
    return OptimizerConfig(type=type, params={"lr": 0.1, **params}, groups=groups, location=LOCATION)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build("digits_cnn", {})


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Returns the names of the parameters in each group."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_registry_contains_exactly_the_optimizers_of_torch():
    exported = {
        name for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }  # fmt: skip
    assert set(OPTIMIZERS.names()) == exported


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_registered_parameters_equal_the_signature_of_torch(name):
    import inspect

    signature = inspect.signature(getattr(torch.optim, name)).parameters
    assert list(OPTIMIZERS.entry(name).parameters) == [key for key in signature if key != "params"]


def test_names_and_types_are_checked_without_importing_torch():
    code = (
        "import sys\n"
        "from kdbench.errors import ConfigError\n"
        "from kdbench.registry import OPTIMIZERS\n"
        "OPTIMIZERS.check('AdamW', {'lr': 1e-3, 'betas': [0.9, 0.95]})\n"
        "for params in ({'lr': 'fast'}, {'betas': 0.9}, {'wd': 0.1}):\n"
        "    try: OPTIMIZERS.check('AdamW', params)\n"
        "    except ConfigError: continue\n"
        "    raise SystemExit(f'accepted {params}')\n"
        "assert 'torch' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(kdbench.__file__).parents[1]
    )
    assert process.returncode == 0, process.stderr


def test_without_groups_one_group_has_the_order_of_the_model(student):
    optimizer = build_optimizer(config(), {"student": student})
    assert group_names(optimizer, student) == [[name for name, _ in student.named_parameters()]]


def test_first_matching_group_wins(student):
    optimizer = build_optimizer(
        config("SGD", {"path": "layer2", "lr": 0.01}, {"type": "norm", "weight_decay": 0.0}, weight_decay=0.5),
        {"student": student},
    )
    default, layer2, norm = group_names(optimizer, student)
    assert set(layer2) == {name for name, _ in student.named_parameters() if name.startswith("layer2.")}
    assert set(norm) == {"layer1.1.weight", "layer1.1.bias", "layer3.1.weight", "layer3.1.bias"}
    assert set(default) == {"layer1.0.weight", "layer3.0.weight", "fc.weight", "fc.bias"}
    values = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert values == [(0.1, 0.5), (0.01, 0.5), (0.1, 0.0)]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"path": "student.fc"}, {"fc.weight", "fc.bias"}),
        ({"path": "layer3.-2"}, {"layer3.1.weight", "layer3.1.bias"}),
        ({"path": "fc.weight"}, {"fc.weight"}),
        ({"type": "bias"}, {"layer1.1.bias", "layer2.1.bias", "layer3.1.bias", "fc.bias"}),
        ({"type": "Linear"}, {"fc.weight", "fc.bias"}),
        ({"type": "BatchNorm2d", "path": "layer1"}, {"layer1.1.weight", "layer1.1.bias"}),
    ],
)
def test_group_contains_the_parameters_that_match_path_and_type(student, group, expected):
    optimizer = build_optimizer(config("SGD", {**group, "lr": 1.0}), {"student": student})
    assert set(group_names(optimizer, student)[1]) == expected


def test_path_does_not_match_a_longer_name():
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    optimizer = build_optimizer(config("SGD", {"path": "layer1", "lr": 1.0}), {"student": model})
    assert group_names(optimizer, model) == [["layer10.weight", "layer10.bias"], ["layer1.weight", "layer1.bias"]]


def test_path_with_a_role_matches_this_role_only(student):
    second = MODELS.build("digits_cnn", {})
    modules = {"a": student, "b": second}

    def matched_parameters(path: str) -> list[nn.Parameter]:
        return build_optimizer(config("SGD", {"path": path, "lr": 1.0}), modules).param_groups[1]["params"]

    assert len(matched_parameters("fc")) == 4
    assert {id(parameter) for parameter in matched_parameters("b.fc")} == {id(p) for p in second.fc.parameters()}
    assert len(matched_parameters("b")) == 11


def test_shared_parameters_are_contained_once(student):
    optimizer = build_optimizer(config(), {"student": student, "again": student})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))


def test_frozen_and_unreached_parameters_are_in_no_group_and_keep_their_values(student):
    student.layer1.requires_grad_(False)
    reached = [*student.layer1.parameters(), *student.fc.parameters()]
    optimizer = build_optimizer(config(weight_decay=0.1), {"student": student}, reached)
    assert group_names(optimizer, student) == [["fc.weight", "fc.bias"]]
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    changed_names = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed_names == {"fc.weight", "fc.bias"}


def test_every_optimizer_changes_the_weights():
    for name in OPTIMIZERS.names():
        if name in ("LBFGS", "SparseAdam"):
            with pytest.raises(ConfigError, match=f"'{name}' is not supported"):
                build_optimizer(config(name), {"student": nn.Linear(3, 2)})
            continue
        model = nn.Linear(3, 2, bias=False)
        before = model.weight.detach().clone()
        optimizer = build_optimizer(config(name), {"student": model})
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        assert not torch.equal(model.weight, before), name


def test_lr_factor_multiplies_the_initial_rate_each_time(student):
    optimizer = build_optimizer(config("SGD", {"path": "fc", "lr": 0.02}), {"student": student})
    for factor in (0.5, 0.1, 1.0):
        set_lr_factor(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 0.02 * factor]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_lr_factor_is_written_into_a_rate_that_is_a_tensor(student):
    optimizer = build_optimizer(config(), {"student": student})
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_lr_factor(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_multi_tensor_steps_equal_steps_of_single_tensors(student):
    results = []
    for params in ({}, {"foreach": False}):
        torch.manual_seed(0)
        model = MODELS.build("digits_cnn", {})
        optimizer = build_optimizer(config(momentum=0.9, weight_decay=0.1, **params), {"student": model})
        assert optimizer.defaults["foreach"] is (params == {})
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 1, 8, 8)).square().sum().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (config("Sgd"), r"my.yaml:7 optimizer: no optimizer 'Sgd'. Did you mean 'SGD'"),
        (config("SGD", wd=0.1), r"my.yaml:7 optimizer: .*no parameter 'wd'"),
        (config("SGD", lr=-1.0), r"my.yaml:7 optimizer: .*Invalid learning rate"),
        (config("SGD", nesterov=True), r"my.yaml:7 optimizer: .*Nesterov momentum requires"),
        (config("SGD", {"lr": 1.0}), r"optimizer.groups\[0\]: a group needs `path` or `type`"),
        (config("SGD", {"path": "fc", "decay": 1.0}), r"groups\[0\]: .*no parameter 'decay'"),
        (config("SGD", {"path": "layer9"}), r"groups\[0\]: no module or parameter 'layer9' in student.*layer"),
        (config("SGD", {"type": "norm"}, {"type": "BatchNorm3d"}), r"groups\[1\]: no module of type.*'BatchNorm2d'"),
        (
            config("SGD", {"path": "layer1"}, {"path": "layer1.0"}),
            r"groups\[1\]: .*an earlier group contains all of it",
        ),
        (config("SGD", {"path": "layer1.2"}), r"groups\[0\]: .*none of it is trained"),
    ],
)
def test_error_contains_location_and_reason(student, optimizer, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(optimizer, {"student": student})


def test_norm_group_may_match_nothing():
    optimizer = build_optimizer(config("SGD", {"type": "norm", "weight_decay": 0.0}), {"student": nn.Linear(2, 2)})
    assert len(optimizer.param_groups) == 1


def test_model_without_trainable_parameter_is_rejected(student):
    student.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"my.yaml:7 optimizer: nothing to train: student"):
        build_optimizer(config(), {"student": student})
