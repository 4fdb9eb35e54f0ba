"""Feature extraction: correct values, also of overwritten tensors, and no computation after the last feature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import resnet18

from helpers.plugin_parts import CALLS, Layers, RepeatedLayer
from helpers.recipes import build_stage, plugin_registration, recipe_from_text  # noqa: F401
from kdbench.engine.network.features import Feature, FeatureExtractor, find_module, model_output
from kdbench.engine.plan.trace import trace_modules
from kdbench.errors import ConfigError

IMAGE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def stem_output(model: RepeatedLayer) -> Tensor:
    return model.stem(IMAGE.flatten(1))


def test_path_extracts_the_output_of_the_module():
    model = Layers()
    features = FeatureExtractor(model, [Feature("layer1"), Feature("logits")])(IMAGE)
    assert_close(features[Feature("layer1")], model.layer1(IMAGE.flatten(1)), rtol=0, atol=0)
    assert_close(features[Feature("logits")], model(IMAGE), rtol=0, atol=0)


def test_negative_indices_count_from_the_end():
    model = RepeatedLayer()
    assert find_module(model, "blocks.-1") == ("blocks.1", model.blocks[1])
    assert find_module(model, "blocks.-2") == ("blocks.0", model.blocks[0])
    with pytest.raises(ConfigError, match=r"blocks\.-3"):
        find_module(model, "blocks.-3")


def test_second_call_of_a_module_is_a_feature_of_its_own():
    model = RepeatedLayer()
    first_output = model.shared(stem_output(model))
    first, second = Feature("shared"), Feature("shared", 2)
    features = FeatureExtractor(model, [first, second], overwritten=frozenset([second]))(IMAGE)
    assert_close(features[first], first_output, rtol=0, atol=0)
    assert_close(features[second], model.shared(first_output), rtol=0, atol=0)
    assert not torch.equal(features[first], features[second])


def test_calls_are_counted_separately_in_every_forward():
    model = RepeatedLayer()
    extractor = FeatureExtractor(model, [Feature("shared", 2), Feature("logits")])
    first, second = extractor(IMAGE), extractor(IMAGE)
    assert_close(first[Feature("shared", 2)], second[Feature("shared", 2)], rtol=0, atol=0)


def test_input_of_an_in_place_module_is_extracted_before_it_runs():
    model = RepeatedLayer()
    before = model.shared(model.shared(stem_output(model)))
    assert (before < 0).any(), "the ReLU must have something to change"
    feature = Feature("act", side="in")
    features = FeatureExtractor(model, [feature], overwritten=frozenset([feature]))(IMAGE)
    assert_close(features[feature], before, rtol=0, atol=0)
    without_clone = FeatureExtractor(model, [feature])(IMAGE)  # negative control: the value is lost
    assert torch.equal(without_clone[feature], before.relu())


def test_input_of_a_module_that_is_called_by_keyword_is_extracted():
    model = RepeatedLayer()
    before = model.shared(model.shared(stem_output(model))).relu()
    features = FeatureExtractor(model, [Feature("blocks.0", side="in")])(IMAGE)
    assert_close(features[Feature("blocks.0", side="in")], before, rtol=0, atol=0)


def test_feature_that_later_operations_overwrite_keeps_its_value():
    """torchvision adds the shortcut into bn2's output, in place, and then applies an in-place ReLU."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    image = torch.randn(2, 3, 32, 32)
    overwritten = {c.path for c in trace_modules(model, image) if c.output is not None and c.output.overwritten}
    assert "layer1.0.bn2" in overwritten
    block = model.layer1[0]
    with torch.no_grad():
        shortcut = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        expected = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(shortcut)))))
        feature = Feature("layer1.0.bn2")
        requested = [feature, Feature("logits")]
        features = FeatureExtractor(model, requested, overwritten=frozenset([feature]))(image)
        assert_close(features[feature], expected, rtol=0, atol=0)
        without_clone = FeatureExtractor(model, requested)(image)[feature]  # negative control
        assert_close(without_clone, torch.relu(expected + shortcut), rtol=0, atol=0)


def test_plan_detects_overwritten_features_and_the_network_clones_them():
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
    stage = build_stage(loaded)
    assert stage.plan.roles["teacher"].overwritten_features == {Feature("layer1.0.bn2")}
    batches = next(stage.windows())[0]
    model = stage.model("teacher")
    features = stage.network.run_roles(batches, stage.network.wiring(["at"], []).runs)
    with torch.no_grad():
        value = model.maxpool(model.relu(model.bn1(model.conv1(batches["train"].fields["image"]))))
        block = model.layer1[0]
        expected = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(value)))))
    assert_close(features["teacher", Feature("layer1.0.bn2")], expected, rtol=0, atol=0)


def test_gradient_flows_through_a_cloned_feature():
    model = RepeatedLayer()
    feature = Feature("blocks.0")
    features = FeatureExtractor(model, [feature], overwritten=frozenset([feature]))(IMAGE)
    features[feature].sum().backward()
    assert model.blocks[0].weight.grad is not None and model.stem.weight.grad is not None


def test_extractor_keeps_no_feature_after_the_forward():
    extractor = FeatureExtractor(Layers(), [Feature("layer1")])
    extractor(IMAGE)
    assert extractor.values == {}


EARLY_FEATURES = """
student: {model: {type: t_layers, label: student}}
teacher: {model: {type: t_layers, label: teacher}}
terms:
  hint: {type: hint, student: {path: STUDENT, adapter: linear}, teacher: TEACHER}
optimizer: {type: SGD, lr: 0.1}
epochs: 1
"""


def layers_called_in_a_step(student: str, teacher: str) -> list[str]:
    stage = build_stage(EARLY_FEATURES.replace("STUDENT", student).replace("TEACHER", teacher))
    CALLS.clear()
    stage.step()
    return list(CALLS)


def test_forward_ends_after_the_last_feature():
    calls = layers_called_in_a_step("layer1", "layer2")
    assert sorted(calls) == ["student.layer1", "teacher.layer1", "teacher.layer2"]


def test_forward_is_complete_if_a_late_feature_is_read():
    assert "teacher.layer3" in layers_called_in_a_step("layer1", "layer3")
    assert "student.layer3" in layers_called_in_a_step("fc", "fc")


def test_model_whose_training_forward_ends_early_is_evaluated_to_its_output():
    stage = build_stage(EARLY_FEATURES.replace("STUDENT", "layer1").replace("TEACHER", "layer2")).step()
    assert stage.model()(IMAGE).shape == (3, 4)


def test_hooks_have_no_effect_outside_of_an_extraction():
    model = Layers()
    extractor = FeatureExtractor(model, [Feature("layer1")], stop=True)
    assert model(IMAGE).shape == (3, 4)
    assert extractor.values == {}


@pytest.mark.parametrize("side", ["in", "out"])
def test_removed_hooks_extract_nothing(side):
    model = Layers()
    extractor = FeatureExtractor(model, [Feature("layer1", side=side)])
    extractor.active = True
    model(IMAGE)
    assert extractor.values  # control: registered hooks extract
    extractor.values = {}
    extractor.remove()
    model(IMAGE)
    assert extractor.values == {}


def test_model_output_is_selected_by_name():
    image, logits = torch.zeros(2, 3), torch.ones(2, 4)
    assert model_output({"logits": logits, "image": image}, "image") is image
    assert model_output({"logits": logits, "image": image}, "logits") is logits
    assert model_output((logits, image)) is logits
    with pytest.raises(ConfigError, match="NoneType"):
        model_output(None)


def test_input_from_another_role_is_the_output_entry_that_the_recipe_names():
    stage = build_stage(
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
    batches = next(stage.windows())[0]
    features = stage.network.run_roles(batches, stage.network.wiring(["n"], ["generator", "student"]).runs)
    image = stage.model("generator")(batches["noise"].fields["z"])["image"]
    assert image.abs().max() > 0
    assert_close(features["student", Feature("logits")], stage.model()(image), rtol=0, atol=0)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = RepeatedLayer()

    def forward(self, image):
        return self.inner(image)


def test_paths_address_nested_modules():
    model = Nested()
    path, module = find_module(model, "inner.blocks.-1")
    assert (path, module) == ("inner.blocks.1", model.inner.blocks[1])
    with pytest.raises(ConfigError, match=r"Did you mean 'inner\.shared'"):
        find_module(model, "inner.shard")
