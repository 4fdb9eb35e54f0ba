"""`trace_modules` reports calls, shapes and in-place writes of one forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.engine.plan.trace import ModuleCall, TracedTensor, first_tensor, trace_modules


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        out = self.bn(x)
        out += scale * x
        return {"logits": self.act(out), "input": x}


def input_of(call: ModuleCall) -> TracedTensor:
    assert call.input is not None
    return call.input


def output_of(call: ModuleCall) -> TracedTensor:
    assert call.output is not None
    return call.output


def test_calls_are_in_the_order_of_their_start_and_have_shapes():
    with torch.device("meta"):
        calls = trace_modules(nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 2)), nn.Flatten()), torch.zeros(2, 3, 4, 4))
    assert [(c.path, c.type) for c in calls] == [
        ("", "Sequential"), ("0", "Sequential"), ("0.0", "Conv2d"), ("1", "Flatten")
    ]  # fmt: skip
    assert [input_of(c).shape for c in calls] == [(2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4), (2, 5, 3, 3)]
    assert [output_of(c).shape for c in calls] == [(2, 45), (2, 5, 3, 3), (2, 5, 3, 3), (2, 45)]


def test_in_place_writes_are_detected_on_meta_and_on_cpu():
    for device in ("meta", "cpu"):
        with torch.device(device):
            calls = {call.path: call for call in trace_modules(Residual().eval(), torch.zeros(2, 3, 4, 4))}
        assert output_of(calls["bn"]).overwritten  # by the addition and the ReLU
        assert input_of(calls["act"]).overwritten and not output_of(calls["act"]).overwritten
        assert not input_of(calls["bn"]).overwritten
        assert output_of(calls[""]).shape == (2, 3, 4, 4)
        assert "unused" not in calls


def test_repeated_calls_of_a_module_are_numbered():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [(c.path, c.call) for c in trace_modules(model, torch.zeros(2, 4))] == [
        ("", 1), ("0", 1), ("1", 1), ("0", 2)
    ]  # fmt: skip


def test_recursive_calls_keep_their_tensors_apart():
    class Recursive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else self(x[1:])

    calls = trace_modules(Recursive(), torch.zeros(3, 2))
    assert [(c.call, input_of(c).shape[0], output_of(c).shape[0]) for c in calls] == [(1, 3, 1), (2, 2, 1), (3, 1, 1)]


def test_keyword_arguments_and_outputs_without_tensors_are_accepted():
    class Inner(nn.Module):
        def forward(self, *, x: Tensor) -> tuple[int, list[Tensor]]:
            return 3, [x[:1]]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> int:
            return self.inner(x=x)[0]

    outer, inner = trace_modules(Outer(), torch.zeros(5, 2))
    assert outer.output is None
    assert (input_of(inner).shape, output_of(inner).shape) == ((5, 2), (1, 2))


def test_hooks_are_removed_even_if_the_model_fails():
    model = nn.Sequential(nn.Linear(4, 4))
    for image in (torch.zeros(2, 4), torch.zeros(2, 5)):
        try:
            trace_modules(model, image)
        except RuntimeError:
            assert image.shape[1] == 5
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_first_tensor_searches_nested_containers():
    x = torch.zeros(1)
    assert first_tensor({"a": None, "b": (1, [x])}) is x
    assert first_tensor((1, "a")) is None
