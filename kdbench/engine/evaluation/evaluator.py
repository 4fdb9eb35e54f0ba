"""Evaluation of the roles of a stage, and selection of the best epoch."""

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
from kdbench.engine.state.run_state import History
from kdbench.engine.train.runner import Runner
from kdbench.errors import TrainingError

SPLIT_NAMES = {"validation": "validation", "eval": "test"}
"""Source in the recipe -> name of its split in logs. The best epoch is selected on the first split that exists."""


EXTRA_SPLIT_PREFIX = "eval_"
"""Prefix of further sources that are evaluated. The rest of the name is the split, such as `old`, `new`, `forget`."""


INDEX_FIELD = "index"
"""Batch field with the index of a sample in its split. An index in the training split is invalid in another split."""


FIGURE_SAMPLES = 8
"""Number of samples in the figure of predictions."""


DEFAULT_METRICS = ("top1", "top5", "nll", "ece", "agreement")


class Evaluator:
    """Evaluator of the roles (networks) of one stage. The evaluator logs metrics and stores them in the run's history.

    After an epoch, the evaluator evaluates the exported role (the network that is the result of the stage), the
    moving average (`ema`) of this role, and the roles that the recipe lists under `evaluate`. It evaluates them on
    the validation split if the split exists, on the test split, and on the splits of `eval_*` sources. A frozen role
    that reads images directly is evaluated once, before training. A role with a second input, such as the mask of an
    autoencoder, is not evaluated, because evaluation batches contain images only.
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
        self.splits = self._labelled_splits()
        teacher = agreement_teacher(stage)
        has_image_input = teacher is not None and upstream_role(teacher) is None and not teacher.extra_inputs
        self.teacher = teacher if has_image_input else None

    def _labelled_splits(self) -> dict[str, str]:
        """Returns source -> split, for every split on which the exported role (the stage's result) can be evaluated."""
        export = self.stage.export
        if self.stage.roles[export].extra_inputs or export in self.plan.resolved_stage.unmeasured:
            return {}
        splits = {source: split for source, split in SPLIT_NAMES.items() if source in self.sources}
        extra = (source for source in self.sources if source.startswith(EXTRA_SPLIT_PREFIX))
        splits |= {source: source.removeprefix(EXTRA_SPLIT_PREFIX) for source in extra}
        return {source: split for source, split in splits.items() if self.sources[source].classes}

    def evaluate_frozen_roles(self, network: Network, step: int) -> dict[str, dict[str, float]]:
        """Evaluates the frozen roles (networks) of the stage on the test split.

        Returns:
            Role -> metric -> value.

        Raises:
            TrainingError: a metric of a role is worse than its limit in the role's key `require`, or is not
                evaluated.
        """
        metrics_by_role: dict[str, dict[str, float]] = {}
        for name in self.plan.resolved_stage.order:
            config = self.stage.roles[name]
            if not self._is_evaluated_frozen(config):
                continue
            metrics = self._evaluate(network.role(name).model, config, "eval", network)
            self._log(name, "test", metrics, epoch=0, step=step)
            self.history.frozen[name] = {"test": metrics}
            metrics_by_role[name] = metrics
            _check_required(config, metrics)
        return metrics_by_role

    def _is_evaluated_frozen(self, config: RoleConfig) -> bool:
        if config.mode != "frozen" or upstream_role(config) is not None or config.extra_inputs:
            return False
        # A teacher of other classes, such as one that was trained on another dataset, has no accuracy here.
        source = self.sources[self.plan.resolved_stage.sources[config.name]]
        return "eval" in self.splits and source.classes == self.sources["eval"].classes

    def evaluate_trained_roles(self, runner: Runner, epoch: int, step: int) -> bool:
        """Evaluates the trained roles (networks) on every split.

        The evaluated roles are the exported role (the result of the stage), the moving average of the exported role,
        and the roles that the recipe lists under `evaluate`.

        Args:
            runner: runner (training loop) of the stage.
            epoch: number of finished epochs of the stage.
            step: number of steps since the run began, over all stages.

        Returns:
            True if no earlier evaluation in this stage gave the exported role an equal or better metric value.
        """
        metrics: dict[str, dict[str, dict[str, float]]] = {}
        for role, model in self._trained_models(runner).items():
            config = self.stage.roles.get(role, self.stage.roles[self.stage.export])
            for source, split in self.splits.items():
                values = self._evaluate(model, config, source, runner.network, runner=runner)
                metrics.setdefault(role, {})[split] = values
                self._log(role, split, values, epoch, step)
        self.history.evaluations.append({"stage": self.stage.name, "epoch": epoch, "step": step, "metrics": metrics})
        if not self.splits:
            return False
        split = next(iter(self.splits.values()))
        values = metrics[self.stage.export][split]
        by = "top1" if "top1" in values else next(iter(values))
        best = self.history.best.get(self.stage.name)
        if best is not None:
            best_value = best["metrics"][self.stage.export][split][by]
            if not (values[by] > best_value if higher_is_better(by) else values[by] < best_value):
                return False
        self.history.best[self.stage.name] = {**self.history.evaluations[-1], "selected_on": split, "by": by}
        return True

    def has_evaluated(self, stage: str) -> bool:
        """Returns True if the run's history contains an evaluation of the training stage with this name."""
        return any(record["stage"] == stage for record in self.history.evaluations)

    def final_evaluation(self, runner: Runner, step: int) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Evaluates the training split at the end of a run. Logs per-class accuracy on the test split, and figures.

        The figures show the confusion matrix and the predictions for a few samples of the test split.

        Returns:
            A mapping with the entries `trained` (trained roles) and `frozen` (frozen roles). Each entry is a mapping
            role -> split -> metric -> value. For trained roles, the splits are those of the last evaluation and the
            training split.
        """
        role, config = self.stage.export, self.stage.roles[self.stage.export]
        last = self.history.evaluations[-1] if self.history.evaluations else {"metrics": {}, "epoch": 0}
        metrics = {name: dict(splits) for name, splits in last["metrics"].items()}
        source = self.plan.train_source
        models = self._trained_models(runner)
        if self.sources[source].classes and not config.extra_inputs:
            for name in (name for name in models if name in (role, "ema")):
                values = self._evaluate(models[name], config, source, runner.network, runner=runner)
                metrics.setdefault(name, {})["train"] = values
                self._log(name, "train", values, last["epoch"], step)
        if "eval" in self.splits:
            by_class = MetricSet(["per_class", "confusion"], len(self.sources["eval"].classes), self.device)
            values = self._evaluate(models[role], config, "eval", runner.network, runner=runner, metrics=by_class)
            self._log(role, "test", values, last["epoch"], step)
            samples = self._sample_predictions(models[role], runner.network)
            self.log.figures(step, confusion=by_class.confusion(), samples=samples, split="test")
        return {"trained": metrics, "frozen": self.history.frozen}

    def example_input(self) -> Tensor:
        """Returns one image for the latency measurement, from the test split if it exists, else the training split."""
        source = self.sources.get("eval") or self.sources[self.plan.train_source]
        return next(iter(source.evaluation_batches(1))).fields["image"][0]

    def _trained_models(self, runner: Runner) -> dict[str, nn.Module]:
        names = (self.stage.export, *self.stage.evaluate)
        models = {name: self._model_with_upstream(name, runner.network) for name in names}
        if runner.average is not None:
            models["ema"] = runner.average
        return models

    def _model_with_upstream(self, name: str, network: Network) -> nn.Module:
        """Returns the module that computes the outputs of a role (network) from the images of a split.

        A role may read the output of another role, its upstream role. Then the returned module is a chain of the
        upstream model and the role's model. Exception: if the upstream role reads noise (a generator) or an index (an
        image bank), the role's model alone is returned. In evaluation, this model reads the images of the split.
        """
        config = self.stage.roles[name]
        is_noise = self.plan.specs[self.plan.resolved_stage.sources[name]].classes is None
        if upstream_role(config) is None or is_noise or self._root_field(config) == INDEX_FIELD:
            return network.role(name).model
        return RoleChain(network, name)

    def _root_field(self, config: RoleConfig) -> str:
        """Returns the batch field that a role (network) reads, directly or through the roles whose outputs it reads."""
        while (upstream := upstream_role(config)) is not None:
            config = self.stage.roles[upstream]
        return config.input.split(".", 1)[1]

    def _evaluation_field(self, config: RoleConfig) -> str:
        field = self._root_field(config)
        return "image" if field == INDEX_FIELD else field

    def _evaluate(
        self,
        model: nn.Module,
        config: RoleConfig,
        source: str,
        network: Network,
        *,
        runner: Runner | None = None,
        metrics: MetricSet | None = None,
    ) -> dict[str, float]:
        """Evaluates a model on a source of samples, and returns metric -> value.

        Args:
            model: the model of a role (a named network of the recipe), or a chain of models.
            config: configuration of the role, which names the batch field to read.
            source: name of the source.
            network: container of all roles, including the teacher.
            runner: training loop whose autocast setting is used. None, for frozen roles: the forward uses no
                autocast, and metrics that need a teacher are skipped.
            metrics: the metrics to compute. None: the metrics of the stage.
        """
        classes = len(self.sources[source].classes)
        configs = self.stage.metrics or tuple(PartConfig(type=name) for name in DEFAULT_METRICS)
        teacher = network.role(self.teacher.name).model if self.teacher is not None else None
        return evaluate(
            model,
            self.sources[source],
            metrics or MetricSet(configs, classes, self.device),
            field=self._evaluation_field(config),
            teacher=teacher if runner is not None and teacher is not model else None,
            teacher_field=self._evaluation_field(self.teacher) if self.teacher is not None else "image",
            batch_size=self.stage.eval_batch_size,
            **({"autocast": runner.autocast} if runner is not None else {}),
            world=self.world,
        )

    def _log(self, role: str, split: str, metrics: Mapping[str, float], epoch: int, step: int) -> None:
        self.log.evaluation(
            {
                "stage": self.stage.name,
                "epoch": epoch,
                "step": step,
                "split": split,
                "role": role,
                "metrics": metrics,
            }
        )

    def _sample_predictions(self, model: nn.Module, network: Network) -> PredictionSamples:
        batch = next(iter(self.sources["eval"].evaluation_batches(FIGURE_SAMPLES)))
        images = batch.fields["image"]
        teacher = network.role(self.teacher.name).model if self.teacher is not None else None
        return {
            "image": images.cpu(),
            "label": batch.fields["label"].cpu(),
            "student": predict_logits(model, images).cpu(),
            "teacher": predict_logits(teacher, images).cpu() if teacher is not None else None,
        }


def agreement_teacher(stage: StageConfig) -> RoleConfig | None:
    """Returns the first role (network) that teaches the exported role in a loss term; None if there is no teacher.

    The exported role is the result of the stage. The metric `agreement` compares the exported role with this teacher.
    """
    for term in stage.terms.values():
        for edge in term.edges:
            teaches_export = edge.student.kind == "role" and edge.student.role == stage.export
            if not teaches_export or edge.teacher is None or edge.teacher.kind != "role":
                continue
            teacher = stage.roles[edge.teacher.role]
            if teacher.name != stage.export and teacher.mode != "reuse":
                return teacher
    return None


def _check_required(config: RoleConfig, metrics: Mapping[str, float]) -> None:
    """Raises a TrainingError if a metric of a frozen role (network) is worse than its limit in the key `require`."""
    for name, limit in config.require.items():
        if name not in metrics:
            raise TrainingError(
                f"{config.location}: `require` contains the metric {name!r}, which is not evaluated. Evaluated "
                f"metrics: {', '.join(metrics)}"
            )
        value, higher = metrics[name], higher_is_better(name)
        if not (value >= limit if higher else value <= limit):
            comparison = "at least" if higher else "at most"
            raise TrainingError(
                f"{config.location}: role {config.name!r} has {name} {value:.2f} on the test split; `require` demands "
                f"{comparison} {limit:g}. Check its weights and the normalisation of its input before distilling."
            )
