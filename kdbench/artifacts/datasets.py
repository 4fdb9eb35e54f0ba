"""Datasets that a stage makes: labels of a teacher, stored crops with soft labels, images of a generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS
from kdbench.terms.base import check_parameters


def artifact_class_names(pool: SampleOutputs, classes: int) -> list[str]:
    """The names of the evaluation source's classes, where the logits are over them; else numbers."""
    names = list(pool.context.classes)
    return names if len(names) == classes else [str(number) for number in range(classes)]


def check_logits(facts: ArtifactContext, name: str) -> None:
    """Raises ValueError when an operand is not one vector of classes per sample."""
    shape = facts.shapes.get(name)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"reads logits, one vector of classes per sample, but {name} is {list(shape)} per sample")


@ARTIFACTS.register(
    "pseudo_labels", produces="dataset", operands=("teacher",), operand_list="teacher", fields=("soft",), labels=True
)
class PseudoLabels(ArtifactBuilder):
    """The samples that a teacher (or several) labels with confidence, labelled so.

    label = argmax of the teachers' mean softmax. A sample is kept when its probability is at least `threshold`
    (Lee, Pseudo-Label, ICML workshop 2013; the threshold as in FixMatch, arXiv:2001.07685), and with `agreement: true`
    only when every teacher's argmax is that label. The field `soft` keeps the probabilities.

    teacher: logits (samples, classes), or a list of such operands. keep_labels: samples that the source has a label of
    keep it, whatever the teachers say, with a one-hot `soft`. per_class: this many pseudo-labelled samples of every
    class, the most certain ones first, again from the first where there are too few: the balance of Noisy Student
    (Xie et al., CVPR 2020, arXiv:1911.04252). A class that no sample passes for stays empty.
    """

    def __init__(
        self,
        threshold: float = 0.0,
        agreement: bool = False,
        keep_labels: bool = False,
        per_class: int | None = None,
    ) -> None:
        check_parameters("pseudo_labels", "in [0, 1]", threshold=threshold)
        if per_class is not None:
            check_parameters("pseudo_labels", "at least 1", per_class=per_class)
        self.threshold, self.agreement, self.keep_labels = threshold, agreement, keep_labels
        self.per_class = per_class

    def check(self, facts: ArtifactContext) -> None:
        teachers = [name for name in facts.shapes if name.startswith("teacher")]
        for name in teachers:
            check_logits(facts, name)
        if self.agreement and len(teachers) < 2:
            raise ValueError("asks for agreement, which one teacher always has; give a list of teachers")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        teachers = pool.operand_names("teacher")
        found = pool.gather(*teachers, "image", "label", "index", "labelled")
        each = torch.stack([found[name].float().softmax(-1) for name in teachers])
        soft = each.mean(0)
        confidence, label = soft.max(-1)
        keep = confidence >= self.threshold
        if self.agreement:
            keep &= (each.argmax(-1) == label).all(0)
        own = found["label"] >= 0
        own &= found.get("labelled", torch.ones_like(own))
        if self.keep_labels:
            label = torch.where(own, found["label"], label)
            certain = torch.nn.functional.one_hot(label, soft.shape[-1]).to(soft.dtype)
            soft = torch.where(own[:, None], certain, soft)
            keep |= own
        if not keep.any():
            raise ConfigError(f"pseudo_labels: none of {len(keep)} samples passes (threshold {self.threshold})")
        rows = keep.nonzero().flatten()
        told = {"kept": len(rows), "of": len(keep), "threshold": self.threshold}
        if self.per_class is not None:
            known = own if self.keep_labels else torch.zeros_like(own)
            rows = self._balance_classes(keep & ~known, confidence, label, soft.shape[-1])
            told["samples"] = len(rows) + int(known.sum())
            rows = torch.cat([known.nonzero().flatten(), rows])
        return {
            **pool.image_entries(found["index"][rows], found["image"][rows]),
            "labels": label[rows],
            "fields": {"soft": soft[rows]},
            "classes": artifact_class_names(pool, soft.shape[-1]),
            "summary": told,
        }

    def _balance_classes(self, keep: Tensor, confidence: Tensor, label: Tensor, classes: int) -> Tensor:
        """Rows among `keep`, `per_class` of every class that is there, the most certain first and over again."""
        assert self.per_class is not None
        order = torch.where(keep, confidence, -1.0).sort(descending=True, stable=True).indices
        order = order[keep[order]]
        own = [order[label[order] == c] for c in range(classes)]
        parts = [rows.repeat(-(-self.per_class // len(rows)))[: self.per_class] for rows in own if len(rows)]
        return torch.cat(parts) if parts else order


@ARTIFACTS.register("soft_labels", produces="dataset", operands=("teacher",), fields=("soft",), labels=True)
class SoftLabels(ArtifactBuilder):
    """Crops stored with the teacher's probabilities, so that later training needs no teacher: FKD and FerKD.

    Each image gives `crops` samples, augmented as the source's training view augments it in epochs 0, 1, ... (0: one
    sample, as evaluation sees it); the images are stored as the network saw them. FKD: Shen and Xing, A Fast Knowledge
    Distillation Framework for Visual Recognition, ECCV 2022, arXiv:2112.01528.

    FerKD (Shen, ICCV 2023, arXiv:2312.17473) recalibrates by the teacher's confidence p, its largest probability: below
    `low` the crop shows nothing of its class and is left out; from `low` to `high` it is hard, and its soft label is
    the true label, smoothed: (1 - smoothing) one-hot + smoothing / classes; from `high` on the teacher's own soft label
    stays. A hard crop of a sample without a label is left out. The released code has only soft labels that were
    processed already, so this follows the text. SelfMix is an augmentation, no part of this.

    teacher: logits (samples, classes). temperature: of the stored softmax.
    """

    def __init__(
        self,
        crops: int = 0,
        low: float = 0.0,
        high: float = 0.0,
        smoothing: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        check_parameters("soft_labels", "at least 0", crops=crops)
        check_parameters("soft_labels", "in [0, 1]", low=low, high=high, smoothing=smoothing)
        check_parameters("soft_labels", "above 0", temperature=temperature)
        if high < low:
            raise ConfigError(f"soft_labels: high ({high}) must not be below low ({low})")
        self.crops, self.low, self.high = crops, low, high
        self.smoothing, self.temperature = smoothing, temperature

    def check(self, facts: ArtifactContext) -> None:
        check_logits(facts, "teacher")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {"images": [], "labels": [], "soft": []}
        told = {"soft": 0, "hard": 0, "left out": 0}
        for epoch in range(self.crops) if self.crops else [None]:
            found = pool.gather("teacher", "image", "label", "index", "valid", epoch=epoch)
            real = found.get("valid", torch.ones(len(found["index"]), dtype=torch.bool))
            order = found["index"].sort(stable=True).indices
            order = order[real[order]]
            logits, image, label = (found[name][order] for name in ("teacher", "image", "label"))
            soft, keep, hard = self.calibrate(logits, label)
            told["hard"] += int((keep & hard).sum())
            told["soft"] += int((keep & ~hard).sum())
            told["left out"] += int((~keep).sum())
            for name, value in (("images", image), ("labels", label), ("soft", soft)):
                parts[name].append(value[keep])
        images, labels, soft = (torch.cat(parts[name]) for name in ("images", "labels", "soft"))
        if not len(images):
            raise ConfigError(f"soft_labels: no crop is left (low {self.low}, high {self.high})")
        return {
            "images": images,
            "labels": torch.where(labels >= 0, labels, soft.argmax(-1)),
            "fields": {"soft": soft},
            "classes": artifact_class_names(pool, soft.shape[-1]),
            "mean": None,
            "std": None,
            "summary": told,
        }

    def calibrate(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The soft labels (samples, classes), which samples stay, and which of them have their true label instead."""
        confidence = logits.float().softmax(-1).amax(-1)
        soft = (logits.float() / self.temperature).softmax(-1)
        hard = confidence < self.high
        classes = soft.shape[-1]
        smooth = torch.nn.functional.one_hot(label.clamp(min=0), classes) * (1 - self.smoothing)
        soft = torch.where(hard[:, None], smooth + self.smoothing / classes, soft)
        keep = (confidence >= self.low) & ~(hard & (label < 0))
        return soft, keep, hard


@ARTIFACTS.register("generate", produces="dataset", operands=("image", "teacher"), fields=("soft",))
class GeneratedDataset(ArtifactBuilder):
    """What a generator makes of noise becomes a dataset, labelled by a teacher.

    label = argmax of the teacher's softmax, which the field `soft` keeps. The source is what the generator sees: noise,
    which gives as many samples as its dataset says, or images, each of which is made into one. `threshold` leaves out
    what the teacher is less sure of, and `balanced: true` keeps equally many of every class that comes at all, the most
    certain ones.

    image: what is stored, such as generator:image. teacher: logits (samples, classes) of it.
    """

    def __init__(self, threshold: float = 0.0, balanced: bool = False) -> None:
        check_parameters("generate", "in [0, 1]", threshold=threshold)
        self.threshold, self.balanced = threshold, balanced

    def check(self, facts: ArtifactContext) -> None:
        check_logits(facts, "teacher")

    def __call__(self, pool: SampleOutputs) -> dict[str, Any]:
        found = pool.gather("image", "teacher")
        soft = found["teacher"].float().softmax(-1)
        confidence, label = soft.max(-1)
        keep = confidence >= self.threshold
        if not keep.any():
            raise ConfigError(f"generate: none of {len(keep)} images passes (threshold {self.threshold})")
        counts = torch.bincount(label[keep], minlength=soft.shape[-1])
        if self.balanced:
            each = int(counts[counts > 0].min())
            sure = torch.where(keep, confidence, -1.0).sort(descending=True, stable=True).indices
            kept = [sure[label[sure] == c][: min(each, int(counts[c]))] for c in range(soft.shape[-1])]
            rows = torch.cat(kept).sort().values
        else:
            rows = keep.nonzero().flatten()
        told = {"kept": len(rows), "of": len(keep), "classes": int((counts > 0).sum()), "threshold": self.threshold}
        return {
            "images": found["image"][rows].contiguous(),
            "labels": label[rows],
            "fields": {"soft": soft[rows]},
            "classes": artifact_class_names(pool, soft.shape[-1]),
            "mean": None,
            "std": None,
            "summary": told,
        }
