"""What is known before training: shapes, sizes, costs; and what cannot work, in words with its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.recipes import SYNTHETIC_DATA, build_stage, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.engine.network.features import Feature
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


def planned(text: str, *overrides: str, data: str = SYNTHETIC_DATA, world_size: int = 1):
    return stage_plan(recipe_from_text(text, *overrides, data=data), world_size=world_size)


def told(text: str, *overrides: str, data: str = SYNTHETIC_DATA, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(text, *overrides, data=data, world_size=world_size)
    return str(caught.value)


def test_features_get_shapes_and_adapters_their_sizes():
    plan = planned(BASE)
    assert plan.roles["student"].features == {Feature("logits"): (4,), Feature("layer1"): (10,)}
    assert plan.roles["teacher"].features == {Feature("layer2"): (14,)}
    assert plan.term_parameters == {"ce": 0, "hint": 10 * 14 + 14}
    assert plan.adapters["hint"] == ("Linear on student:layer1 (154 parameters)",) or "154" in plan.adapters["hint"][0]
    assert plan.roles["teacher"].stop_module == "layer2" and plan.roles["student"].stop_module is None


def test_parameters_and_flops_are_those_of_the_layers():
    plan = planned(BASE)
    weights = [64 * 10, 10 * 10, 10 * 10, 10 * 4]
    assert plan.roles["student"].parameters == sum(weights) + 10 + 10 + 10 + 4
    assert plan.roles["student"].flops == 2 * sum(weights)
    assert plan.roles["student"].trainable_parameters == plan.roles["student"].parameters and plan.roles["teacher"].trainable_parameters == 0


def test_flops_of_a_role_that_stops_early_are_of_what_it_runs():
    """The teacher's last feature is layer2: layer3 and the classifier never run, and what goes out is the whole."""
    run, whole = [64 * 14, 14 * 14], [14 * 14, 14 * 4]
    teacher = planned(BASE).roles["teacher"]
    assert teacher.flops == 2 * sum(run) and teacher.full_forward_flops == 2 * sum(run + whole)
    read = planned(BASE.replace("teacher: layer2", "teacher: logits")).roles["teacher"]
    assert read.flops == read.full_forward_flops == teacher.full_forward_flops
    before = planned(BASE.replace("teacher: layer2", "teacher: layer2/in")).roles["teacher"]
    assert before.flops == 2 * 64 * 14


def test_flops_of_resnet20_are_the_published_ones():
    """0.041 G multiply-adds of one 32x32 image: He et al. 2015, as counted in many tables."""
    data = "dataset: {type: synthetic, shape: [3, 32, 32], classes: 100, samples: 200}\n"
    plan = planned(
        "student: resnet20\nterms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n", data=data
    )
    assert 81.4e6 < plan.roles["student"].flops < 82.0e6


def test_memory_grows_with_the_batch_by_what_the_backward_keeps():
    small, large = planned(BASE, "batch_size=16"), planned(BASE, "batch_size=32")
    per_row = (large.memory_bytes - small.memory_bytes) / 16
    inputs, hidden = 64, 10
    # Every linear layer keeps its input and every ReLU its output; these are the same tensors.
    least = 4 * (inputs + 3 * hidden)
    assert least <= per_row <= 4 * least


def test_memory_does_not_multiply_the_weights_with_the_batch():
    """Weights that a layer keeps for its backward are there once, however large the batch."""
    wide = BASE.replace("hidden: 10", "hidden: 600")
    plan = planned(wide, "batch_size=64")
    own = plan.roles["student"].parameters + plan.roles["teacher"].parameters + plan.term_parameters["hint"]
    trained = plan.roles["student"].trainable_parameters + plan.term_parameters["hint"]
    activations = 64 * 4 * (64 + 3 * 600) * 4
    assert plan.memory_bytes <= 4 * own + 8 * trained + activations


def test_planning_reads_no_data_and_computes_nothing(monkeypatch):
    from kdbench.data.datasets.synthetic import Synthetic

    monkeypatch.setattr(Synthetic, "load", lambda self: pytest.fail("the plan read data"))
    before = torch.get_rng_state()
    planned(BASE)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_cannot_live_on_meta_is_planned_on_the_cpu(monkeypatch):
    from helpers import plugin_parts

    original = plugin_parts.Layers.__init__

    def reads(self, *args, **kwargs):
        original(self, *args, **kwargs)
        float(torch.ones(1).sum())  # impossible on meta

    monkeypatch.setattr(plugin_parts.Layers, "__init__", reads)
    assert planned(BASE).roles["student"].features[Feature("layer1")] == (10,)


def test_a_feature_path_that_does_not_exist_is_told_with_its_place_and_the_nearest():
    said = told(BASE.replace("path: layer1", "path: layr1"))
    assert "own.yaml:7" in said and "'layr1'" in said and "Did you mean 'layer1'" in said


def test_a_call_that_never_comes():
    said = told(BASE.replace("teacher: layer2", "teacher: layer2@2"))
    assert "own.yaml:7" in said and "layer2@2" in said and "called 1 time" in said


def test_a_teacher_with_other_classes_under_kd():
    said = told(BASE.replace("  hint:", "  kd: kd\n  hint:").replace("hidden: 14", "num_classes: 7"))
    assert "own.yaml:7 terms.kd" in said and "4 classes" in said and "7" in said


def test_operands_that_cannot_be_compared():
    said = told(BASE.replace("{path: layer1, adapter: linear}", "{path: layer1, adapter: identity}"))
    assert "own.yaml:7" in said and "[10]" in said and "[14]" in said
    said = told(BASE.replace("  hint:", "  picky: t_picky\n  hint:"))
    assert "own.yaml:7 terms.picky" in said and "compares apples only" in said


def test_what_a_terms_constructor_refuses_has_its_place():
    said = told(BASE.replace("  hint:", "  kd: {type: kd, temperature: 0}\n  hint:"))
    assert said.startswith("own.yaml:7 terms.kd: ") and "temperature must be above 0" in said


def test_what_a_models_constructor_refuses_has_its_place():
    said = told(BASE.replace("hidden: 10", 'hidden: 10, norm: ""').replace("t_layers, hidden: 14", "t_refusing"))
    assert "own.yaml:4 teacher" in said and "depth" in said


def test_nothing_to_update():
    said = told(
        BASE.replace("hidden: 10}", "hidden: 10}, freeze: [layer1, layer2, layer3, fc]").replace("  hint", "  # hint")
    )
    assert "nothing to update" in said and "ce" in said


def test_all_weights_zero():
    said = told(
        BASE.replace("ce: cross_entropy", "ce: {type: cross_entropy, weight: 0}").replace("weight: 2", "weight: 0")
    )
    assert "own.yaml:6 terms.ce" in said and "every term has weight 0" in said


def test_a_term_that_reads_labels_of_a_source_without_them():
    said = told(
        """
        models: {generator: {model: t_generator, input: noise.z}}
        student: {model: t_layers, input: "generator:image"}
        data: {noise: {type: gaussian, shape: [6], samples: 64}}
        terms: {ce: cross_entropy}
        optimizer: {type: SGD, lr: 0.1}
        epochs: 1
        """
    )
    assert "terms" in said and "'label'" in said and "'noise'" in said and "index, z" in said


def test_rows_of_different_sources_cannot_be_compared():
    said = told(
        """
        student: t_layers
        teacher: {model: t_layers, input: other.image}
        data: {other: {dataset: {type: synthetic, shape: [1, 8, 8], classes: 4, samples: 32}}}
        terms: {kd: kd}
        optimizer: {type: SGD, lr: 0.1}
        epochs: 1
        """
    )
    assert "terms.kd" in said and "'train'" in said and "'other'" in said


NORMED = BASE.replace("hidden: 10", "hidden: 10, norm: batch")


@pytest.mark.parametrize(
    ("text", "samples", "extra", "world"),
    [
        (NORMED.replace("batch_size: 16", "batch_size: 1"), 64, "", 1),
        (NORMED, 65, "", 1),
        (
            NORMED,
            72,
            "validation: 0.125\n",
            1,
        ),  # 63 are left: 3 batches of 16 and 15
        (NORMED, 34, "", 2),  # two ranks of 16, and one row for each
        (NORMED, 33, "", 2),
        (NORMED, 33, "sync_batchnorm: true\n", 2),
    ],
)
def test_a_batch_of_one_row_under_batchnorm(text, samples, extra, world):
    data = SYNTHETIC_DATA.replace("64", str(samples))
    if "validation" in extra:
        planned(text + extra, data=data)
        extra, data = "validation: 8\n", SYNTHETIC_DATA.replace("64", "73")  # 65 are left
    said = told(text + extra, data=data, world_size=world)
    assert "own.yaml" in said and "batch of one row" in said and "BatchNorm" in said


@pytest.mark.parametrize(
    ("text", "samples", "extra", "world"),
    [
        (BASE.replace("batch_size: 16", "batch_size: 1"), 64, "", 1),  # no BatchNorm
        (NORMED, 66, "", 1),
        (NORMED, 73, "validation: 9\n", 1),
        (NORMED, 35, "", 2),  # two rows on each rank, one of them repeated
        (NORMED, 34, "sync_batchnorm: true\n", 2),
    ],
)
def test_other_remainders_are_no_mistake(text, samples, extra, world):
    assert planned(text + extra, data=SYNTHETIC_DATA.replace("64", str(samples)), world_size=world).updates


def test_the_network_that_is_planned_is_the_one_that_is_built():
    run = build_stage(BASE)
    assert {f"student.{n}" for n, _ in run.model().named_parameters()} | {
        f"terms.hint.{n}" for n, _ in run.network.term("hint").named_parameters()
    } == set(run.plan.updates[0].parameters) | set(run.plan.updates[0].unreached_parameters)
    assert isinstance(run.network.term("hint").edges[0].adapter, nn.Module)
    assert_close(sum(p.numel() for p in run.model().parameters()), run.plan.roles["student"].parameters)


@pytest.mark.parametrize("subset", ["", "subset: 30", "subset: 0.5"])
@pytest.mark.parametrize("validation", ["", "validation: 8\n", "validation: 0.25\n"])
def test_the_plan_knows_how_many_samples_training_will_have(subset, validation):
    text = BASE.replace("batch_size: 16\n", "batch_size: 4\n" + validation)
    loaded = recipe_from_text(text + (f"data: {{train: {{{subset}}}}}\n" if subset else ""))
    assert stage_plan(loaded).specs["train"].samples == build_stage(loaded).sources["train"].num_samples


def test_a_parameter_that_no_network_can_have_is_told_with_its_place():
    with pytest.raises(ConfigError, match=r"own\.yaml:2 student\.model: the model cannot be built .*negative"):
        stage_plan(recipe_from_text("student: {model: {type: t_layers, hidden: -4}}\nterms: {ce: cross_entropy}\n" + END))


END = "optimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
