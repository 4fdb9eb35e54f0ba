"""Who is measured, on what, and which epoch was the best."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdbench.config.schema import PartConfig, Recipe, RoleConfig, StageConfig
from kdbench.data.loading.source import Source
from kdbench.engine.distributed.world import World
from kdbench.engine.evaluation.evaluate import evaluate, predict_logits
from kdbench.engine.evaluation.metrics import MetricSet, higher_is_better
from kdbench.engine.evaluation.records import EvaluationLog, PredictionSamples
from kdbench.engine.network.network import Network, RoleChain
from kdbench.engine.network.roles import upstream_role
from kdbench.engine.plan.plan import StagePlan
from kdbench.engine.train.loop import History
from kdbench.engine.train.runner import Runner
from kdbench.errors import TrainingError

SPLIT_NAMES = {"validation": "validation", "eval": "test"}
"""Source -> what its split is called in logs and summaries, in the order in which they choose the best epoch."""


EXTRA_SPLIT_PREFIX = "eval_"
"""A source whose name begins so is measured besides, under the rest of its name: `old`, `new`, `forget`, `retain`."""


INDEX_FIELD = "index"
"""The field that says where a sample stands in its own split: the same number in another split is another sample."""


FIGURE_SAMPLES = 8  # samples in the picture of predictions


class Evaluator:
    """Evaluates the roles of one stage and keeps the history.

    The exported role (and its average, called `ema`) is measured after an epoch on the validation part, when there is
    one, and on the test split; the first of these chooses the best epoch. A frozen role that sees the data itself is
    measured once, before training. A role with a second input, such as the mask of an autoencoder, is not measured.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        plan: StagePlan,
        sources: Mapping[str, Source],
        world: World,
        device: torch.device,
        log: EvaluationLog,
        history: History,
    ) -> None:
        self.recipe, self.stage, self.plan, self.sources = recipe, stage, plan, sources
        self.world, self.device, self.log, self.history = world, device, log, history
        self.splits = {n: split for n, split in SPLIT_NAMES.items() if n in sources and sources[n].classes}
        self.splits |= {n: n[len(EXTRA_SPLIT_PREFIX) :] for n in sources if n.startswith(EXTRA_SPLIT_PREFIX) and sources[n].classes}
        if stage.roles[stage.export].extra_inputs:  # an evaluation shows images alone
            self.splits = {}
        if stage.export in plan.resolved_stage.unmeasured:
            self.splits = {}
        teacher = agreement_teacher(stage)
        self.teacher = (
            teacher if teacher is not None and upstream_role(teacher) is None and not teacher.extra_inputs else None
        )

    def evaluate_frozen_roles(self, network: Network, step: int) -> dict[str, dict[str, float]]:
        """Measures the frozen roles on the test split, and refuses one below the accuracy that the recipe states.

        Raises:
            TrainingError: a role is worse than it must be.
        """
        measured: dict[str, dict[str, float]] = {}
        for name in self.plan.resolved_stage.order:
            config = self.stage.roles[name]
            if (
                config.mode != "frozen"
                or upstream_role(config) is not None
                or "eval" not in self.splits
                or config.extra_inputs
            ):
                continue
            if self.sources[self.plan.resolved_stage.sources[name]].classes != self.sources["eval"].classes:
                continue
            scores = self._measure(network.role(name).model, config, "eval", network, None)
            self._log(name, "test", scores, epoch=0, step=step)
            self.history.frozen[name] = {"test": scores}
            measured[name] = scores
            _check_required(config, scores)
        return measured

    def evaluate_trained_roles(self, runner: Runner, epoch: int, step: int) -> bool:
        """Measures the exported role and its average; says whether this epoch is the best so far."""
        metrics: dict[str, dict[str, dict[str, float]]] = {}
        for role, model in self._moving(runner).items():
            config = self.stage.roles.get(role, self.stage.roles[self.stage.export])
            for source, split in self.splits.items():
                scores = self._measure(model, config, source, runner.network, runner)
                metrics.setdefault(role, {})[split] = scores
                self._log(role, split, scores, epoch, step)
        record = {"stage": self.stage.name, "epoch": epoch, "step": step, "metrics": metrics}
        self.history.evaluations.append(record)
        if not self.splits:
            return False
        split = next(iter(self.splits.values()))
        scores = metrics[self.stage.export][split]
        by = "top1" if "top1" in scores else next(iter(scores))
        best = self.history.best.get(self.stage.name)
        if best is not None:
            old = best["metrics"][self.stage.export][split][by]
            if not (scores[by] > old if higher_is_better(by) else scores[by] < old):
                return False
        self.history.best[self.stage.name] = {**record, "chosen_on": split, "by": by}
        return True

    def has_evaluated(self, stage: str) -> bool:
        return any(record["stage"] == stage for record in self.history.evaluations)

    def final_evaluation(self, runner: Runner, step: int) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Adds what is measured once, at the end: agreement on the training split, classes apart, the pictures."""
        role, config = self.stage.export, self.stage.roles[self.stage.export]
        last = self.history.evaluations[-1] if self.history.evaluations else {"metrics": {}, "epoch": 0}
        moving = {name: dict(splits) for name, splits in last["metrics"].items()}
        source = self.plan.train_source
        models = self._moving(runner)
        if self.sources[source].classes and not config.extra_inputs:
            for name, model in models.items():
                if name not in (role, "ema"):
                    continue
                scores = self._measure(model, config, source, runner.network, runner)
                moving.setdefault(name, {})["train"] = scores
                self._log(name, "train", scores, last["epoch"], step)
        if "eval" in self.splits:
            detail = MetricSet(["per_class", "confusion"], len(self.sources["eval"].classes), self.device)
            scores = self._measure(models[role], config, "eval", runner.network, runner, detail)
            self._log(role, "test", scores, last["epoch"], step)
            samples = self._samples(models[role], runner.network)
            self.log.figures(step, confusion=detail.confusion(), samples=samples, split="test")
        return {"moving": moving, "frozen": self.history.frozen}

    def example_input(self) -> Tensor:
        """One image of the test split (or of the training split), to time a forward with."""
        source = self.sources.get("eval") or self.sources[self.plan.train_source]
        return next(iter(source.evaluation_batches(1)))["image"][0]

    def _moving(self, runner: Runner) -> dict[str, nn.Module]:
        models = {name: self._answers(name, runner.network) for name in (self.stage.export, *self.stage.evaluate)}
        if runner.average is not None:
            models["ema"] = runner.average
        return models

    def _answers(self, name: str, network: Network) -> nn.Module:
        """What is evaluated for a role: its model, behind the roles that it sees where those see images too.

        What sees the images that a generator makes of noise, or a bank keeps, is shown the evaluation's images instead.
        """
        config = self.stage.roles[name]
        noise = self.plan.specs[self.plan.resolved_stage.sources[name]].classes is None
        if upstream_role(config) is None or noise or self._root(config) == INDEX_FIELD:
            return network.role(name).model
        return RoleChain(network, name)

    def _root(self, config: RoleConfig) -> str:
        """The field of a source at the root of what a role sees."""
        while (upstream := upstream_role(config)) is not None:
            config = self.stage.roles[upstream]
        return config.input.split(".", 1)[1]

    def _field(self, config: RoleConfig) -> str:
        """What a role is shown of an evaluation's sample."""
        root = self._root(config)
        return "image" if root == INDEX_FIELD else root

    def _measure(
        self,
        model: nn.Module,
        config: RoleConfig,
        source: str,
        network: Network,
        runner: Runner | None,
        metrics: MetricSet | None = None,
    ) -> dict[str, float]:
        classes = len(self.sources[source].classes)
        names = self.stage.metrics or tuple(PartConfig(type=n) for n in ("top1", "top5", "nll", "ece", "agreement"))
        teacher = network.role(self.teacher.name).model if self.teacher is not None else None
        return evaluate(
            model,
            self.sources[source],
            metrics or MetricSet(names, classes, self.device),
            field=self._field(config),
            teacher=teacher if runner is not None and teacher is not model else None,
            teacher_field=self._field(self.teacher) if self.teacher is not None else "image",
            batch_size=self.stage.eval_batch_size,
            **({"autocast": runner.autocast} if runner is not None else {}),
            world=self.world,
        )

    def _log(self, role: str, split: str, scores: Mapping[str, float], epoch: int, step: int) -> None:
        self.log.evaluation(
            {
                "stage": self.stage.name,
                "epoch": epoch,
                "step": step,
                "split": split,
                "role": role,
                "metrics": scores,
            }
        )

    def _samples(self, model: nn.Module, network: Network) -> PredictionSamples:
        batch = next(iter(self.sources["eval"].evaluation_batches(FIGURE_SAMPLES)))
        images = batch["image"]
        teacher = network.role(self.teacher.name).model if self.teacher is not None else None
        return {
            "image": images.cpu(),
            "label": batch["label"].cpu(),
            "student": predict_logits(model, images).cpu(),
            "teacher": predict_logits(teacher, images).cpu() if teacher is not None else None,
        }


def agreement_teacher(stage: StageConfig) -> RoleConfig | None:
    """The first role that teaches the exported one: what agreement is measured with."""
    for term in stage.terms.values():
        for edge in term.edges:
            taught = edge.student.kind == "role" and edge.student.role == stage.export
            if not taught or edge.teacher is None or edge.teacher.kind != "role" or edge.teacher.role == stage.export:
                continue
            if stage.roles[edge.teacher.role].mode != "reuse":
                return stage.roles[edge.teacher.role]
    return None


def _check_required(config: RoleConfig, scores: Mapping[str, float]) -> None:
    """Raises TrainingError when a frozen role misses a value of `require:`."""
    for metric, least in config.require.items():
        if metric not in scores:
            known = ", ".join(scores)
            raise TrainingError(
                f"{config.location}: `require` names {metric!r}, which is not measured; measured: {known}"
            )
        value, higher = scores[metric], higher_is_better(metric)
        if not (value >= least if higher else value <= least):
            raise TrainingError(
                f"{config.location}: role {config.name!r} reaches {metric} {value:.2f} on the test split; `require` asks "
                f"for {'at least' if higher else 'at most'} {least:g}. Check its weights and the normalisation of its "
                "input before anything is distilled from it."
            )
