"""Batches: rows of a source, their selection, and precomputed features that replace the forward of a role."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from helpers.plugin_parts import CALLS
from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.engine.network.features import Feature

LOGITS, HIDDEN = ("teacher", Feature("logits")), ("teacher", Feature("layer1"))


def sample_batch(rows: int = 7) -> Batch:
    """Returns a batch whose tensors contain their row numbers."""
    numbers = torch.arange(rows)
    return Batch(
        {"image": numbers[:, None].repeat(1, 3).float(), "label": numbers},
        {LOGITS: numbers[:, None].repeat(1, 2) * 10.0, HIDDEN: numbers[:, None] * 100.0},
    )


def row_numbers(batch: Batch) -> list[list[int]]:
    """Returns the row numbers that each tensor of `sample_batch` contains."""
    return [
        batch.fields["image"][:, 0].int().tolist(),
        batch.fields["label"].tolist(),
        (batch.precomputed[LOGITS][:, 0] / 10).int().tolist(),
        (batch.precomputed[HIDDEN][:, 0] / 100).int().tolist(),
    ]


def test_size_is_the_number_of_rows_of_fields_or_of_precomputed_features():
    assert sample_batch(7).size == 7 and sample_batch(1).size == 1
    assert Batch({"image": torch.zeros(4, 9, 2)}).size == 4
    assert Batch({}, {LOGITS: torch.zeros(5, 2)}).size == 5
    padded = Batch({"image": torch.zeros(4, 2), "valid": torch.tensor([True, True, False, False])})
    assert padded.size == 4


@pytest.mark.parametrize("rows", [slice(3), slice(2, 5), slice(1, None, 2), slice(0, 0)])
def test_slice_takes_the_same_rows_of_every_tensor_as_views(rows):
    batch = sample_batch()
    sliced = batch.slice(rows)
    expected = list(range(7))[rows]
    assert row_numbers(sliced) == [expected] * 4 and sliced.size == len(expected)
    if expected:
        batch.fields["label"][expected[0]] = 99
        assert sliced.fields["label"][0] == 99  # a view, no copy
    assert row_numbers(batch.slice(slice(1, 6))) != [expected] * 4  # control


@pytest.mark.parametrize("rows", [[0, 3, 6], [6, 0, 3], [2, 2, 2], []])
def test_select_takes_the_same_rows_of_every_tensor_in_the_given_order(rows):
    batch = sample_batch()
    selected = batch.select(torch.tensor(rows, dtype=torch.int64))
    assert row_numbers(selected) == [rows] * 4
    batch.fields["label"].fill_(99)
    assert selected.fields["label"].tolist() == rows  # a copy
    assert set(selected.precomputed) == {LOGITS, HIDDEN}


def test_with_fields_adds_and_replaces_fields_in_a_new_batch():
    batch = sample_batch()
    new_label = torch.zeros(7, dtype=torch.int64)
    extended = batch.with_fields({"weight": torch.ones(7), "label": new_label})
    assert extended.fields["label"] is new_label and extended.fields["image"] is batch.fields["image"]
    assert set(extended.fields) == {"image", "label", "weight"} and extended.precomputed is batch.precomputed
    assert set(batch.fields) == {"image", "label"} and batch.fields["label"].tolist() == list(range(7))


def test_with_precomputed_adds_and_replaces_features_in_a_new_batch():
    batch = sample_batch()
    new_logits, further = torch.zeros(7, 2), ("second", Feature("logits"))
    extended = batch.with_precomputed({LOGITS: new_logits, further: torch.ones(7)})
    assert extended.precomputed[LOGITS] is new_logits and set(extended.precomputed) == {LOGITS, HIDDEN, further}
    assert extended.fields is batch.fields
    assert batch.precomputed[LOGITS] is not new_logits and further not in batch.precomputed


def test_batches_share_no_mapping_of_precomputed_features():
    first = Batch({"label": torch.zeros(2)}).with_precomputed({LOGITS: torch.zeros(2, 2)})
    assert first.precomputed and not Batch({"label": torch.zeros(2)}).precomputed


TWO_ROLES = """
student: {model: {type: t_layers, label: student}}
teacher: {model: {type: t_layers, label: teacher, hidden: 9}}
models: {second: {model: {type: t_layers, label: second}, frozen: true}}
terms:
  kd: {type: kd, teacher: [teacher, second]}
  hint: {type: hint, student: {path: layer1, adapter: linear}, teacher: layer1}
optimizer: {type: SGD, lr: 0.1}
precision: float64
epochs: 2
batch_size: 16
"""


def with_features(stage: StageHarness, batches: MicroBatch, role: str, scale: float = 1.0) -> MicroBatch:
    """Adds all features of a frozen role, times a factor, to the batch of its source."""
    values = stage.network.run_frozen(batches, [role])
    features = {key: scale * value for key, value in values.items()}
    return {**batches, "train": batches["train"].with_precomputed(features)}


def take_step(stage: StageHarness, batches: MicroBatch) -> set[str]:
    """Takes a step and returns the roles that ran."""
    CALLS.clear()
    stage.runner.begin_step()
    stage.runner.step([batches])
    return {call.split(".")[0] for call in CALLS}


def test_role_with_precomputed_features_does_not_run_and_one_without_does():
    plain, precomputed = build_stage(TWO_ROLES), build_stage(TWO_ROLES)
    batches = next(plain.windows())[0]
    assert take_step(plain, batches) == {"student", "teacher", "second"}
    extended = with_features(precomputed, batches, "teacher")
    assert set(extended["train"].precomputed) == {LOGITS, HIDDEN}
    assert take_step(precomputed, extended) == {"student", "second"}
    assert equal_weights(plain.weights(), precomputed.weights())


def test_step_reads_the_precomputed_values():
    """Negative control of the test above: other features give other weights."""
    plain, scaled = build_stage(TWO_ROLES), build_stage(TWO_ROLES)
    batches = next(plain.windows())[0]
    take_step(plain, batches)
    assert take_step(scaled, with_features(scaled, batches, "teacher", scale=2.0)) == {"student", "second"}
    assert not equal_weights(plain.weights(), scaled.weights())


def test_features_of_several_roles_are_precomputed_independently():
    stage = build_stage(TWO_ROLES)
    batches = next(stage.windows())[0]
    both = with_features(stage, with_features(stage, batches, "teacher"), "second")
    assert take_step(stage, both) == {"student"}


def test_selected_rows_of_precomputed_features_equal_features_of_selected_rows():
    stage = build_stage(TWO_ROLES)
    batches = next(stage.windows())[0]
    rows = torch.tensor([5, 1, 12])
    selected = with_features(stage, batches, "teacher")["train"].select(rows)
    expected = with_features(stage, {"train": batches["train"].select(rows)}, "teacher")["train"]
    for key, value in expected.precomputed.items():
        assert_close(selected.precomputed[key], value, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(selected.precomputed[LOGITS], expected.precomputed[LOGITS].flip(0))  # control
