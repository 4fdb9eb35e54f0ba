"""Gradients summed over ranks, whenever a bucket is sent; errors of one rank reach all. Two gloo processes."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers.plugin_parts import Blocks
from helpers.recipes import TESTS, subprocess_environment, torchrun_command
from helpers.sharding import needs_sharding
from helpers.two_ranks import images, network, rows
from kdbench.engine.distributed.gradients import GradientReducer, _buckets
from kdbench.engine.distributed.world import World


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Runs `helpers/two_ranks.py`; returns the result of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = torchrun_command(str(TESTS / "helpers" / "two_ranks.py"), str(folder))
    process = subprocess.run(
        command, env=subprocess_environment(), cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def expected_gradients(*, skip_head: bool = False) -> list[Tensor]:
    """Computes the gradients of one process with the rows of both ranks."""
    model = network()
    for rank in range(2):
        used = model[:3] if skip_head and rank == 1 else model
        for batch in rows(rank):
            used(batch).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("buckets", ["small", "one bucket"])
def test_reduced_gradients_equal_one_process_with_all_rows(results, buckets):
    for rank in results:
        assert_close(rank[buckets][0], expected_gradients(), rtol=1e-12, atol=1e-12)


def test_all_buckets_are_sent_during_the_backward(results):
    parameters = list(network().parameters())
    for rank in results:
        assert rank["small"][1] == len(_buckets(parameters, 1)) == len(parameters)
        assert rank["one bucket"][1] == len(_buckets(parameters, 2**20)) == 1


def test_reduction_that_starts_with_the_first_micro_batch_is_wrong(results):
    """Negative control: the gradients were incomplete when they were sent."""
    for rank in results:
        assert not torch.allclose(rank["too early"][0][0], expected_gradients()[0], rtol=1e-3)


def test_rank_without_some_gradients_takes_part_with_zeros(results):
    for rank, overlapped in zip(results, (6, 0), strict=True):  # the head is the first bucket; rank 1 does not run it
        assert_close(rank["uneven"][0], expected_gradients(skip_head=True), rtol=1e-12, atol=1e-12)
        assert rank["uneven"][1] == overlapped


def block_gradients() -> dict[str, Tensor]:
    """Computes the gradients of `Blocks` for a loss on its second block, in one process with the images of both."""
    torch.manual_seed(0)
    model = Blocks().double()
    for rank in range(2):
        model.blocks[:2](model.stem(images(rank))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_sharding
def test_gradients_of_a_sharded_network_equal_one_process(results):
    """The loss is on the output of a middle block; the layers after it have no gradient, or zeros."""
    expected = block_gradients()
    for rank in results:
        gradients = rank["sharded"]["gradients"]
        assert set(expected) <= set(gradients)
        for name, value in gradients.items():
            assert_close(value, expected.get(name, torch.zeros_like(value)), rtol=1e-12, atol=1e-12)
    parameters = sum(p.numel() for p in Blocks().parameters())
    local_sizes = [rank["sharded"]["local_size"] for rank in results]
    assert sum(local_sizes) == parameters and max(local_sizes) < 0.6 * parameters


@needs_sharding
def test_mean_over_shards_is_another_gradient(results):
    """Negative control: the default of FSDP."""
    for rank in results:
        for name, value in block_gradients().items():
            assert_close(rank["mean"]["gradients"][name], value / 2, rtol=1e-12, atol=1e-12)


@needs_sharding
def test_norm_covers_sharded_and_plain_tensors(results):
    values = [value.flatten() for value in block_gradients().values()]
    flat = torch.cat([*values, torch.full((3,), 2.0, dtype=torch.float64)])
    for rank in results:
        assert_close(rank["sharded"]["norm"], flat.norm(), rtol=1e-12, atol=0)
        assert_close(rank["sharded"]["largest"], flat.abs().max(), rtol=1e-12, atol=0)
        assert_close(rank["sharded"]["clipped"], torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)


def test_error_of_one_rank_is_raised_on_all(results):
    first, second = (rank["errors"] for rank in results)
    assert first == ["the folder is locked", "process 1 of 2: the folder is locked", ""]
    assert second == ["process 0 of 2: the folder is locked", "the folder is locked", ""]


def test_buckets_run_from_the_last_parameter_to_the_first_and_have_one_dtype():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)]
    parameters.append(torch.nn.Parameter(torch.zeros(1).double()))
    buckets = [[id(parameter) for parameter in bucket] for bucket in _buckets(parameters, 20)]
    assert buckets == [[id(parameters[3])], [id(parameters[2]), id(parameters[1])], [id(parameters[0])]]


def test_single_process_registers_no_hooks():
    model = network()
    reducer = GradientReducer(list(model.parameters()), World())
    reducer.prepare_for_backward()
    reducer.finish()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
