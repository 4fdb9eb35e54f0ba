"""Terms that train a gate or a policy: a network that weights or selects teachers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_logits, check_parameters
from kdbench.terms.numerics import at_least_float32, flatten_and_mask, row_weights, safe_divide, safe_sqrt


@TERMS.register("load_balance", space="batch", version=1, paper="arXiv:2507.07015")
class LoadBalance(Term):
    """Load balance of a gate (a network that weights experts): distance of its mean probabilities from uniform.

    kind kl: loss = KL(uniform || m) = -log E - 1/E sum_e log m_e, as in MST-Distill
    kind cv: loss = standard deviation of m (E - 1 in the denominator) / mean of m, as an option of MST-Distill's code

    m are the gate's probabilities, averaged over the batch. E is the number of experts. MST-Distill's code divides kl
    by E once more: include this factor in the weight of the term.

    Args:
        kind: `kl` or `cv`.

    Shape:
        student: probabilities (batch, experts) of a gate, at least 2 experts.
        Returns a scalar, nats (kl) or without unit (cv). A row of weight 2 counts as two rows of weight 1. Masked rows
        do not count.

    Example (recipe):
        balance: {type: load_balance, student: term:kd.gate}

    References:
        Li et al., MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation, ACM MM 2025,
        arXiv:2507.07015 (weight 1, times 0.9 every 10 epochs).
    """

    def __init__(self, kind: Literal["kl", "cv"] = "kl") -> None:
        super().__init__()
        self.kind = kind

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)

    def forward(self, student: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        gate = flatten_and_mask(student, mask)
        weights = row_weights(gate, mask, weight)
        mean = safe_divide((weights.unsqueeze(1) * gate).sum(0), weights.sum())
        experts = mean.shape[0]
        if self.kind == "cv":
            centered = mean - mean.mean()
            return safe_divide(safe_sqrt(centered.square().sum() / (experts - 1)), mean.mean())
        any_valid = weights.sum() > 0
        # The clamp bounds the loss of an expert that no row uses.
        min_probability = torch.finfo(mean.dtype).tiny
        return -(torch.where(any_valid, mean.clamp(min=min_probability), 1 / experts) * experts).log().mean()


@TERMS.register(
    "reinforce", space="row", version=1, state=True, operands=("action", "reward"), paper="arXiv:2012.06048"
)
class Reinforce(Term):
    """REINFORCE: policy gradient of the sampled choices, with a running mean of the rewards as baseline.

    loss = -(R - b) * sum_e log pi(a_e)

    e runs over the choices of a gate (a network that selects, for example, teachers). a_e is 1 (selected) where
    `action` is above 0, and 0 elsewhere. pi(a_e) is the probability of a_e: the gate's output for a_e = 1, and 1 minus
    this output for a_e = 0. R is the reward of the row, and b is a running mean of rewards. Only the gate gets a
    gradient. Rewards per choice, (batch, choices), are averaged over the selected choices; the average is 0 if no
    choice is selected.

    In the paper (RL-KD), rewards are negative losses of the student, and the policy has a separate update after the
    student's update. The code of the paper is not released. The running mean is not in the paper: it lowers the
    variance and does not change the expected gradient.

    Args:
        of: meaning of the operand `reward`. `loss`: the operand is a loss, and R is minus this loss. `reward`: the
            operand is R.
        reward_baseline: momentum of the running mean b, in [0, 1]. With 0 there is no baseline (b = 0).

    Shape:
        student: probabilities (batch, choices). action: (batch, choices). reward: (batch,) or (batch, choices).
        Returns (batch,), units of the reward times nats.

    Example (recipe):
        policy: {type: reinforce, student: term:kd.gate, action: term:kd.route, reward: term:kd.loss}

    References:
        Yuan, Shou, Pei, Lin, Gong, Fu and Jiang, Reinforced Multi-Teacher Selection for Knowledge Distillation, AAAI
        2021, arXiv:2012.06048; Williams, Machine Learning 8, 1992.
    """

    mean_reward: Tensor
    initialised: Tensor

    def __init__(self, of: Literal["loss", "reward"] = "loss", reward_baseline: float = 0.9) -> None:
        super().__init__()
        check_parameters("reinforce", "in [0, 1]", reward_baseline=reward_baseline)
        self.sign = -1.0 if of == "loss" else 1.0
        self.reward_baseline = reward_baseline
        self.register_buffer("mean_reward", torch.zeros(()))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if "action" in shapes and shapes["action"] != shapes["student"]:
            raise ValueError(
                f"compares a gate of shape {list(shapes['student'][1:])} with actions of shape "
                f"{list(shapes['action'][1:])} per sample; both must have one number per choice"
            )

    def forward(self, student: Tensor, action: Tensor, reward: Tensor, mask: Tensor | None = None) -> Tensor:
        gate = at_least_float32(student)
        is_chosen = (action.detach() > 0).to(gate.dtype)
        reward = self.sign * at_least_float32(reward.detach())
        if reward.dim() == 2 and reward.shape[1] == is_chosen.shape[1]:
            reward = safe_divide((is_chosen * reward).sum(1), is_chosen.sum(1))
        reward = reward.reshape(gate.shape[0])
        min_probability = torch.finfo(gate.dtype).eps
        log_pi = (is_chosen * gate + (1 - is_chosen) * (1 - gate)).clamp(min=min_probability).log().sum(1)
        return -(reward - self._update_reward_baseline(reward, mask)) * log_pi

    def _update_reward_baseline(self, reward: Tensor, mask: Tensor | None) -> Tensor | float:
        """Updates the running mean of the rewards with this batch, and returns the mean before the update.

        In the first step, the mean of this batch is returned. Without a baseline, 0 is returned.
        """
        if self.reward_baseline == 0:
            return 0.0
        weights = torch.ones_like(reward) if mask is None else mask.to(reward.dtype)
        batch_mean = safe_divide(torch.where(weights > 0, reward, 0).sum(), weights.sum())
        previous = torch.where(self.initialised, self.mean_reward.to(batch_mean.dtype), batch_mean)
        self.mean_reward.copy_(self.reward_baseline * previous + (1 - self.reward_baseline) * batch_mean)
        self.initialised.fill_(True)
        return previous
