"""Terms that train gates: load balance and REINFORCE."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from helpers.term_inputs import build_term

GATE = torch.tensor([[0.9, 0.2], [0.5, 0.6]], dtype=torch.float64)
ACTION = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)


def test_balance_is_zero_for_equal_use_and_grows_with_the_imbalance():
    even = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for kind in ("kl", "cv"):
        balance = build_term("load_balance", {"kind": kind})
        assert_close(balance(even), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert balance(torch.tensor([[0.9, 0.1]])) > balance(torch.tensor([[0.6, 0.4]])) > 0


def test_balance_is_finite_for_an_expert_that_is_never_used():
    gate = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = build_term("load_balance")(gate)
    loss.backward()
    assert loss.isfinite() and gate.grad.isfinite().all()


def test_reinforce_is_minus_reward_times_log_likelihood_of_the_actions():
    gate = GATE.clone().requires_grad_()
    reward = torch.tensor([2.0, 3.0], dtype=torch.float64)
    loss = build_term("reinforce", {"of": "reward", "reward_baseline": 0.0})(gate, ACTION, reward)
    expected = [-2 * (math.log(0.9) + math.log(0.8)), -3 * (math.log(0.5) + math.log(0.6))]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), gate)
    assert_close(gradient, torch.tensor([[-2 / 0.9, 2 / 0.8], [-3 / 0.5, -3 / 0.6]], dtype=torch.float64))


def test_loss_is_a_negative_reward_averaged_over_the_chosen_edges():
    losses = torch.tensor([[1.0, 9.0], [2.0, 4.0]], dtype=torch.float64)
    term = build_term("reinforce", {"reward_baseline": 0.0})
    reward_term = build_term("reinforce", {"reward_baseline": 0.0, "of": "reward"})
    assert_close(term(GATE, ACTION, losses), reward_term(GATE, ACTION, torch.tensor([-1.0, -3.0]).double()))
    assert (term(GATE, torch.zeros_like(ACTION), losses) == 0).all(), "no chosen edge"


def test_reward_and_action_get_no_gradient():
    gate, reward = GATE.clone().requires_grad_(), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    action = ACTION.clone().requires_grad_()
    build_term("reinforce", {"reward_baseline": 0.0})(gate, action, reward).sum().backward()
    assert gate.grad.abs().sum() > 0 and reward.grad is None and action.grad is None


def test_reward_baseline_is_a_running_mean_of_earlier_batches_and_in_the_state():
    term = build_term("reinforce", {"of": "reward", "reward_baseline": 0.9}).double()
    likelihood = (ACTION > 0).double() * GATE + (ACTION == 0).double() * (1 - GATE)
    log_pi = likelihood.log().sum(1)
    first, second = torch.tensor([1.0, 3.0]).double(), torch.tensor([5.0, 1.0]).double()
    assert_close(term(GATE, ACTION, first), -(first - 2) * log_pi)
    resumed = build_term("reinforce", {"of": "reward", "reward_baseline": 0.9}).double()
    resumed.load_state_dict(term.state_dict())
    assert_close(term(GATE, ACTION, second), -(second - 2) * log_pi)
    assert_close(resumed(GATE, ACTION, second), -(second - 2) * log_pi)
    assert_close(term.mean_reward, torch.tensor(0.9 * 2 + 0.1 * 3, dtype=torch.float64))


def test_masked_rows_do_not_enter_the_reward_baseline():
    term = build_term("reinforce", {"of": "reward"}).double()
    term(GATE, ACTION, torch.tensor([4.0, float("nan")]).double(), mask=torch.tensor([True, False]))
    assert_close(term.mean_reward, torch.tensor(4.0, dtype=torch.float64))


def test_policy_learns_the_choice_with_the_higher_reward():
    """A bandit: the first of two choices has reward 1, the second -1."""
    torch.manual_seed(0)
    scores = torch.zeros(1, 2, requires_grad=True)
    term = build_term("reinforce", {"of": "reward"})
    optimizer = torch.optim.SGD([scores], lr=0.05)
    for _ in range(200):
        gate = torch.sigmoid(scores).expand(16, 2)
        action = torch.bernoulli(gate.detach())
        optimizer.zero_grad()
        term(gate, action, action[:, 0] - action[:, 1]).mean().backward()
        optimizer.step()
    assert torch.sigmoid(scores)[0, 0] > 0.7 and torch.sigmoid(scores)[0, 1] < 0.3
