"""Builders of dataset artifacts: pseudo-labels, stored crops with soft labels, generated images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.artifacts.base import ArtifactBuilder, ArtifactContext, SampleOutputs
from kdbench.errors import ConfigError
from kdbench.registry import ARTIFACTS
from kdbench.terms.base import check_parameters


def artifact_class_names(context: ArtifactContext, classes: int) -> list[str]:
    """Returns the class names of a dataset artifact.

    The names are those of the evaluation source if it has `classes` classes, and numbers otherwise.
    """
    names = list(context.classes)
    return names if len(names) == classes else [str(number) for number in range(classes)]


def check_logits_operand(context: ArtifactContext, name: str) -> None:
    """Raises ValueError if an operand does not have one value per class for each sample."""
    shape = context.shapes.get(name)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"reads logits, one value per class, but operand {name} has shape {list(shape)} per sample")


def rows_by_confidence(keep: Tensor, confidence: Tensor, label: Tensor, classes: int) -> list[Tensor]:
    """Returns one int64 tensor per class: the numbers of its kept rows, in descending order of confidence.

    The sort is stable.
    """
    order = torch.where(keep, confidence, -1.0).sort(descending=True, stable=True).indices
    order = order[keep[order]]
    return [order[label[order] == number] for number in range(classes)]


@ARTIFACTS.register(
    "pseudo_labels", produces="dataset", operands=("teacher",), operand_list="teacher", fields=("soft",), labels=True
)
class PseudoLabels(ArtifactBuilder):
    """Samples with confident pseudo-labels from one or several teachers.

    label = argmax p, confidence = max p, where p is the mean softmax of the teachers. A sample is kept if its
    confidence is at least `threshold`. Pseudo-labels: Lee, Pseudo-Label, ICML workshop 2013. Threshold: FixMatch,
    arXiv:2001.07685. The field `soft` contains p.

    Operands:
        teacher: logits (samples, classes), or a list of such operands.

    Args:
        threshold: minimum confidence, in [0, 1].
        agreement: whether a sample is kept only if the argmax of every teacher is its pseudo-label; needs several
            teachers.
        keep_labels: whether samples with a visible label are always kept, with their label and a one-hot `soft`.
        per_class: number of pseudo-labelled samples per class, in descending order of confidence. The samples of a
            smaller class are repeated in that order; a class without samples stays empty. This is the balancing of
            Noisy Student (Xie et al., CVPR 2020, arXiv:1911.04252). Null: each sample once.

    Example (recipe):
        artifacts: {pseudo: {type: pseudo_labels, teacher: teacher, threshold: 0.9}}
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

    def check(self, context: ArtifactContext) -> None:
        teachers = [name for name in context.shapes if name.startswith("teacher")]
        for name in teachers:
            check_logits_operand(context, name)
        if self.agreement and len(teachers) < 2:
            raise ValueError("has agreement: true, which needs at least two teachers; give a list of teachers")

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        teachers = outputs.operand_names("teacher")
        values = outputs.gather(*teachers, "image", "label", "index", "labelled")
        probabilities = torch.stack([values[name].float().softmax(-1) for name in teachers])
        soft = probabilities.mean(0)
        confidence, label = soft.max(-1)
        keep = confidence >= self.threshold
        if self.agreement:
            keep &= (probabilities.argmax(-1) == label).all(0)
        has_label = values["label"] >= 0
        has_label &= values.get("labelled", torch.ones_like(has_label))
        if self.keep_labels:
            label = torch.where(has_label, values["label"], label)
            one_hot = F.one_hot(label, soft.shape[-1]).to(soft.dtype)
            soft = torch.where(has_label[:, None], one_hot, soft)
            keep |= has_label
        if not keep.any():
            raise ConfigError(
                f"pseudo_labels: none of {len(keep)} samples has a confidence of at least the threshold "
                f"{self.threshold}"
            )
        rows = keep.nonzero().flatten()
        summary = {"kept": len(rows), "candidates": len(keep), "threshold": self.threshold}
        if self.per_class is not None:
            # Labelled samples come first and once each; only pseudo-labelled ones are balanced.
            labelled = has_label if self.keep_labels else torch.zeros_like(has_label)
            rows = self._balance_classes(rows_by_confidence(keep & ~labelled, confidence, label, soft.shape[-1]))
            summary["samples"] = len(rows) + int(labelled.sum())
            rows = torch.cat([labelled.nonzero().flatten(), rows])
        return {
            **outputs.image_entries(values["index"][rows], values["image"][rows]),
            "labels": label[rows],
            "fields": {"soft": soft[rows]},
            "classes": artifact_class_names(outputs.context, soft.shape[-1]),
            "summary": summary,
        }

    def _balance_classes(self, class_rows: list[Tensor]) -> Tensor:
        """Returns `per_class` row numbers for every class that has rows. Rows of a smaller class are repeated."""
        assert self.per_class is not None
        parts = [rows.repeat(-(-self.per_class // len(rows)))[: self.per_class] for rows in class_rows if len(rows)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@ARTIFACTS.register("soft_labels", produces="dataset", operands=("teacher",), fields=("soft",), labels=True)
class SoftLabels(ArtifactBuilder):
    """Augmented crops with stored probabilities of the teacher, for stages without a teacher (FKD, FerKD).

    FKD: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022, arXiv:2112.01528.
    The images are stored as the network saw them. The field `soft` contains softmax(teacher / temperature).

    FerKD (Shen, ICCV 2023, arXiv:2312.17473) calibrates the soft labels by the teacher's confidence p = max
    softmax(teacher):

        p < low            the crop is dropped, because it shows too little of its class
        low <= p < high    hard crop: soft = (1 - smoothing) * one-hot label + smoothing / classes
        p >= high          soft = softmax(teacher / temperature)

    A hard crop of a sample without a label is dropped. This class follows the paper's text, because the released code
    contains only processed soft labels. SelfMix, an augmentation of FerKD, is not included.

    Operands:
        teacher: logits (samples, classes).

    Args:
        crops: number of crops per image, augmented as in the training epochs 0, 1, ...; 0: one evaluation view per
            image.
        low: confidence below which a crop is dropped.
        high: confidence from which the teacher's soft label is stored; at least `low`.
        smoothing: label smoothing of hard crops, in [0, 1].
        temperature: temperature of the stored softmax, above 0.

    Example (recipe):
        artifacts: {crops: {type: soft_labels, teacher: teacher, crops: 8, low: 0.3, high: 0.6}}
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

    def check(self, context: ArtifactContext) -> None:
        check_logits_operand(context, "teacher")

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {"images": [], "labels": [], "soft": []}
        summary = {"soft": 0, "hard": 0, "dropped": 0}
        for epoch in range(self.crops) if self.crops else [None]:
            values = outputs.gather("teacher", "image", "label", "index", "valid", epoch=epoch)
            valid = values.get("valid", torch.ones(len(values["index"]), dtype=torch.bool))
            # Training epochs are shuffled; sorting by index stores every epoch in the same order.
            order = values["index"].sort(stable=True).indices
            order = order[valid[order]]
            logits, image, label = (values[name][order] for name in ("teacher", "image", "label"))
            soft, keep, hard = self.calibrate(logits, label)
            summary["hard"] += int((keep & hard).sum())
            summary["soft"] += int((keep & ~hard).sum())
            summary["dropped"] += int((~keep).sum())
            for name, value in (("images", image), ("labels", label), ("soft", soft)):
                parts[name].append(value[keep])
        images, labels, soft = (torch.cat(parts[name]) for name in ("images", "labels", "soft"))
        if not len(images):
            raise ConfigError(
                f"soft_labels: every crop is dropped, because its confidence is below low ({self.low}), or because it "
                "is a hard crop of a sample without a label"
            )
        return {
            "images": images,
            "labels": torch.where(labels >= 0, labels, soft.argmax(-1)),
            "fields": {"soft": soft},
            "classes": artifact_class_names(outputs.context, soft.shape[-1]),
            "mean": None,
            "std": None,
            "summary": summary,
        }

    def calibrate(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the soft labels of FerKD from the teacher's logits.

        Args:
            logits: teacher logits (samples, classes).
            label: int64 (samples,); negative for a sample without a label.

        Returns:
            Three tensors: the soft labels (samples, classes); a boolean mask (samples,) of the samples to store; and
                a
            boolean mask (samples,) of the hard samples, whose soft label is the smoothed true label.
        """
        confidence = logits.float().softmax(-1).amax(-1)
        soft = (logits.float() / self.temperature).softmax(-1)
        hard = confidence < self.high
        classes = soft.shape[-1]
        smooth = F.one_hot(label.clamp(min=0), classes) * (1 - self.smoothing)
        soft = torch.where(hard[:, None], smooth + self.smoothing / classes, soft)
        keep = (confidence >= self.low) & ~(hard & (label < 0))
        return soft, keep, hard


@ARTIFACTS.register("generate", produces="dataset", operands=("image", "teacher"), fields=("soft",))
class GeneratedImages(ArtifactBuilder):
    """Generated images with the teacher's pseudo-labels.

    label = argmax p with p = softmax(teacher). The field `soft` contains p. One image is generated per sample of the
    source, which is the generator's input (noise or images).

    Operands:
        image: images to store, such as generator:image.
        teacher: logits (samples, classes) on these images.

    Args:
        threshold: minimum confidence max p, in [0, 1].
        balanced: keep the same number of images of every class that occurs, in descending order of confidence.

    Example (recipe):
        artifacts: {images: {type: generate, source: noise, image: "generator:image", teacher: teacher}}
    """

    def __init__(self, threshold: float = 0.0, balanced: bool = False) -> None:
        check_parameters("generate", "in [0, 1]", threshold=threshold)
        self.threshold, self.balanced = threshold, balanced

    def check(self, context: ArtifactContext) -> None:
        check_logits_operand(context, "teacher")

    def __call__(self, outputs: SampleOutputs) -> dict[str, Any]:
        values = outputs.gather("image", "teacher")
        soft = values["teacher"].float().softmax(-1)
        confidence, label = soft.max(-1)
        keep = confidence >= self.threshold
        if not keep.any():
            raise ConfigError(
                f"generate: none of {len(keep)} images has a confidence of at least the threshold {self.threshold}"
            )
        counts = torch.bincount(label[keep], minlength=soft.shape[-1])
        if self.balanced:
            per_class = int(counts[counts > 0].min())
            class_rows = rows_by_confidence(keep, confidence, label, soft.shape[-1])
            rows = torch.cat([rows[:per_class] for rows in class_rows]).sort().values
        else:
            rows = keep.nonzero().flatten()
        return {
            "images": values["image"][rows].contiguous(),
            "labels": label[rows],
            "fields": {"soft": soft[rows]},
            "classes": artifact_class_names(outputs.context, soft.shape[-1]),
            "mean": None,
            "std": None,
            "summary": {
                "kept": len(rows),
                "candidates": len(keep),
                "classes": int((counts > 0).sum()),
                "threshold": self.threshold,
            },
        }
