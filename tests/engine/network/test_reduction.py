"""The total of a step: sum(mask * weight * loss) / number of valid entries of the whole effective batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from helpers.plugin_parts import CALLS
from helpers.recipes import StageHarness, build_stage, equal_weights, plugin_registration  # noqa: F401
from kdbench.data.loading.batch import Batch, MicroBatch
from kdbench.engine.distributed.world import World
from kdbench.errors import ConfigError

BASE = """
student: t_layers
teacher: t_layers
terms: {ce: {type: cross_entropy, weight: 0.3}, kd: {type: kd, weight: 0.7}}
optimizer: {type: SGD, lr: 0.2, momentum: 0.9}
precision: float64
epochs: 3
batch_size: 32
"""
MICRO_BATCHES = BASE.replace("batch_size: 32", "batch_size: 8") + "accumulate: 4\n"
SOME_LABELS = "label_fraction: 20\n"


def total_loss(stage: StageHarness, batches: MicroBatch, terms: Sequence[str] | None = None) -> Tensor:
    """Returns the weighted total of some terms (all by default) on one effective batch without accumulation."""
    terms = terms or list(stage.network.terms)
    counts = stage.network.valid_counts([batches], terms)
    wiring = stage.network.wiring(terms, stage.plan.updates[0].config.models)
    return stage.network(batches, counts, wiring, 1.0)[0]


@pytest.mark.parametrize("labels", ["", SOME_LABELS], ids=["all labels", "20 labels"])
def test_accumulation_equals_one_large_batch(labels):
    large, accumulated = build_stage(BASE + labels), build_stage(MICRO_BATCHES + labels)
    assert large.runner.progress.steps_per_epoch == accumulated.runner.progress.steps_per_epoch == 2
    large.step(6)
    accumulated.step(6)
    for name, value in large.weights().items():
        assert_close(accumulated.weights()[name], value, rtol=1e-12, atol=1e-13)
    expected, means = large.runner.read_log()[0].losses, accumulated.runner.read_log()[0].losses
    assert_close(torch.tensor(list(expected.values())), torch.tensor(list(means.values())), rtol=1e-6, atol=0)


def test_micro_batches_have_different_numbers_of_labels():
    """Negative control of the test above: a mean of the means of micro-batches would give other weights."""
    stage = build_stage(MICRO_BATCHES + SOME_LABELS)
    window = next(stage.windows())
    term = stage.network.term("ce")
    counts = [int(term.valid_count([batches["train"]], World())) for batches in window]
    assert len(set(counts)) > 1
    assert int(term.valid_count([batches["train"] for batches in window], World())) == sum(counts)


def test_last_window_of_an_epoch_is_divided_by_its_own_size():
    text = BASE.replace("batch_size: 32", "batch_size: 12") + "accumulate: 4\n"  # 64 = 48 + 12 + 4
    stage = build_stage(text)
    first, last = itertools.islice(stage.windows(), 2)
    assert [batches["train"].size for batches in first] == [12] * 4
    assert [batches["train"].size for batches in last] == [12, 4]
    assert stage.network.valid_counts(last, ["kd"]) == {"kd": 16}


def test_rows_without_label_count_like_absent_rows():
    stage = build_stage(BASE + SOME_LABELS)
    batches = next(stage.windows())[0]
    fields = batches["train"].fields
    labelled = fields["labelled"]
    assert 0 < int(labelled.sum()) < len(labelled)
    logits = stage.model()(fields["image"][labelled])
    assert_close(total_loss(stage, batches, ["ce"]), 0.3 * F.cross_entropy(logits, fields["label"][labelled]))


def test_rows_outside_of_the_mask_of_a_term_count_like_absent_rows():
    stage = build_stage(BASE.replace("kd: {type: kd,", "kd: {type: kd, mask: labelled,") + SOME_LABELS)
    batches = next(stage.windows())[0]
    rows = batches["train"].fields["labelled"].nonzero().squeeze(1)
    selected = {"train": batches["train"].select(rows)}
    assert_close(total_loss(stage, batches, ["kd"]), total_loss(stage, selected, ["kd"]), rtol=1e-12, atol=0)
    unmasked = build_stage(BASE + SOME_LABELS)  # negative control
    assert abs(total_loss(unmasked, batches, ["kd"]) - total_loss(stage, batches, ["kd"])) > 1e-8


def test_unknown_mask_field_is_reported():
    with pytest.raises(ConfigError, match=r"own.yaml:.*'kd'.*labeled"):
        build_stage(BASE.replace("kd: {type: kd,", "kd: {type: kd, mask: labeled,") + SOME_LABELS)


def test_padded_rows_count_like_absent_rows_even_if_their_loss_is_not_finite():
    stage = build_stage(BASE)
    batches = next(stage.windows())[0]
    fields = {name: value.clone() for name, value in batches["train"].fields.items()}
    fields["valid"] = torch.arange(len(fields["label"])) < 20
    fields["image"][20:] = torch.inf
    without_padding = {"train": batches["train"].slice(slice(20))}
    padded = total_loss(stage, {"train": Batch(fields)})
    assert_close(padded, total_loss(stage, without_padding), rtol=1e-12, atol=0)


def test_batch_without_valid_row_has_loss_zero_and_not_nan():
    stage = build_stage(BASE + SOME_LABELS)
    batches = next(stage.windows())[0]
    batches["train"].fields["labelled"] = torch.zeros_like(batches["train"].fields["labelled"])
    assert total_loss(stage, batches, ["ce"]).item() == 0


def test_sample_weights_multiply_losses_and_leave_the_count():
    stage = build_stage(BASE)
    batches = next(stage.windows())[0]
    unweighted = total_loss(stage, batches, ["kd"])
    batches["train"].fields["weight"] = torch.full((32,), 0.25, dtype=torch.float64)
    assert_close(total_loss(stage, batches, ["kd"]), 0.25 * unweighted)


def test_losses_of_several_edges_are_summed():
    single = build_stage(BASE)
    two_edges = BASE.replace("kd: {type: kd, weight: 0.7}", "kd: {type: kd, weight: 0.7, student: [student, student]}")
    double = build_stage(two_edges)
    batches = next(double.windows())[0]
    assert_close(total_loss(double, batches, ["kd"]), 2 * total_loss(single, batches, ["kd"]))


def test_term_of_constant_weight_zero_is_not_computed():
    text = BASE.replace("terms: {", "terms: {counted: {type: t_counted, weight: WEIGHT}, ")
    CALLS.clear()
    stage = build_stage(text.replace("WEIGHT", "0")).step()
    assert "term" not in CALLS and "counted" not in stage.plan.resolved_stage.terms
    assert equal_weights(stage.weights(), build_stage(BASE).step().weights())
    CALLS.clear()
    build_stage(text.replace("WEIGHT", "1.0e-9")).step()
    assert "term" in CALLS  # negative control


def test_teacher_of_terms_of_weight_zero_does_not_run():
    text = BASE.replace("teacher: t_layers", "teacher: {model: {type: t_layers, label: teacher}}")
    stage = build_stage(text.replace("weight: 0.7", "weight: 0"))
    CALLS.clear()
    stage.step()
    assert not any(call.startswith("teacher") for call in CALLS)
    stage = build_stage(text)  # negative control
    CALLS.clear()
    stage.step()
    assert any(call.startswith("teacher") for call in CALLS)


@pytest.mark.parametrize("teacher_grad", [False, True])
def test_teacher_operand_gets_a_gradient_only_with_teacher_grad(teacher_grad):
    option = ", teacher_grad: true" if teacher_grad else ""
    stage = build_stage(
        f"""
        student: t_layers
        teacher: {{model: t_layers, trainable: true}}
        terms: {{kd: {{type: kd{option}}}, ce: {{type: cross_entropy, student: [student, teacher]}}}}
        optimizer: {{type: SGD, lr: 0.1}}
        epochs: 1
        """
    )
    batches = next(stage.windows())[0]
    total_loss(stage, batches, ["kd"]).backward()
    assert (stage.model("teacher").fc.weight.grad is not None) is teacher_grad
    assert stage.model().fc.weight.grad is not None


def test_term_that_couples_the_rows_of_a_batch_rejects_accumulation():
    text = BASE.replace("kd: {type: kd,", "kd: {type: dist,")
    with pytest.raises(ConfigError, match=r"own.yaml:5 terms.kd.*couples the rows.*accumulate: 2"):
        build_stage(text + "accumulate: 2\n")
    build_stage(text)


def test_term_over_no_rows_counts_once_per_step_with_and_without_accumulation():
    term = ("terms: {", "terms: {own: t_model, ")
    large, accumulated = build_stage(BASE.replace(*term)), build_stage(MICRO_BATCHES.replace(*term))
    values = [stage.step(2).network.term("own").edges[0].term.value for stage in (large, accumulated)]
    assert_close(*values, rtol=1e-12, atol=0)


def test_logged_total_is_the_sum_of_the_weighted_mean_losses():
    stage = build_stage(BASE)
    expected = []
    for window in itertools.islice(stage.windows(), 3):
        stage.runner.begin_step()
        expected.append(total_loss(stage, window[0]).item())
        stage.runner.step(window)
    means, values = stage.runner.read_log()
    assert_close(values["total"], sum(expected) / 3, rtol=1e-6, atol=0)
    assert_close(values["terms"]["kd"]["weighted"], 0.7 * values["terms"]["kd"]["loss"], rtol=1e-6, atol=0)
    assert means.steps == 3 and stage.runner.read_log()[0].steps == 0


def test_clipping_limits_the_update_and_logs_the_norm_before_clipping():
    free, clipped = build_stage(BASE + "log_every: 1\n"), build_stage(BASE + "clip: 0.01\nlog_every: 1\n")
    before = clipped.weights()
    free.step()
    clipped.step()
    norm = float(clipped.runner.eager.grad_norm)
    assert_close(norm, float(free.runner.eager.grad_norm), rtol=1e-9, atol=0)
    assert norm > 0.01
    step_size = torch.cat([(clipped.weights()[name] - before[name]).flatten() for name in before]).norm()
    assert_close(float(step_size), 0.2 * 0.01, rtol=1e-4, atol=0)
