"""How much a network's answers depend on each of its parameters."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kdbench.engine.features import model_output
from kdbench.engine.readers import feature_of
from kdbench.errors import ConfigError
from kdbench.makers.base import Facts, Maker, Pool
from kdbench.registry import MAKERS


@MAKERS.register("fisher", makes="tensor", operands=("weights",), labels=True)
class Fisher(Maker):
    """The diagonal of the Fisher information of a network's parameters, [parameters]: `fisher` of the term `ewc`.

    value_i = mean over the samples of (d log p(label) / d w_i)^2, one gradient per sample, the network in eval mode,
    its parameters in the order of ROLE:/weights. With `labels: drawn` the label is drawn from the network's own
    prediction, which is the Fisher information; `own` takes that of the sample (the empirical Fisher of most released
    code). In a loop the value of the round before is added: one penalty per task, all of them around the newest
    weights, as in online EWC (Schwarz et al., Progress & Compress, ICML 2018, arXiv:1805.06370, with factor 1).

    Kirkpatrick, Pascanu, Rabinowitz et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017,
    arXiv:1612.00796.

    weights: of the network, student:/weights. It sees the field `image`, and gives logits. keep: the classes among
    which the task decides; null: all. labels: see above.
    """

    def __init__(self, keep: list[int] | None = None, labels: Literal["own", "drawn"] = "drawn") -> None:
        if keep is not None and (not keep or min(keep) < 0):
            raise ConfigError(f"fisher: keep lists class numbers, got {keep}")
        self.keep, self.labels = keep, labels

    def check(self, facts: Facts) -> None:
        if self.keep is not None and max(self.keep) >= len(facts.classes):
            raise ValueError(f"keeps class {max(self.keep)}, but there are {len(facts.classes)} classes from 0 on")

    def __call__(self, pool: Pool) -> dict[str, Any]:
        operand = pool.operands["weights"]
        if operand.side != "weights" or not feature_of(operand).is_output:
            raise ConfigError(
                f"fisher: weights must be those of a whole network, such as student:/weights, got {operand}"
            )
        model = pool.modules[operand.role]
        training = model.training
        model.eval()
        parameters = {name: value.detach().double() for name, value in model.named_parameters()}
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
        draws = torch.Generator().manual_seed(pool.seed)
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        samples = 0

        def surprise(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            log_p = self._log_p(model, parameters, buffers, image.unsqueeze(0))
            return F.nll_loss(log_p, label.unsqueeze(0))

        each = vmap(grad(surprise), in_dims=(None, 0, 0))
        for row in pool.rows():
            images = row["image"].double()
            known = row["label"] >= 0
            if self.labels == "drawn":
                p = self._log_p(model, parameters, buffers, images).exp().cpu()
                label = torch.multinomial(p, 1, generator=draws).squeeze(1).to(images.device)
            else:
                images, label = images[known], row["label"][known]
            for part, own in zip(images.split(32), label.split(32), strict=True):
                for name, gradient in each(parameters, part, own).items():
                    total[name] += gradient.square().sum(0)
            samples += len(images)
        model.train(training)
        value = torch.cat([total[name].reshape(-1) for name in parameters]).float().cpu() / max(samples, 1)
        if pool.previous is not None:
            value = value + pool.previous["value"]
        return {"value": value, "told": {"samples": samples, "mean": float(value.mean())}}

    def _log_p(self, model: nn.Module, parameters: Any, buffers: Any, images: Tensor) -> Tensor:
        logits = model_output(functional_call(model, (parameters, buffers), (images,)))
        if self.keep is not None:
            inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            inside[torch.tensor(self.keep)] = True
            logits = torch.where(inside, logits, -1e4)
        return F.log_softmax(logits, dim=1)

    def shape(self, facts: Facts) -> tuple[int, ...]:
        return facts.shapes["weights"]
