"""From `optimizer:` to parameter groups."""

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

HERE = Location(key="optimizer", file="my.yaml", line=7)


def config(type: str = "SGD", *groups: dict, **params) -> OptimizerConfig:
    return OptimizerConfig(type=type, params={"lr": 0.1, **params}, groups=groups, location=HERE)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build("digits_cnn", {})


def names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_offers_all_optimizers_of_torch_and_nothing_else():
    exported = {
        name for name, part in vars(torch.optim).items()
        if isinstance(part, type) and issubclass(part, torch.optim.Optimizer) and part is not torch.optim.Optimizer
    }  # fmt: skip
    assert set(OPTIMIZERS.names()) == exported


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_read_signatures_are_the_real_ones(name):
    import inspect

    real = inspect.signature(getattr(torch.optim, name)).parameters
    assert list(OPTIMIZERS.entry(name).parameters) == [key for key in real if key != "params"]


def test_names_and_types_are_answered_without_torch():
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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(kdbench.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_without_groups_there_is_one_in_the_order_of_the_model(student):
    assert names(build_optimizer(config(), {"student": student}), student) == [
        [n for n, _ in student.named_parameters()]
    ]


def test_first_matching_group_wins(student):
    optimizer = build_optimizer(
        config("SGD", {"path": "layer2", "lr": 0.01}, {"type": "norm", "weight_decay": 0.0}, weight_decay=0.5),
        {"student": student},
    )
    rest, layer2, norm = names(optimizer, student)
    assert set(layer2) == {n for n, _ in student.named_parameters() if n.startswith("layer2.")}
    assert set(norm) == {"layer1.1.weight", "layer1.1.bias", "layer3.1.weight", "layer3.1.bias"}
    assert set(rest) == {"layer1.0.weight", "layer3.0.weight", "fc.weight", "fc.bias"}
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.5), (0.01, 0.5), (0.1, 0.0)]


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
def test_a_group_is_found_by_path_and_type(student, group, expected):
    assert (
        set(names(build_optimizer(config("SGD", {**group, "lr": 1.0}), {"student": student}), student)[1]) == expected
    )


def test_path_does_not_match_a_longer_name():
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    groups = names(build_optimizer(config("SGD", {"path": "layer1", "lr": 1.0}), {"student": model}), model)
    assert groups == [["layer10.weight", "layer10.bias"], ["layer1.weight", "layer1.bias"]]


def test_a_role_names_only_its_own_parameters(student):
    other = MODELS.build("digits_cnn", {})
    both = {"a": student, "b": other}
    assert len(build_optimizer(config("SGD", {"path": "fc", "lr": 1.0}), both).param_groups[1]["params"]) == 4
    of_b = build_optimizer(config("SGD", {"path": "b.fc", "lr": 1.0}), both).param_groups[1]["params"]
    assert {id(p) for p in of_b} == {id(p) for p in other.fc.parameters()}
    assert len(build_optimizer(config("SGD", {"path": "b", "lr": 1.0}), both).param_groups[1]["params"]) == 11


def test_shared_parameters_are_held_once(student):
    optimizer = build_optimizer(config(), {"student": student, "again": student})
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(student.parameters()))


def test_frozen_and_unreached_parameters_are_left_out_and_do_not_move(student):
    student.layer1.requires_grad_(False)
    only = [*student.layer1.parameters(), *student.fc.parameters()]
    optimizer = build_optimizer(config(weight_decay=0.1), {"student": student}, only)
    assert names(optimizer, student) == [["fc.weight", "fc.bias"]]
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    student(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert {n for n, p in student.named_parameters() if not torch.equal(p, before[n])} == {"fc.weight", "fc.bias"}


def test_every_optimizer_moves_the_weights():
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


def test_lr_factor_is_taken_from_the_initial_rate_each_time(student):
    optimizer = build_optimizer(config("SGD", {"path": "fc", "lr": 0.02}), {"student": student})
    for factor in (0.5, 0.1, 1.0):
        set_lr_factor(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [0.1 * factor, 0.02 * factor]
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.1, 0.02]


def test_lr_factor_writes_into_a_rate_that_lives_on_the_device(student):
    optimizer = build_optimizer(config(), {"student": student})
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_lr_factor(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_multi_tensor_steps_equal_plain_ones(student):
    results = []
    for foreach in (None, False):
        torch.manual_seed(0)
        model = MODELS.build("digits_cnn", {})
        params = {} if foreach is None else {"foreach": foreach}
        optimizer = build_optimizer(config(momentum=0.9, weight_decay=0.1, **params), {"student": model})
        assert optimizer.defaults["foreach"] is (foreach is None)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 1, 8, 8)).square().sum().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config("Sgd"), r"my.yaml:7 optimizer: no optimizer 'Sgd'. Did you mean 'SGD'"),
        (config("SGD", wd=0.1), r"my.yaml:7 optimizer: .*no parameter 'wd'"),
        (config("SGD", lr=-1.0), r"my.yaml:7 optimizer: .*Invalid learning rate"),
        (config("SGD", nesterov=True), r"my.yaml:7 optimizer: .*Nesterov momentum requires"),
        (config("SGD", {"lr": 1.0}), r"optimizer.groups\[0\]: a group needs `path` or `type`"),
        (config("SGD", {"path": "fc", "decay": 1.0}), r"groups\[0\]: .*no parameter 'decay'"),
        (config("SGD", {"path": "layer9"}), r"groups\[0\]: no module or parameter 'layer9' in student.*layer"),
        (config("SGD", {"type": "norm"}, {"type": "BatchNorm3d"}), r"groups\[1\]: no module of type.*'BatchNorm2d'"),
        (config("SGD", {"path": "layer1"}, {"path": "layer1.0"}), r"groups\[1\]: .*an earlier group contains all of it"),
        (config("SGD", {"path": "layer1.2"}), r"groups\[0\]: .*none of it is trained"),
    ],
)
def test_mistakes_say_what_and_where(student, given, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(given, {"student": student})


def test_a_policy_group_may_match_nothing():
    optimizer = build_optimizer(config("SGD", {"type": "norm", "weight_decay": 0.0}), {"student": nn.Linear(2, 2)})
    assert len(optimizer.param_groups) == 1


def test_nothing_to_train_is_a_mistake(student):
    student.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"my.yaml:7 optimizer: nothing to train: student"):
        build_optimizer(config(), {"student": student})
