"""What the runner minimises: sum(mask * weight * loss) / the number of valid entries of the whole effective batch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from helpers.plugin_parts import CALLS
from helpers.recipes import build_stage, equal_weights, plugin_registration, recipe_from_text, stage_plan  # noqa: F401
from kdbench.data.loading.batch import Batch
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


def loss_of(run, batch, terms=None, share=1.0) -> Tensor:
    terms = terms or list(run.network.terms)
    counts = run.network.valid_counts([batch], terms)
    return run.network(batch, counts, run.network.wiring(terms, run.plan.updates[0].config.models), share)[0]


@pytest.mark.parametrize("labels", ["", "label_fraction: 20\n"], ids=["all labels", "20 labels"])
def test_accumulation_equals_the_whole_batch(labels):
    whole = build_stage(BASE + labels)
    parts_of = build_stage(BASE.replace("batch_size: 32", "batch_size: 8") + "accumulate: 4\n" + labels)
    assert whole.runner.progress.steps_per_epoch == parts_of.runner.progress.steps_per_epoch == 2
    whole.step(6)
    parts_of.step(6)
    for name, value in whole.weights().items():
        assert_close(parts_of.weights()[name], value, rtol=1e-12, atol=1e-13)
    one, other = whole.runner.read_log()[0], parts_of.runner.read_log()[0]
    assert_close(torch.tensor(list(one.losses.values())), torch.tensor(list(other.losses.values())), rtol=1e-6, atol=0)


def test_a_mean_of_means_would_give_other_weights():
    """Negative control: with few labels, micro-batches have different numbers of them."""
    run = build_stage(BASE.replace("batch_size: 32", "batch_size: 8") + "accumulate: 4\nlabel_fraction: 20\n")
    window = next(run.windows())
    term = run.network.term("ce")
    counts = [int(term.count([batch["train"]], World())) for batch in window]
    assert len(set(counts)) > 1 and int(term.count([b["train"] for b in window], World())) == sum(counts)


def test_the_last_window_of_an_epoch_is_divided_by_what_it_holds():
    run = build_stage(BASE.replace("batch_size: 32", "batch_size: 12") + "accumulate: 4\n")  # 64 = 48 + 12 + 4
    first, last = itertools.islice(run.windows(), 2)
    assert [len(b["train"].fields["label"]) for b in first] == [12] * 4
    assert [len(b["train"].fields["label"]) for b in last] == [12, 4]
    assert run.network.valid_counts(last, ["kd"]) == {"kd": 16}


def test_hidden_labels_equal_left_out_rows():
    run = build_stage(BASE + "label_fraction: 20\n")
    batch = next(run.windows())[0]
    fields = batch["train"].fields
    kept = fields["labelled"]
    assert 0 < int(kept.sum()) < len(kept)
    logits = run.model()(fields["image"][kept])
    assert_close(loss_of(run, batch, ["ce"]), 0.3 * F.cross_entropy(logits, fields["label"][kept]))


def test_where_masks_a_term_like_left_out_rows():
    run = build_stage(BASE.replace("kd: {type: kd,", "kd: {type: kd, mask: labelled,") + "label_fraction: 20\n")
    batch = next(run.windows())[0]
    fields = batch["train"].fields
    few = {"train": batch["train"].select(fields["labelled"].nonzero().squeeze(1))}
    assert_close(loss_of(run, batch, ["kd"]), loss_of(run, few, ["kd"]), rtol=1e-12, atol=0)
    everywhere = build_stage(BASE + "label_fraction: 20\n")
    assert abs(loss_of(everywhere, batch, ["kd"]) - loss_of(run, batch, ["kd"])) > 1e-8


def test_where_names_a_field_that_exists():
    with pytest.raises(ConfigError, match=r"own.yaml:.*'kd'.*labeled"):
        build_stage(BASE.replace("kd: {type: kd,", "kd: {type: kd, mask: labeled,") + "label_fraction: 20\n")


def test_padded_rows_count_nowhere_even_when_their_loss_is_not_finite():
    run = build_stage(BASE)
    batch = next(run.windows())[0]
    fields = {name: value.clone() for name, value in batch["train"].fields.items()}
    fields["valid"] = torch.arange(len(fields["label"])) < 20
    fields["image"][20:] = torch.inf
    cut = {"train": batch["train"].slice(slice(20))}
    padded = loss_of(run, {"train": Batch(fields)})
    assert_close(padded, loss_of(run, cut), rtol=1e-12, atol=0)


def test_no_valid_row_gives_zero_and_not_nan():
    run = build_stage(BASE + "label_fraction: 20\n")
    batch = next(run.windows())[0]
    batch["train"].fields["labelled"] = torch.zeros_like(batch["train"].fields["labelled"])
    assert loss_of(run, batch, ["ce"]).item() == 0


def test_row_weights_multiply_and_the_count_stays():
    run = build_stage(BASE)
    batch = next(run.windows())[0]
    plain = loss_of(run, batch, ["kd"])
    batch["train"].fields["weight"] = torch.full((32,), 0.25, dtype=torch.float64)
    assert_close(loss_of(run, batch, ["kd"]), 0.25 * plain)


def test_several_edges_are_summed():
    run = build_stage(
        BASE.replace("kd: {type: kd, weight: 0.7}", "kd: {type: kd, weight: 0.7, student: [student, student]}")
    )
    single = build_stage(BASE)
    batch = next(run.windows())[0]
    assert_close(loss_of(run, batch, ["kd"]), 2 * loss_of(single, batch, ["kd"]))


def test_a_term_of_constant_weight_zero_is_not_run():
    text = BASE.replace("terms: {", "terms: {counted: {type: t_counted, weight: WEIGHT}, ")
    CALLS.clear()
    off = build_stage(text.replace("WEIGHT", "0")).step()
    assert "term" not in CALLS and "counted" not in off.plan.resolved_stage.terms
    plain = build_stage(BASE).step()
    assert equal_weights(off.weights(), plain.weights())
    CALLS.clear()
    build_stage(text.replace("WEIGHT", "1.0e-9")).step()
    assert "term" in CALLS  # negative control


def test_a_teacher_of_weight_zero_terms_is_not_run():
    text = BASE.replace("teacher: t_layers", "teacher: {model: {type: t_layers, label: teacher}}")
    CALLS.clear()
    run = build_stage(text.replace("weight: 0.7", "weight: 0"))
    CALLS.clear()
    run.step()
    assert not any(call.startswith("teacher") for call in CALLS)
    run = build_stage(text)
    CALLS.clear()
    run.step()
    assert any(call.startswith("teacher") for call in CALLS)


@pytest.mark.parametrize("flag", [False, True])
def test_a_teacher_operand_gets_a_gradient_only_when_asked(flag):
    extra = ", teacher_grad: true" if flag else ""
    run = build_stage(
        f"""
        student: t_layers
        teacher: {{model: t_layers, trainable: true}}
        terms: {{kd: {{type: kd{extra}}}, ce: {{type: cross_entropy, student: [student, teacher]}}}}
        optimizer: {{type: SGD, lr: 0.1}}
        epochs: 1
        """
    )
    batch = next(run.windows())[0]
    loss_of(run, batch, ["kd"]).backward()
    assert (run.model("teacher").fc.weight.grad is not None) is flag
    assert run.model().fc.weight.grad is not None


def test_a_term_coupled_over_the_batch_refuses_accumulation_in_words():
    text = BASE.replace("kd: {type: kd,", "kd: {type: dist,")
    with pytest.raises(ConfigError, match=r"own.yaml:5 terms.kd.*couples the rows.*accumulate: 2"):
        build_stage(text + "accumulate: 2\n")
    build_stage(text)


def test_a_term_over_no_rows_counts_once_per_step_however_it_is_accumulated():
    text = BASE.replace("terms: {", "terms: {own: t_model, ")
    whole, split = build_stage(text), build_stage(text.replace("batch_size: 32", "batch_size: 8") + "accumulate: 4\n")
    for run in (whole, split):
        run.step(2)
    assert_close(
        whole.network.term("own").edges[0].term.value, split.network.term("own").edges[0].term.value, rtol=1e-12, atol=0
    )


def test_the_logged_total_is_the_sum_of_the_weighted_losses_over_the_interval():
    run = build_stage(BASE)
    expected = []
    for window in itertools.islice(run.windows(), 3):
        run.runner.begin_step()
        expected.append(loss_of(run, window[0]).item())
        run.runner.step(window)
    reading, values = run.runner.read_log()
    assert_close(values["total"], sum(expected) / 3, rtol=1e-6, atol=0)
    assert_close(values["terms"]["kd"]["weighted"], 0.7 * values["terms"]["kd"]["loss"], rtol=1e-6, atol=0)
    assert reading.steps == 3 and run.runner.read_log()[0].steps == 0


def test_clip_limits_the_norm_and_reports_the_one_before():
    free, clipped = build_stage(BASE + "log_every: 1\n"), build_stage(BASE + "clip: 0.01\nlog_every: 1\n")
    before = clipped.weights()
    free.step()
    clipped.step()
    norm = float(clipped.runner.eager.grad_norm)
    assert_close(norm, float(free.runner.eager.grad_norm), rtol=1e-9, atol=0)
    assert norm > 0.01
    moved = torch.cat([(clipped.weights()[n] - before[n]).flatten() for n in before]).norm()
    assert_close(float(moved), 0.2 * 0.01, rtol=1e-4, atol=0)
