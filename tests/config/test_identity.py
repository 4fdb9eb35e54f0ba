"""The identity of a run depends on everything that can change its result, and on nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.recipe_texts import KD_RECIPE
from kdbench.config.identity import identity


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "compile=true",
        "frozen_forward=cache",
        "frozen_batch_size=64",
        "workers=2",
        "out=x",
        "runs=y",
        "data_root=z",
        "fresh=true",
        "tensorboard=false",
        "title=T",
        "paper=P",
        "published=70",
        "log_every=3",
        "keep_epochs=[2]",
        "checkpoint_every={minutes: 2}",
        "terms.kd.temperature=4.0",
        "terms.ce.label_smoothing=0.0",
        "batch_size=64",
    ],
)
def test_execution_and_records_do_not_change_the_identity(load, override: str):
    assert identity(load(KD_RECIPE, override)) == identity(load(KD_RECIPE))


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "epochs=4",
        "batch_size=32",
        "terms.kd.temperature=2",
        "terms.kd.weight=0.8",
        "~terms.ce",
        "student=digits_cnn",
        "precision=bf16",
        "augment=[flip]",
        "optimizer.lr=0.2",
        "scheduler=cosine",
        "label_fraction=50",
        "validation=0.1",
        "baseline=true",
        "dataset.normalize=false",
        "optimizer.groups=[{type: norm, weight_decay: 0}]",
    ],
)
def test_settings_of_the_result_change_the_identity(load, override: str):
    assert identity(load(KD_RECIPE, override)) != identity(load(KD_RECIPE))


def test_spelling_and_order_do_not_change_the_identity(load):
    respelled = """\
terms:
  - {weight: 0.1, type: cross_entropy}
  - {weight: 0.9, temperature: 4, type: kd}
models: {student: {model: {type: digits_mlp}}, teacher: {model: digits_cnn}}
optimizer: {momentum: 0.9, type: SGD, lr: 1e-1}
epochs: 3
dataset: {type: digits}
"""
    renamed = KD_RECIPE.replace("  ce:", "  cross_entropy:")
    assert identity(load(respelled)) == identity(load(renamed))


def test_extra_facts_and_versions_change_the_identity(load, monkeypatch):
    from kdbench.registry import TERMS

    recipe = load()
    before = identity(recipe)
    assert identity(recipe, {"data": "abc"}) != identity(recipe, {"data": "abd"}) != before
    monkeypatch.setitem(TERMS.entries["kd"].facts, "version", 2)
    assert identity(recipe) != before


def test_identity_is_equal_in_another_process(load):
    expected = identity(load())
    code = (
        "from kdbench.config.load import load_recipe as l; from kdbench.config.identity import identity as i; "
        "print(i(l('r.yaml')))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert output == expected and len(expected) == 8 and int(expected, 16) >= 0
