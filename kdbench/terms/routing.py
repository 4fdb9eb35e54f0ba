"""Terms that train what chooses among teachers: gates and policies."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Size, Tensor

from kdbench.registry import TERMS
from kdbench.terms.base import Term, check_logits, check_parameters
from kdbench.terms.numerics import at_least_float32, flatten_and_mask, row_weights, safe_divide, safe_sqrt


@TERMS.register("load_balance", space="batch", version=1, paper="arXiv:2507.07015")
class LoadBalance(Term):
    """Over the batch, a gate uses all its experts alike.

    kind kl: KL(uniform || m) = -log E - 1/E sum_e log m_e, m the mean over the batch of the gate's probabilities, as
    MST-Distill; its code divides by the number of experts E besides: fold that into the weight.
    kind cv: standard deviation over mean of m, with E - 1 below, the other choice of that code.
    The operand is a gate's probabilities: `student: term:NAME.gate`.
    Rows that the mask leaves out count nowhere; a row of weight 2 counts twice in the mean.

    Li et al., MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation, ACM MM 2025,
    arXiv:2507.07015 (weight 1, times 0.9 every 10 epochs).
    Shapes: student probabilities (batch, experts) -> scalar, nats (kl) or without unit (cv).
    """

    def __init__(self, kind: Literal["kl", "cv"] = "kl") -> None:
        super().__init__()
        self.kind = kind

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"], min_classes=2)

    def forward(self, student: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        gate = flatten_and_mask(student, mask)
        counts = row_weights(gate, mask, weight)
        mean = safe_divide((counts.unsqueeze(1) * gate).sum(0), counts.sum())
        experts = mean.shape[0]
        if self.kind == "cv":
            centred = mean - mean.mean()
            return safe_divide(safe_sqrt(centred.square().sum() / (experts - 1)), mean.mean())
        used = counts.sum() > 0
        floor = torch.finfo(mean.dtype).tiny  # an expert that no row uses at all pulls hard, not infinitely
        return -(torch.where(used, mean.clamp(min=floor), 1 / experts) * experts).log().mean()


@TERMS.register(
    "reinforce", space="row", version=1, state=True, operands=("action", "reward"), paper="arXiv:2012.06048"
)
class Reinforce(Term):
    """REINFORCE: choices that were followed by more reward than usual become more likely.

    loss = -(R - b) * sum_e log pi(a_e), a_e = 1 where `action` is above 0, pi(a_e) the gate's probability of that
    choice, R the reward of the sample, b a running mean of rewards. Gradients reach the gate only. The reward is
    minus the operand where that is a loss (`of: loss`); of a loss per edge, (batch, edges), the mean over the chosen
    edges counts (0 where none is). For RL-KD: `student: term:kd.gate, action: term:kd.route, reward: term:kd.loss`, in
    an update of its own after the student's. The paper's rewards are minus the student's losses, and no code is
    released; the running mean, which lowers the variance and not the expectation, is ours: `reward_baseline: 0` omits it.

    Yuan, Shou, Pei, Lin, Gong, Fu and Jiang, Reinforced Multi-Teacher Selection for Knowledge Distillation, AAAI 2021,
    arXiv:2012.06048; Williams, Machine Learning 8, 1992.
    Shapes: student probabilities (batch, edges), action (batch, edges), reward (batch,) or (batch, edges) -> (batch,).
    """

    usual: Tensor
    started: Tensor

    def __init__(self, of: Literal["loss", "reward"] = "loss", reward_baseline: float = 0.9) -> None:
        super().__init__()
        check_parameters("reinforce", "in [0, 1]", baseline=reward_baseline)
        self.sign = -1.0 if of == "loss" else 1.0
        self.reward_baseline = reward_baseline
        self.register_buffer("usual", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def check_shapes(self, **shapes: Size) -> None:
        check_logits("student", shapes["student"])
        if "action" in shapes and shapes["action"] != shapes["student"]:
            raise ValueError(
                f"compares a gate of {list(shapes['student'][1:])} with actions of {list(shapes['action'][1:])}"
            )

    def forward(self, student: Tensor, action: Tensor, reward: Tensor, mask: Tensor | None = None) -> Tensor:
        gate = at_least_float32(student)
        chosen = (action.detach() > 0).to(gate.dtype)
        reward = self.sign * at_least_float32(reward.detach())
        if reward.dim() == 2 and reward.shape[1] == chosen.shape[1]:
            reward = safe_divide((chosen * reward).sum(1), chosen.sum(1))
        reward = reward.reshape(gate.shape[0])
        floor = torch.finfo(gate.dtype).eps
        log_pi = (chosen * gate + (1 - chosen) * (1 - gate)).clamp(min=floor).log().sum(1)
        return -(reward - self._update_reward_baseline(reward, mask)) * log_pi

    def _update_reward_baseline(self, reward: Tensor, mask: Tensor | None) -> Tensor | float:
        """The running mean of rewards before this batch (of this batch, in the first step)."""
        if self.reward_baseline == 0:
            return 0.0
        counts = torch.ones_like(reward) if mask is None else mask.to(reward.dtype)
        mean = safe_divide(torch.where(counts > 0, reward, 0).sum(), counts.sum())
        before = torch.where(self.started, self.usual.to(mean.dtype), mean)
        self.usual.copy_(self.reward_baseline * before + (1 - self.reward_baseline) * mean)
        self.started.fill_(True)
        return before
