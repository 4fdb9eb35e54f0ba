"""Features: the right value at the right moment, and no more of the model than is wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18

from helpers.plugin_parts import CALLS, Layers, RepeatedLayer
from helpers.recipes import build_stage, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.engine.network.features import Feature, FeatureExtractor, find_module, model_output
from kdbench.engine.plan.trace import trace_modules
from kdbench.errors import ConfigError

IMAGE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def stem_of(model: RepeatedLayer):
    return model.stem(IMAGE.flatten(1))


def test_a_path_gives_what_the_module_gave():
    model = Layers()
    kept = FeatureExtractor(model, [Feature("layer1"), Feature("logits")])(IMAGE)
    assert_close(kept[Feature("layer1")], model.layer1(IMAGE.flatten(1)), rtol=0, atol=0)
    assert_close(kept[Feature("logits")], model(IMAGE), rtol=0, atol=0)


def test_negative_indices_count_from_the_end():
    model = RepeatedLayer()
    assert find_module(model, "blocks.-1") == ("blocks.1", model.blocks[1])
    assert find_module(model, "blocks.-2") == ("blocks.0", model.blocks[0])
    with pytest.raises(ConfigError, match=r"blocks\.-3"):
        find_module(model, "blocks.-3")


def test_the_kth_call_is_the_kth():
    model = RepeatedLayer()
    first = model.shared(stem_of(model))
    kept = FeatureExtractor(
        model, [Feature("shared"), Feature("shared", 2)], overwritten=frozenset([Feature("shared", 2)])
    )(IMAGE)
    assert_close(kept[Feature("shared")], first, rtol=0, atol=0)
    assert_close(kept[Feature("shared", 2)], model.shared(first), rtol=0, atol=0)
    assert not torch.equal(kept[Feature("shared")], kept[Feature("shared", 2)])


def test_the_counts_of_calls_begin_anew_in_every_forward():
    model = RepeatedLayer()
    capture = FeatureExtractor(model, [Feature("shared", 2), Feature("logits")])
    one, two = capture(IMAGE), capture(IMAGE)
    assert_close(one[Feature("shared", 2)], two[Feature("shared", 2)], rtol=0, atol=0)


def test_an_input_is_taken_before_an_in_place_module_runs():
    model = RepeatedLayer()
    before = model.shared(model.shared(stem_of(model)))
    assert (before < 0).any(), "the ReLU must have something to change"
    feature = Feature("act", side="in")
    spoiled = frozenset([feature])
    kept = FeatureExtractor(model, [feature], overwritten=spoiled)(IMAGE)
    assert_close(kept[feature], before, rtol=0, atol=0)
    unguarded = FeatureExtractor(model, [feature])(IMAGE)  # negative control: without the clone the value is lost
    assert torch.equal(unguarded[feature], before.relu())


def test_the_input_of_a_module_that_is_called_by_keyword_is_found():
    model = RepeatedLayer()
    before = model.shared(model.shared(stem_of(model))).relu()
    kept = FeatureExtractor(model, [Feature("blocks.0", side="in")])(IMAGE)
    assert_close(kept[Feature("blocks.0", side="in")], before, rtol=0, atol=0)


def test_a_feature_that_later_operations_overwrite_keeps_its_value():
    """torchvision adds the shortcut into bn2's output, in place, and then applies an in-place ReLU."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    image = torch.randn(2, 3, 32, 32)
    overwritten = {c.path for c in trace_modules(model, image) if c.output is not None and c.output.overwritten}
    assert "layer1.0.bn2" in overwritten
    block = model.layer1[0]
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        true = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        feature = Feature("layer1.0.bn2")
        kept = FeatureExtractor(model, [feature, Feature("logits")], overwritten=frozenset([feature]))(image)
        assert_close(kept[feature], true, rtol=0, atol=0)
        spoiled = FeatureExtractor(model, [feature, Feature("logits")])(image)[feature]  # negative control
        assert_close(spoiled, torch.relu(true + x), rtol=0, atol=0)


def test_the_plan_finds_what_is_overwritten_and_the_network_clones_it():
    loaded = recipe_from_text(
        """
        student: torchvision/resnet18
        teacher: torchvision/resnet18
        terms: {at: {type: at, student: layer1.1.bn2, teacher: layer1.0.bn2}}
        optimizer: {type: SGD, lr: 0.1}
        batch_size: 4
        epochs: 1
        """,
        data="dataset: {type: synthetic, shape: [3, 32, 32], classes: 4, samples: 8}\n",
    )
    run = build_stage(loaded)
    assert run.plan.roles["teacher"].overwritten_features == {Feature("layer1.0.bn2")}
    batch = next(run.windows())[0]
    model = run.model("teacher")
    features = run.network.run_roles(batch, run.network.wiring(["at"], []).runs)
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch["train"].fields["image"]))))
        block = model.layer1[0]
        true = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert_close(features["teacher", Feature("layer1.0.bn2")], true, rtol=0, atol=0)


def test_a_clone_passes_the_gradient_on():
    model = RepeatedLayer()
    feature = Feature("blocks.0")
    kept = FeatureExtractor(model, [feature], overwritten=frozenset([feature]))(IMAGE)
    kept[feature].sum().backward()
    assert model.blocks[0].weight.grad is not None and model.stem.weight.grad is not None


def test_a_captured_feature_does_not_outlive_its_forward():
    model = Layers()
    capture = FeatureExtractor(model, [Feature("layer1")])
    capture(IMAGE)
    assert capture.values == {}


STOPPING = """
student: {model: {type: t_layers, label: student}}
teacher: {model: {type: t_layers, label: teacher}}
terms:
  hint: {type: hint, student: {path: STUDENT, adapter: linear}, teacher: TEACHER}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
"""


def calls_of_a_step(student: str, teacher: str) -> list[str]:
    run = build_stage(STOPPING.replace("STUDENT", student).replace("TEACHER", teacher))
    CALLS.clear()
    run.step()
    return list(CALLS)


def test_models_run_no_further_than_the_last_wanted_feature():
    assert sorted(calls_of_a_step("layer1", "layer2")) == ["student.layer1", "teacher.layer1", "teacher.layer2"]


def test_models_run_to_the_end_when_the_output_is_wanted():
    assert "teacher.layer3" in calls_of_a_step("layer1", "layer3") and "student.layer3" in calls_of_a_step("fc", "fc")


def test_a_model_that_stopped_early_is_still_evaluated_whole():
    run = build_stage(STOPPING.replace("STUDENT", "layer1").replace("TEACHER", "layer2")).step()
    assert run.model()(IMAGE).shape == (3, 4)


def test_hooks_do_nothing_outside_of_a_captured_forward():
    model = Layers()
    capture = FeatureExtractor(model, [Feature("layer1")], stop=True)
    assert model(IMAGE).shape == (3, 4)
    assert capture.values == {}


@pytest.mark.parametrize("side", ["in", "out"])
def test_removed_hooks_are_gone(side):
    model = Layers()
    capture = FeatureExtractor(model, [Feature("layer1", side=side)])
    capture.remove()
    capture.active = True
    model(IMAGE)
    assert capture.values == {}


def test_an_output_is_found_by_its_name():
    image, logits = torch.zeros(2, 3), torch.ones(2, 4)
    assert model_output({"logits": logits, "image": image}, "image") is image
    assert model_output({"logits": logits, "image": image}, "logits") is logits
    assert model_output((logits, image)) is logits
    with pytest.raises(ConfigError, match="NoneType"):
        model_output(None)


def test_a_role_that_sees_another_ones_output_sees_the_entry_that_it_names():
    run = build_stage(
        """
        models: {generator: {model: t_generator, input: noise.z}}
        student: {model: t_layers, input: "generator:image"}
        data:
          noise: {type: gaussian, shape: [6], samples: 32}
        terms: {n: {type: t_counted}}
        optimizer: {type: SGD, lr: 0.1}
        epochs: 1
        batch_size: 8
        """
    )
    batch = next(run.windows())[0]
    features = run.network.run_roles(batch, run.network.wiring(["n"], ["generator", "student"]).runs)
    image = run.model("generator")(batch["noise"].fields["z"])["image"]
    assert image.abs().max() > 0
    assert_close(features["student", Feature("logits")], run.model()(image), rtol=0, atol=0)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = RepeatedLayer()

    def forward(self, image):
        return self.inner(image)


def test_paths_lead_into_nested_modules():
    model = Nested()
    path, module = find_module(model, "inner.blocks.-1")
    assert (path, module) == ("inner.blocks.1", model.inner.blocks[1])
    with pytest.raises(ConfigError, match=r"Did you mean 'inner\.shared'"):
        find_module(model, "inner.shard")
