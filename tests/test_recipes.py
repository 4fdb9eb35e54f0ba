"""Tests the steps of shipped recipes: updates reach their roles, no synchronisation, no graph break."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from helpers.cases import CASES
from helpers.quick import only_quick
from helpers.recipes import (  # noqa: F401
    SYNTHETIC_DATA,
    StageHarness,
    build_stage,
    equal_weights,
    plugin_registration,
    recipe_from_text,
    step_on_fake_tensors,
    with_synthetic_data,
)
from helpers.shipped_recipes import run_recipe, short_recipe
from kdbench.config.load import load_recipe, recipe_names
from kdbench.config.paths import shared_folder
from kdbench.config.schema import StageConfig
from kdbench.engine.network.features import TRACES_RAISE
from kdbench.engine.train import steps as steps_module
from kdbench.files import read_json
from kdbench.registry import TERMS

RECIPES = recipe_names()
STAGED = [
    name for name in RECIPES if "\nstages:" in (shared_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
]


def build_stages(name: str) -> list[StageHarness]:
    """Builds the stages that train and read no artifact of an earlier stage, and later rounds only if they differ."""
    recipe = with_synthetic_data(load_recipe(name), samples=960, batch_size=4)
    harnesses, signatures = [], []
    for number, stage in enumerate(recipe.stages):
        signature = (stage.name.partition("@")[0], tuple(stage.terms), tuple(stage.roles), stage.updates)
        if stage.epochs != 0 and stage.steps != 0 and not reads_artifacts(stage) and signature not in signatures:
            signatures.append(signature)  # an update holds mappings: no hash
            harnesses.append(build_stage(recipe, stage=number))
    return harnesses


def reads_artifacts(stage: StageConfig) -> bool:
    """Returns True if a stage reads a dataset, a selection of samples, a tensor or a model of an earlier stage."""
    sources = stage.data.values()
    selections = [
        step for s in sources for step in (*(s.subset if isinstance(s.subset, tuple) else [s.subset]), s.label_fraction)
    ]
    operands = [operand for term in stage.terms.values() for operand in term.read_operands()]
    return (
        any(source.artifact for source in sources)
        or any(isinstance(step, str) for step in selections)
        or any(operand.kind == "artifact" for operand in operands)
        or any(role.artifact for role in stage.roles.values())
    )


def test_recipes_are_shipped():
    assert {"digits/kd", "digits/teacher", "cifar100/kd", "cifar100/teacher"} <= set(RECIPES)
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("name", only_quick(RECIPES, "digits/kd", "digits/dml", "digits/dafl", "digits/ewc"))
def test_step_updates_its_roles_compiles_without_break_and_reads_nothing_on_the_host(name):
    """Takes two steps of each stage, the second one compiled, and two more with fake tensors."""
    for run in build_stages(name):
        reached = {name.split(".", 1)[0] for update in run.plan.updates for name in update.parameters}
        updated = sorted(reached - {"terms"})
        assert updated or reached
        before = {role: run.weights(role) for role in updated}
        run.step()
        compile_fullgraph(run)
        run.step()
        means, _ = run.runner.read_log()
        assert means.steps == 2 and set(means.losses) == set(run.plan.resolved_stage.terms)
        assert not means.not_finite
        for role in updated:
            assert not equal_weights(before[role], run.weights(role)), f"{role} has no update"
        run.runner.eager.compute_losses = run.network
        step_on_fake_tensors(run)


def compile_fullgraph(run: StageHarness) -> None:
    """Compiles forward and terms of the following steps; a graph break raises."""
    torch._dynamo.reset()
    run.runner.eager.compute_losses = torch.compile(run.network, backend="eager", fullgraph=True, dynamic=False)


OVERRIDES = {"digits/ferkd": ["stages.label.artifacts.crops.low=0"]}
"""Overrides of recipes in which untrained networks would select no sample."""
STEPS = {"digits/consensus": 40}
"""Steps per stage of recipes in which networks must agree."""


@pytest.mark.parametrize("name", only_quick(STAGED, "digits/ft", "digits/icarl"))
def test_recipe_of_several_stages_runs_to_its_end(name, tmp_path):
    """Takes two steps of each stage on the recipe's data and builds all artifacts."""
    recipe = short_recipe(name, *OVERRIDES.get(name, []), steps=STEPS.get(name, 2))
    assert len(recipe.stages) > 1
    outcome = run_recipe(recipe, tmp_path / "run")
    assert read_json(outcome.folder.manifest)["status"] == "finished"
    artifacts = [f"{stage.name}.{name}" for stage in recipe.stages for name in stage.artifacts]
    assert sorted(read_json(outcome.folder.manifest).get("artifacts", {})) == sorted(artifacts)


def test_optional_features_of_a_step_read_nothing_on_the_host():
    """Covers averages, snapshots, clipping, accumulation, schedules, hidden labels, ordered updates and logging."""
    averages = """
    student: {model: {type: t_layers, norm: batch, dropout: 0.1}}
    models: {shadow: {ema: student, decay: 0.9}, old: {snapshot: student, every: 1}}
    terms:
      ce: {type: cross_entropy, label_smoothing: 0.1, weight: {type: linear, by: step}}
      kd: {type: kd, teacher: shadow, temperature: {type: linear, start: 1, end: 4}}
      back: {type: dkd, teacher: old, mask: labelled}
    optimizer: {type: AdamW, lr: 0.01}
    scheduler: {type: cosine, warmup: 2, by: step}
    label_fraction: 16
    ema: 0.9
    clip: 1.0
    accumulate: 2
    log_every: 1
    epochs: 4
    batch_size: 16
    """
    step_on_fake_tensors(build_stage(averages), steps=5)
    game = """
    models: {generator: {model: t_generator, input: noise.z}}
    teacher: {model: t_layers, input: "generator:image"}
    student: {model: t_layers, input: "generator:image"}
    data: {noise: {type: gaussian, shape: [6], samples: 64}}
    terms: {fool: {type: kd, weight: -1, teacher_grad: true}, mimic: kd}
    updates: [{models: [generator], terms: [fool]}, {models: [student], terms: [mimic], repeat: 2}]
    optimizer: {type: Adam, lr: 0.01}
    epochs: 1
    batch_size: 16
    """
    step_on_fake_tensors(build_stage(game), steps=3)


def test_control_step_that_reads_on_the_host_raises():
    """Control of the two tests above."""
    for reader in ("t_reads_item", "t_reads_branch", "t_reads_mask"):
        run = build_stage(f"student: t_layers\nterms: {{t: {reader}}}\noptimizer: {{type: SGD, lr: 0.1}}\nepochs: 1\n")
        run.step()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            step_on_fake_tensors(run)
    run = build_stage(
        "student: t_layers\nterms: {t: t_brings_number}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    ).step()
    with pytest.raises(RuntimeError, match="plugin_parts creates a tensor from host numbers"):
        step_on_fake_tensors(run)


READS_ARTIFACTS = {name for name, case in CASES.items() if case.recipe_operands is None}
"""Terms that read artifacts; tests of their recipes cover them."""
TERMS_OF_KDBENCH = sorted(
    name for name, entry in TERMS.entries.items() if entry.module.startswith("kdbench.") and name not in READS_ARTIFACTS
)
OPERANDS = {name: case.recipe_operands for name, case in CASES.items() if case.recipe_operands}
"""Operands of the terms whose operands are not two feature maps or two logit vectors."""
ROUTED = "routed: {type: kd, teacher: [teacher, second], route: {type: policy, read: 'student:logits'}}, "


def build_term_stage(name: str, *, compiled: bool = True) -> StageHarness:
    """Builds a stage with one term on the logits or feature maps of student and teacher.

    The stage has a label loss if the compiler cannot stop a student's forward early (torch 2.6, see `TRACES_RAISE`).
    It also has one for terms on weights or on outputs of other terms, because the student needs a loss.
    """
    features = bool(TERMS.entry(name).facts.get("features"))
    operands = OPERANDS.get(name, "student: conv2, teacher: conv2" if features else "")
    model = "t_tokens" if "tokens" in operands else "t_conv"
    teacher = model if model == "t_tokens" else f"{model}, norm: batch"
    routed = ROUTED if "term:" in operands else ""
    state = any(word in operands for word in ("/weights", "one:", "pairs:", "term:"))
    labels = ", ce: cross_entropy" if state or not TRACES_RAISE else ""
    text = f"""
    student: {model}
    teacher: {{model: {{type: {teacher}}}}}
    models:
      one: {{model: {{type: t_layers, num_classes: 1}}}}
      pairs: {{model: {{type: t_layers, num_classes: 16}}}}
      second: {{model: t_layers, frozen: true}}
    terms: {{{routed}term: {{type: {name}{operands and ", " + operands}}}{labels}}}
    optimizer: {{type: SGD, lr: 0.01}}
    label_fraction: 16
    epochs: 2
    batch_size: 16
    """
    return build_stage(recipe_from_text(text, *(["compile=true"] if compiled else [])))


@pytest.mark.parametrize("name", only_quick(TERMS_OF_KDBENCH, "kd", "rkd", "weight_distance"))
def test_step_of_a_term_compiles_without_a_break(name, monkeypatch):
    run = build_term_stage(name, compiled=False).step(2)
    torch._dynamo.reset()
    compile_options = {}

    def record_options(network, **options):
        compile_options.update(options)
        return torch.compile(network, backend="aot_eager", **options)

    monkeypatch.setattr(steps_module, "compile_network", record_options)
    compiled = build_term_stage(name).step(2)
    assert compile_options["fullgraph"] is True
    assert compiled.runner.eager.compiled, "the step must not fall back to eager execution"
    for key, value in run.weights().items():
        torch.testing.assert_close(compiled.weights()[key], value, rtol=1e-4, atol=1e-6)


def test_control_graph_break_is_reported_and_the_run_continues_eagerly(monkeypatch):
    """A term that reads a value cannot be compiled in one graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        steps_module, "compile_network", lambda network, **o: torch.compile(network, backend="aot_eager", **o)
    )
    text = "student: t_conv\nterms: {t: t_reads_branch}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 2\ncompile: true\n"
    run = build_stage(text)
    run.step(2)
    assert not run.runner.eager.compiled and len(run.notices) == 1 and "compile" in run.notices[0]
    plain = build_stage(text.replace("compile: true\n", "")).step(2)
    for key, value in plain.weights().items():
        assert torch.equal(run.weights()[key], value)


def test_control_graph_break_raises_in_the_recipes_test():
    run = build_stage(
        "student: t_conv\nterms: {t: t_reads_branch}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 2\n"
    ).step()
    compile_fullgraph(run)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run.step()


def test_long_sweep_over_a_number_compiles_every_run(monkeypatch):
    """Each value and each batch size is another specialisation of the step; torch's default limit is eight."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        steps_module, "compile_network", lambda network, **o: torch.compile(network, backend="eager", **o)
    )
    text = "student: t_layers\nteacher: t_layers\nterms: {kd: {type: kd, temperature: NUMBER}}\n"
    text += "optimizer: {type: SGD, lr: 0.1}\nepochs: 2\nbatch_size: 40\ncompile: true\n"
    runs = [build_stage(text.replace("NUMBER", str(number))).step(2) for number in range(1, 11)]
    assert all(run.runner.eager.compiled for run in runs)


def test_run_continues_eagerly_after_a_backend_failure(monkeypatch):
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(
        steps_module, "compile_network", lambda network, **o: torch.compile(network, backend=broken, **o)
    )
    run = build_term_stage("cross_entropy")
    run.step(3)
    (notice,) = run.notices
    assert "no C++ compiler was found" in notice and "continues in eager mode" in notice
    plain = build_term_stage("cross_entropy", compiled=False).step(3)
    for key, value in plain.weights().items():
        assert torch.equal(run.weights()[key], value)


def test_error_of_the_step_is_no_compiler_failure(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(steps_module, "compile_network", lambda network, **o: network)
    run = build_term_stage("cross_entropy")
    window = next(run.windows())
    window[0]["train"].fields.pop("image")
    run.runner.begin_step()
    with pytest.raises(KeyError):
        run.runner.step(window)
