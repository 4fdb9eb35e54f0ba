"""The plan of a stage: shapes, sizes and costs before training; mistakes reported with their location."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.recipes import SYNTHETIC_DATA, build_stage, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.engine.network.features import Feature
from kdbench.engine.plan.plan import StagePlan
from kdbench.errors import ConfigError

BASE = """
student: {model: {type: t_layers, hidden: 10}}
teacher: {model: {type: t_layers, hidden: 14}}
terms:
  ce: cross_entropy
  hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer2, weight: 2}
optimizer: {type: SGD, lr: 0.1}
epochs: 2
batch_size: 16
"""
END = "optimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"


def plan_text(text: str, *overrides: str, data: str = SYNTHETIC_DATA, world_size: int = 1) -> StagePlan:
    return stage_plan(recipe_from_text(text, *overrides, data=data), world_size=world_size)


def error_of(text: str, *overrides: str, data: str = SYNTHETIC_DATA, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        plan_text(text, *overrides, data=data, world_size=world_size)
    return str(error.value)


def test_features_have_shapes_and_adapters_have_sizes():
    plan = plan_text(BASE)
    assert plan.roles["student"].features == {Feature("logits"): (4,), Feature("layer1"): (10,)}
    assert plan.roles["teacher"].features == {Feature("layer2"): (14,)}
    assert plan.term_parameters == {"ce": 0, "hint": 10 * 14 + 14}
    assert plan.adapters["hint"] == ("Linear on student:layer1 (154 parameters)",) or "154" in plan.adapters["hint"][0]
    assert plan.roles["teacher"].stop_module == "layer2" and plan.roles["student"].stop_module is None


def test_parameters_and_flops_are_those_of_the_layers():
    plan = plan_text(BASE)
    student, teacher = plan.roles["student"], plan.roles["teacher"]
    weights = [64 * 10, 10 * 10, 10 * 10, 10 * 4]
    assert student.parameters == sum(weights) + 10 + 10 + 10 + 4
    assert student.flops == 2 * sum(weights)
    assert student.trainable_parameters == student.parameters and teacher.trainable_parameters == 0


def test_flops_of_a_role_count_up_to_its_last_feature():
    """The teacher's last feature is layer2, so layer3 and the classifier run in a full forward only."""
    step_layers, remaining_layers = [64 * 14, 14 * 14], [14 * 14, 14 * 4]
    teacher = plan_text(BASE).roles["teacher"]
    assert teacher.flops == 2 * sum(step_layers)
    assert teacher.full_forward_flops == 2 * sum(step_layers + remaining_layers)
    with_logits = plan_text(BASE.replace("teacher: layer2", "teacher: logits")).roles["teacher"]
    assert with_logits.flops == with_logits.full_forward_flops == teacher.full_forward_flops
    before_layer2 = plan_text(BASE.replace("teacher: layer2", "teacher: layer2/in")).roles["teacher"]
    assert before_layer2.flops == 2 * 64 * 14


def test_flops_of_resnet20_are_the_published_ones():
    """0.041 G multiply-adds for one 32x32 image (He et al. 2015, as listed in many tables)."""
    data = "dataset: {type: synthetic, shape: [3, 32, 32], classes: 100, samples: 200}\n"
    plan = plan_text(
        "student: resnet20\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n", data=data
    )
    assert 81.4e6 < plan.roles["student"].flops < 82.0e6


def test_memory_grows_with_the_batch_by_the_saved_activations():
    small, large = plan_text(BASE, "batch_size=16"), plan_text(BASE, "batch_size=32")
    per_row = (large.memory_bytes - small.memory_bytes) / 16
    inputs, hidden = 64, 10
    # Every linear layer saves its input and every ReLU its output; these are the same tensors.
    least = 4 * (inputs + 3 * hidden)
    assert least <= per_row <= 4 * least


def test_memory_counts_weights_once_whatever_the_batch_size():
    """A layer saves its weights for the backward; they must not be multiplied by the number of rows."""
    text = BASE.replace("hidden: 10", "hidden: 600")
    plan = plan_text(text, "batch_size=64")
    all_parameters = plan.roles["student"].parameters + plan.roles["teacher"].parameters + plan.term_parameters["hint"]
    trainable = plan.roles["student"].trainable_parameters + plan.term_parameters["hint"]
    activations = 64 * 4 * (64 + 3 * 600) * 4
    assert plan.memory_bytes <= 4 * all_parameters + 8 * trainable + activations


def test_planning_reads_no_data_and_draws_no_random_numbers(monkeypatch):
    from kdbench.data.datasets.synthetic import Synthetic

    monkeypatch.setattr(Synthetic, "load", lambda self: pytest.fail("the plan read data"))
    before = torch.get_rng_state()
    plan_text(BASE)
    assert torch.equal(before, torch.get_rng_state())


def test_model_that_cannot_be_built_on_meta_is_planned_on_the_cpu(monkeypatch):
    from helpers import plugin_parts

    original = plugin_parts.Layers.__init__

    def init_with_host_read(self, *args, **kwargs):
        original(self, *args, **kwargs)
        float(torch.ones(1).sum())  # impossible on meta

    monkeypatch.setattr(plugin_parts.Layers, "__init__", init_with_host_read)
    assert plan_text(BASE).roles["student"].features[Feature("layer1")] == (10,)


def test_unknown_feature_path_reports_location_and_nearest_path():
    message = error_of(BASE.replace("path: layer1", "path: layr1"))
    assert "own.yaml:7" in message and "'layr1'" in message and "Did you mean 'layer1'" in message


def test_feature_of_a_call_that_does_not_occur_is_reported():
    message = error_of(BASE.replace("teacher: layer2", "teacher: layer2@2"))
    assert "own.yaml:7" in message and "layer2@2" in message and "1 time" in message


def test_teacher_with_another_number_of_classes_is_reported_by_kd():
    message = error_of(BASE.replace("  hint:", "  kd: kd\n  hint:").replace("hidden: 14", "num_classes: 7"))
    assert "own.yaml:7 terms.kd" in message and "4 classes" in message and "7" in message


def test_operands_of_different_shape_are_reported():
    message = error_of(BASE.replace("{path: layer1, adapter: linear}", "{path: layer1, adapter: identity}"))
    assert "own.yaml:7" in message and "[10]" in message and "[14]" in message
    message = error_of(BASE.replace("  hint:", "  picky: t_picky\n  hint:"))
    assert "own.yaml:7 terms.picky" in message and "compares apples only" in message


def test_error_of_a_terms_constructor_has_its_location():
    message = error_of(BASE.replace("  hint:", "  kd: {type: kd, temperature: 0}\n  hint:"))
    assert message.startswith("own.yaml:7 terms.kd: ") and "temperature must be above 0" in message


def test_error_of_a_models_constructor_has_its_location():
    message = error_of(BASE.replace("hidden: 10", 'hidden: 10, norm: ""').replace("t_layers, hidden: 14", "t_refusing"))
    assert "own.yaml:4 teacher" in message and "depth" in message


def test_stage_without_trainable_parameters_is_reported():
    message = error_of(
        BASE.replace("hidden: 10}", "hidden: 10}, freeze: [layer1, layer2, layer3, fc]").replace("  hint", "  # hint")
    )
    assert "nothing to update" in message and "ce" in message


def test_stage_with_all_weights_zero_is_reported():
    message = error_of(
        BASE.replace("ce: cross_entropy", "ce: {type: cross_entropy, weight: 0}").replace("weight: 2", "weight: 0")
    )
    assert "own.yaml:6 terms.ce" in message and "every term has weight 0" in message


def test_term_that_reads_labels_of_a_source_without_labels_is_reported():
    message = error_of(
        """
        models: {generator: {model: t_generator, input: noise.z}}
        student: {model: t_layers, input: "generator:image"}
        data: {noise: {type: gaussian, shape: [6], samples: 64}}
        terms: {ce: cross_entropy}
        optimizer: {type: SGD, lr: 0.1}
        epochs: 1
        """
    )
    assert "terms" in message and "'label'" in message and "'noise'" in message and "index, z" in message


def test_comparison_of_rows_from_different_sources_is_reported():
    message = error_of(
        """
        student: t_layers
        teacher: {model: t_layers, input: other.image}
        data: {other: {dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 32}}}
        terms: {kd: kd}
        optimizer: {type: SGD, lr: 0.1}
        epochs: 1
        """
    )
    assert "terms.kd" in message and "'train'" in message and "'other'" in message


WITH_BATCHNORM = BASE.replace("hidden: 10", "hidden: 10, norm: batch")


@pytest.mark.parametrize(
    ("text", "samples", "extra", "world_size"),
    [
        (WITH_BATCHNORM.replace("batch_size: 16", "batch_size: 1"), 64, "", 1),
        (WITH_BATCHNORM, 65, "", 1),
        (WITH_BATCHNORM, 72, "validation: 0.125\n", 1),  # 63 remain: 3 batches of 16 and one of 15
        (WITH_BATCHNORM, 34, "", 2),  # 2 ranks of 16, then one row each
        (WITH_BATCHNORM, 33, "", 2),
        (WITH_BATCHNORM, 33, "sync_batchnorm: true\n", 2),
    ],
)
def test_batch_of_one_row_under_batchnorm_is_reported(text, samples, extra, world_size):
    data = SYNTHETIC_DATA.replace("64", str(samples))
    if "validation" in extra:
        plan_text(text + extra, data=data)
        extra, data = "validation: 8\n", SYNTHETIC_DATA.replace("64", "73")  # 65 remain
    message = error_of(text + extra, data=data, world_size=world_size)
    assert "own.yaml" in message and "batch of one row" in message and "BatchNorm" in message


@pytest.mark.parametrize(
    ("text", "samples", "extra", "world_size"),
    [
        (BASE.replace("batch_size: 16", "batch_size: 1"), 64, "", 1),  # no BatchNorm
        (WITH_BATCHNORM, 66, "", 1),
        (WITH_BATCHNORM, 73, "validation: 9\n", 1),
        (WITH_BATCHNORM, 35, "", 2),  # 2 rows on each rank, one of them repeated
        (WITH_BATCHNORM, 34, "sync_batchnorm: true\n", 2),
    ],
)
def test_last_batches_with_more_rows_are_accepted(text, samples, extra, world_size):
    assert plan_text(text + extra, data=SYNTHETIC_DATA.replace("64", str(samples)), world_size=world_size).updates


def test_built_network_has_the_planned_parameters():
    harness = build_stage(BASE)
    parameters = {f"student.{name}" for name, _ in harness.model().named_parameters()}
    parameters |= {f"terms.hint.{name}" for name, _ in harness.network.term("hint").named_parameters()}
    update = harness.plan.updates[0]
    assert parameters == set(update.parameters) | set(update.unreached_parameters)
    assert isinstance(harness.network.term("hint").edges[0].adapter, nn.Module)
    assert_close(sum(p.numel() for p in harness.model().parameters()), harness.plan.roles["student"].parameters)


@pytest.mark.parametrize("subset", ["", "subset: 30", "subset: 0.5"])
@pytest.mark.parametrize("validation", ["", "validation: 8\n", "validation: 0.25\n"])
def test_planned_number_of_samples_equals_that_of_the_source(subset, validation):
    text = BASE.replace("batch_size: 16\n", "batch_size: 4\n" + validation)
    loaded = recipe_from_text(text + (f"data: {{train: {{{subset}}}}}\n" if subset else ""))
    assert stage_plan(loaded).specs["train"].samples == build_stage(loaded).sources["train"].num_samples


def test_model_parameter_that_no_device_accepts_is_reported_with_its_location():
    text = "student: {model: {type: t_layers, hidden: -4}}\nterms: {ce: cross_entropy}\n"
    with pytest.raises(ConfigError, match=r"own\.yaml:2 student\.model: the model cannot be built .*negative"):
        stage_plan(recipe_from_text(text + END))
