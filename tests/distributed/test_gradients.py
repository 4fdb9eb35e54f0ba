"""The sum of gradients over ranks, whenever a part of it is sent; errors of one rank reach all. Two gloo processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers.recipes import TESTS, subprocess_environment, torchrun_command

sys.path.insert(0, str(Path(__file__).parent))
from helpers.plugin_parts import Blocks
from helpers.sharding import needs_sharding
from helpers.two_ranks import images, network, rows
from kdbench.engine.distributed.gradients import GradientReducer, _buckets
from kdbench.engine.distributed.world import World


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two ranks wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    words = torchrun_command(str(TESTS / "helpers" / "two_ranks.py"), str(folder))
    done = subprocess.run(words, env=subprocess_environment(), cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def expected(*, skip_head: bool = False) -> list[torch.Tensor]:
    """One process with the rows of both."""
    model = network()
    for rank in range(2):
        used = model[:3] if skip_head and rank == 1 else model
        for batch in rows(rank):
            used(batch).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("buckets", ["small", "whole"])
def test_the_sum_is_that_of_one_process_with_all_rows(found, buckets):
    for rank in found:
        assert_close(rank[buckets][0], expected(), rtol=1e-12, atol=1e-12)


def test_every_bucket_leaves_while_the_backward_runs(found):
    parameters = list(network().parameters())
    for rank in found:
        assert rank["small"][1] == len(_buckets(parameters, 1)) == len(parameters)
        assert rank["whole"][1] == len(_buckets(parameters, 2**20)) == 1


def test_a_sum_that_begins_with_the_first_micro_batch_is_wrong(found):
    """The negative control: the gradients were not complete when they were sent."""
    for rank in found:
        assert not torch.allclose(rank["too early"][0][0], expected()[0], rtol=1e-3)


def test_a_rank_whose_backward_leaves_parameters_out_takes_part_all_the_same(found):
    for rank, early in zip(found, (6, 0), strict=True):  # the head is first in order, and rank 1 has none of it
        assert_close(rank["uneven"][0], expected(skip_head=True), rtol=1e-12, atol=1e-12)
        assert rank["uneven"][1] == early


def whole_gradients() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Blocks().double()
    for rank in range(2):
        model.blocks[:2](model.stem(images(rank))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_sharding
def test_gradients_of_a_network_in_parts_are_those_of_one_process(found):
    """Of a loss on the output of a block in the middle; what stands behind it has none, or zeros."""
    expected = whole_gradients()
    for rank in found:
        ours = rank["parted"]["gradients"]
        assert set(expected) <= set(ours)
        for name, value in ours.items():
            assert_close(value, expected.get(name, torch.zeros_like(value)), rtol=1e-12, atol=1e-12)
    parameters = sum(p.numel() for p in Blocks().parameters())
    shares = [rank["parted"]["here"] for rank in found]
    assert sum(shares) == parameters and max(shares) < 0.6 * parameters


@needs_sharding
def test_a_mean_over_the_parts_is_another_gradient(found):
    """The negative control: what FSDP does by itself."""
    for rank in found:
        for name, value in whole_gradients().items():
            assert_close(rank["mean"]["gradients"][name], value / 2, rtol=1e-12, atol=1e-12)


@needs_sharding
def test_the_norm_spans_the_parts_and_what_lies_whole_beside_them(found):
    values = [value.flatten() for value in whole_gradients().values()]
    flat = torch.cat([*values, torch.full((3,), 2.0, dtype=torch.float64)])
    for rank in found:
        assert_close(rank["parted"]["norm"], flat.norm(), rtol=1e-12, atol=0)
        assert_close(rank["parted"]["largest"], flat.abs().max(), rtol=1e-12, atol=0)
        assert_close(rank["parted"]["clipped"], torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)


def test_an_error_of_one_rank_is_told_by_all(found):
    first, second = (rank["told"] for rank in found)
    assert first == ["the folder is locked", "process 1 of 2: the folder is locked", ""]
    assert second == ["process 0 of 2: the folder is locked", "the folder is locked", ""]


def test_buckets_go_from_the_last_parameter_to_the_first_and_hold_one_type():
    sizes = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)] + [torch.nn.Parameter(torch.zeros(1).double())]
    found = [[id(parameter) for parameter in bucket] for bucket in _buckets(sizes, 20)]
    assert found == [[id(sizes[3])], [id(sizes[2]), id(sizes[1])], [id(sizes[0])]]


def test_alone_nothing_is_hooked():
    model = network()
    sums = GradientReducer(list(model.parameters()), World())
    sums.prepare_for_backward()
    sums.finish()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
