"""Reductions of losses of the spaces `row`, `batch` and `model`, compared with plain loops over entries and ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdbench.data.loading.batch import Batch
from kdbench.engine.distributed.world import World
from kdbench.engine.network.terms import REDUCTIONS, ReductionContext, RowMask

ROWS, POSITIONS = 6, 5
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def seeded_generator():
    GENERATOR.manual_seed(3)


def random_values(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR, dtype=torch.float64) + 0.1


def random_mask(*shape: int) -> Tensor:
    """Returns a mask with valid and invalid entries."""
    mask = torch.rand(*shape, generator=GENERATOR) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def context_of(
    fields: dict[str, Tensor],
    count: int = 1,
    *,
    reads_label: bool = False,
    mask_field: str | None = None,
    weight: Tensor | None = None,
    applies_weight: bool = True,
    fraction: float = 1.0,
    couples: bool = False,
    world: World = World(),  # noqa: B008
) -> ReductionContext:
    mask = RowMask(reads_label, mask_field)
    return ReductionContext(Batch(fields), mask, weight, applies_weight, count, fraction, couples, world)


def loop_over_entries(loss: Tensor, is_valid: Tensor, weights: Tensor) -> float:
    """Returns the weighted mean over valid entries; the divisor counts entries and contains no weight.

    Args:
        loss: (rows, positions). is_valid: (rows, positions). weights: (rows,).
    """
    total, count = 0.0, 0
    for row, position in itertools.product(range(loss.shape[0]), range(loss.shape[1])):
        if is_valid[row, position]:
            total += float(weights[row]) * float(loss[row, position])
            count += 1
    return total / count


MASKS = {
    "none": (),
    "rows": ("valid",),
    "labelled rows": ("valid", "labelled"),
    "positions": ("inside",),
    "rows and positions": ("valid", "labelled", "inside"),
}


@pytest.mark.parametrize("names", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("positions", [1, POSITIONS])
@pytest.mark.parametrize("weights", ["none", "stored", "computed", "both"])
def test_row_reduction_equals_a_loop_over_valid_entries(names, positions, weights):
    loss = random_values(ROWS, positions)
    fields = {"image": torch.zeros(ROWS, 1)}
    is_valid, row_weights = torch.ones(ROWS, positions, dtype=torch.bool), torch.ones(ROWS, dtype=torch.float64)
    for name in names:
        mask = random_mask(ROWS, positions) if name == "inside" else random_mask(ROWS)
        fields[name] = mask
        is_valid &= mask if name == "inside" else mask[:, None]
    computed = random_values(ROWS) if weights in ("computed", "both") else None
    if computed is not None:
        row_weights = row_weights * computed
    if weights in ("stored", "both"):
        fields["weight"] = random_values(ROWS)
        row_weights = row_weights * fields["weight"]
    assert is_valid.any()
    mask_field = "inside" if "inside" in names else None
    # A mask of rows counts rows; the reduction multiplies by the positions of a row.
    count = int(is_valid.sum()) if mask_field else int(is_valid[:, 0].sum())
    context = context_of(fields, count, reads_label="labelled" in names, mask_field=mask_field, weight=computed)
    # A term without positions returns (rows,); a mask of positions needs them.
    shaped = loss if positions > 1 or mask_field else loss.squeeze(1)
    expected = loop_over_entries(loss, is_valid, row_weights)
    assert float(REDUCTIONS["row"](shaped, context)) == pytest.approx(expected, rel=1e-12)
    if names or weights != "none":  # control: masks and weights have an effect
        assert float(loss.mean()) != pytest.approx(expected, rel=1e-6)


def test_invalid_entries_that_are_not_finite_leave_value_and_gradient_finite():
    for mask_field, mask in ((None, random_mask(ROWS)), ("inside", random_mask(ROWS, POSITIONS))):
        loss = random_values(ROWS, POSITIONS)
        expanded = mask if mask.dim() == 2 else mask[:, None].expand(ROWS, POSITIONS)
        expected = loop_over_entries(loss, expanded, torch.ones(ROWS))
        with_inf = loss.masked_fill(~expanded, torch.inf).requires_grad_()
        count = int(mask.sum())
        context = context_of({mask_field or "valid": mask}, count, mask_field=mask_field)
        value = REDUCTIONS["row"](with_inf, context)
        value.backward()
        assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
        assert with_inf.grad is not None and with_inf.grad.isfinite().all()
        assert not with_inf.grad[~expanded].any() and with_inf.grad[expanded].all()
        product = (with_inf.detach() * expanded).sum()  # control: a product with the mask is not finite
        assert not product.isfinite()


def test_labels_mask_only_terms_that_read_them():
    labelled, loss = random_mask(ROWS), random_values(ROWS)
    masked = REDUCTIONS["row"](loss, context_of({"labelled": labelled}, int(labelled.sum()), reads_label=True))
    unmasked = REDUCTIONS["row"](loss, context_of({"labelled": labelled}, ROWS))
    assert_close(masked, loss[labelled].mean())
    assert_close(unmasked, loss.mean())


def test_stored_weight_is_not_applied_again_after_a_term_that_reads_it():
    loss, fields = random_values(ROWS), {"weight": random_values(ROWS)}
    assert_close(REDUCTIONS["row"](loss, context_of(fields, ROWS, applies_weight=False)), loss.mean())
    assert_close(REDUCTIONS["row"](loss, context_of(fields, ROWS)), (loss * fields["weight"]).mean())  # control


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (1, 6, 2)])
def test_row_reductions_of_micro_batches_add_up_to_that_of_the_effective_batch(sizes):
    rows = sum(sizes)
    loss, valid = random_values(rows, POSITIONS), random_mask(rows)
    count = int(valid.sum())
    total = REDUCTIONS["row"](loss, context_of({"valid": valid}, count))
    parts = list(zip(loss.split(sizes), valid.split(sizes), strict=True))
    sums = [REDUCTIONS["row"](part, context_of({"valid": mask}, count)) for part, mask in parts]
    assert_close(sum(sums), total, rtol=1e-12, atol=0)
    means = [REDUCTIONS["row"](part, context_of({"valid": mask}, max(int(mask.sum()), 1))) for part, mask in parts]
    assert not torch.isclose(sum(means) / len(sizes), total, rtol=1e-3)  # control: a mean of means


class Ranks:
    """Two processes that hold three rows each; gathers tensors without communication."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shards: list[tuple[Tensor, ...]] = []
        monkeypatch.setattr("kdbench.engine.network.terms.all_gather_rows", self.gather)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Distributes the rows of a tensor."""
        self.shards.append(tensor.split(ROWS // 2))
        return self.shards[-1]

    def gather(self, tensor: Tensor, world: World) -> Tensor:
        """Returns the rows of both processes."""
        [shards] = [shards for shards in self.shards if any(tensor is shard for shard in shards)]
        return torch.cat(shards)


def test_coupled_rows_of_two_ranks_add_up_to_the_reduction_of_all_rows(monkeypatch):
    loss, valid, weight = random_values(ROWS), random_mask(ROWS), random_values(ROWS)
    count = int(valid.sum())
    expected = loop_over_entries(loss[:, None], valid[:, None], weight)
    ranks = Ranks(monkeypatch)
    totals = [
        # Every rank has computed the losses of all rows, and knows mask and weight of its own rows.
        REDUCTIONS["row"](
            loss, context_of({"valid": mask}, count, weight=row_weights, couples=True, world=World(rank, 2))
        )
        for rank, mask, row_weights in zip((0, 1), ranks.split(valid), ranks.split(weight), strict=True)
    ]
    assert float(sum(totals)) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("kdbench.engine.network.terms.all_gather_rows", lambda tensor, world: tensor)
    with pytest.raises(RuntimeError):  # control: mask and weight of half of the rows do not fit
        REDUCTIONS["row"](loss, context_of({"valid": valid[:3]}, count, couples=True, world=World(0, 2)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_losses_of_all_ranks_add_up_to_the_loss(size):
    loss = random_values(1)[0]
    fields = {"valid": random_mask(ROWS), "weight": random_values(ROWS)}  # a batch term applies both itself
    contexts = [context_of(fields, 3, couples=True, world=World(rank, size)) for rank in range(size)]
    total = sum(float(REDUCTIONS["batch"](loss, context)) for context in contexts)
    assert total == pytest.approx(float(loss), rel=1e-12)
    undivided = sum(float(REDUCTIONS["model"](loss, context)) for context in contexts)
    assert (undivided == pytest.approx(float(loss))) is (size == 1)  # control: a reduction that ignores the ranks


@pytest.mark.parametrize(("micro_batches", "size"), [(1, 1), (3, 1), (1, 2), (4, 2)])
def test_model_losses_of_all_micro_batches_and_ranks_add_up_to_the_loss(micro_batches, size):
    loss = random_values(1)[0]
    fields = {"image": torch.zeros(ROWS, 1)}
    contexts = [
        context_of(fields, 99, fraction=1 / (micro_batches * size), world=World(rank, size))
        for rank, _ in itertools.product(range(size), range(micro_batches))
    ]
    total = sum(float(REDUCTIONS["model"](loss, context)) for context in contexts)
    assert total == pytest.approx(float(loss), rel=1e-12)
    per_rank = sum(float(REDUCTIONS["batch"](loss, context)) for context in contexts)
    # Control: a reduction that ignores the micro-batches.
    assert (per_rank == pytest.approx(float(loss))) is (micro_batches == 1)
