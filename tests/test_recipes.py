"""Every shipped recipe takes steps on data of its shape, never waits for the device, and compiles without a break."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

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
from kdbench.engine.train import runner as runner_module
from kdbench.files import read_json
from kdbench.registry import TERMS

RECIPES = recipe_names()
STAGED = [name for name in RECIPES if "\nstages:" in (shared_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")]


def benches(name: str) -> list[StageHarness]:
    """The stages that train and read nothing that an earlier one made, those of later rounds only where they differ."""
    loaded = with_synthetic_data(load_recipe(name), samples=960, batch_size=4)
    found, seen = [], []
    for number, stage in enumerate(loaded.stages):
        wired = (stage.name.partition("@")[0], tuple(stage.terms), tuple(stage.roles), stage.updates)
        if stage.epochs != 0 and stage.steps != 0 and not reads_made(stage) and wired not in seen:
            seen.append(wired)  # an update holds mappings: no hash
            found.append(build_stage(loaded, stage=number))
    return found


def reads_made(stage: StageConfig) -> bool:
    """Whether a stage needs a dataset, a choice of samples, a tensor or a model of an earlier one."""
    sources = stage.data.values()
    chosen = [
        step for s in sources for step in (*(s.subset if isinstance(s.subset, tuple) else [s.subset]), s.label_fraction)
    ]
    operands = [operand for term in stage.terms.values() for operand in term.read_operands()]
    return (
        any(source.artifact for source in sources)
        or any(isinstance(step, str) for step in chosen)
        or any(operand.kind == "made" for operand in operands)
        or any(role.artifact for role in stage.roles.values())
    )


def test_there_are_recipes():
    assert {"digits/kd", "digits/teacher", "cifar100/kd", "cifar100/teacher"} <= set(RECIPES)
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_of_a_recipe_moves_what_it_should_compiles_whole_and_reads_nothing_on_the_host(name):
    """Two steps of each stage, the second one compiled without a break, and two more where no value can be read."""
    for run in benches(name):
        reached = {name.split(".", 1)[0] for update in run.plan.updates for name in update.parameters}
        moving = sorted(reached - {"terms"})
        assert moving or reached
        before = {role: run.weights(role) for role in moving}
        run.step()
        compile_whole(run)
        run.step()
        reading, _ = run.runner.read()
        assert reading.steps == 2 and set(reading.losses) == set(run.plan.resolved_stage.terms)
        assert not reading.not_finite
        for role in moving:
            assert not equal_weights(before[role], run.weights(role)), f"{role} has to move"
        run.runner.losses = run.network
        step_on_fake_tensors(run)


def compile_whole(run: StageHarness) -> None:
    """From here on the step's forward and terms are traced by the compiler, where a graph break raises."""
    torch._dynamo.reset()
    run.network.lap = None  # a clock is read between the parts of a step only where nothing is compiled
    run.runner.losses = torch.compile(run.network, backend="eager", fullgraph=True, dynamic=False)


NOTHING_IS_LEFT_OUT = {"digits/ferkd": ["stages.label.make.crops.low=0"]}
"""Where networks that have learnt nothing would pass no sample on."""
LONGER = {"digits/consensus": 40}
"""Steps of each stage, where networks have to agree."""


@pytest.mark.parametrize("name", STAGED)
def test_a_recipe_of_several_stages_is_played_to_its_end(name, tmp_path):
    """Two steps of each stage, on its own data, and everything that a stage makes."""
    recipe = short_recipe(name, *NOTHING_IS_LEFT_OUT.get(name, []), steps=LONGER.get(name, 2))
    assert len(recipe.stages) > 1
    outcome = run_recipe(recipe, tmp_path / "run")
    assert read_json(outcome.folder.manifest)["status"] == "finished"
    made = [f"{stage.name}.{thing}" for stage in recipe.stages for thing in stage.artifacts]
    assert sorted(read_json(outcome.folder.manifest).get("made", {})) == sorted(made)


def test_everything_that_a_step_may_do_besides_reads_nothing_on_the_host():
    """Averages, snapshots, clipping, accumulation, schedules, hidden labels, ordered updates, logging."""
    followers = """
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
    step_on_fake_tensors(build_stage(followers), steps=5)
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


def test_a_step_that_reads_is_caught():
    """Negative control of the two tests above."""
    for reader in ("t_reads_item", "t_reads_branch", "t_reads_mask"):
        run = build_stage(f"student: t_layers\nterms: {{t: {reader}}}\noptimizer: {{type: SGD, lr: 0.1}}\nepochs: 1\n")
        run.step()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            step_on_fake_tensors(run)
    run = build_stage("student: t_layers\nterms: {t: t_brings_number}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n").step()
    with pytest.raises(RuntimeError, match="plugin_parts makes a tensor from numbers of the host"):
        step_on_fake_tensors(run)


READS_MADE = {"bkd", "nd", "scar"}
"""Terms that read what an earlier stage made; the steps of their recipes are tested whole."""
TERMS_OF_KDBENCH = sorted(
    name for name, entry in TERMS.entries.items() if entry.module.startswith("kdbench.") and name not in READS_MADE
)
OPERANDS = {
    "activation": "student: conv2",
    "bn_statistics": "student: conv2, teacher: teacher:norm2/stats",
    "fsp": "student: conv2, teacher: conv2, student_from: conv1, teacher_from: teacher:conv1",
    "icarl": "old: [0, 1]",
    "information_entropy": "student: logits",
    "binary": "student: one:logits",
    "joint_cross_entropy": "student: pairs:logits, kind: train.label",
    "token_relation": "student: tokens, teacher: tokens",
    "attention_relation": "student: tokens, teacher: tokens, heads: 2",
    "image_norm": "student: conv2",
    "total_variation": "student: conv2",
    "ft": "student: conv2, teacher: conv2",
    "reconstruction": "student: conv2, teacher: conv2",
    "weight_distance": "student: 'student:fc/weights', teacher: 'teacher:fc/weights'",
    "ewc": "student: 'student:fc/weights', teacher: 'teacher:fc/weights', fisher: 'teacher:fc/weights'",
    "load_balance": "student: 'term:routed.route'",
    "reinforce": "student: 'term:routed.gate', action: 'term:routed.route', reward: 'term:routed.loss'",
}
"""The operands of terms that compare no two feature maps, and no two vectors of logits."""
ROUTED = "routed: {type: kd, teacher: [teacher, second], route: {type: policy, read: 'student:logits'}}, "


def term_bench(name: str, *, compiled: bool = True) -> StageHarness:
    """A stage with this term, on the student's and the teacher's logits or feature maps.

    The compiler of torch 2.6 cannot end a student's forward early (`TRACES_RAISE`): there, labels are read too. Where
    a term reads states of networks or of other terms, they are read too, because something has to learn.
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


@pytest.mark.parametrize("name", TERMS_OF_KDBENCH)
def test_the_step_of_a_term_compiles_without_a_break(name, monkeypatch):
    run = term_bench(name, compiled=False).step(2)
    torch._dynamo.reset()
    chosen = {}

    def compiling(network, **options):
        chosen.update(options)
        return torch.compile(network, backend="aot_eager", **options)

    monkeypatch.setattr(runner_module, "compiled", compiling)
    compiled = term_bench(name).step(2)
    assert chosen["fullgraph"] is True
    assert compiled.runner.compiling, "it must not have gone on without compiling"
    for key, value in run.weights().items():
        torch.testing.assert_close(compiled.weights()[key], value, rtol=1e-4, atol=1e-6)


def test_a_graph_break_would_be_noticed(monkeypatch):
    """Negative control: a term that reads a value cannot be compiled in one piece; the run goes on and says so."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        runner_module, "compiled", lambda network, **o: torch.compile(network, backend="aot_eager", **o)
    )
    said: list[str] = []
    text = "student: t_conv\nterms: {t: t_reads_branch}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 2\ncompile: true\n"
    run = build_stage(text)
    run.runner.say = said.append
    run.step(2)
    assert not run.runner.compiling and len(said) == 1 and "compile" in said[0]
    plain = build_stage(text.replace("compile: true\n", "")).step(2)
    for key, value in plain.weights().items():
        assert torch.equal(run.weights()[key], value)


def test_a_graph_break_in_a_recipe_would_be_noticed():
    """The same of the recipes' test."""
    run = build_stage("student: t_conv\nterms: {t: t_reads_branch}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 2\n").step()
    compile_whole(run)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run.step()


def test_a_long_sweep_over_a_number_compiles_every_run(monkeypatch):
    """Each value makes a form of the step of its own, each size of batch another; torch's own limit is eight."""
    torch._dynamo.reset()
    monkeypatch.setattr(runner_module, "compiled", lambda network, **o: torch.compile(network, backend="eager", **o))
    text = "student: t_layers\nteacher: t_layers\nterms: {kd: {type: kd, temperature: NUMBER}}\n"
    text += "optimizer: {type: SGD, lr: 0.1}\nepochs: 2\nbatch_size: 40\ncompile: true\n"
    runs = [build_stage(text.replace("NUMBER", str(number))).step(2) for number in range(1, 11)]
    assert all(run.runner.compiling for run in runs)


def test_a_backend_that_fails_is_no_reason_to_stop(monkeypatch):
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(runner_module, "compiled", lambda network, **o: torch.compile(network, backend=broken, **o))
    said: list[str] = []
    run = term_bench("cross_entropy")
    run.runner.say = said.append
    run.step(3)
    assert len(said) == 1 and "no C++ compiler was found" in said[0] and "without" in said[0]
    plain = term_bench("cross_entropy", compiled=False).step(3)
    for key, value in plain.weights().items():
        assert torch.equal(run.weights()[key], value)


def test_a_mistake_of_the_step_is_no_failure_of_the_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(runner_module, "compiled", lambda network, **o: network)
    run = term_bench("cross_entropy")
    window = next(run.windows())
    window[0]["train"].pop("image")
    run.runner.begin_step()
    with pytest.raises(KeyError):
        run.runner.step(window)
