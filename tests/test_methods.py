"""Tests the list of methods: statuses follow from the recipes, variants plan, notes are complete, the page is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdbench.cli.check import check_recipe
from kdbench.cli.main import main
from kdbench.cli.methods import method_text, methods_page, status_detail
from kdbench.config.load import load_recipe
from kdbench.config.method_list import (
    NOT_STATED,
    NOT_YET,
    RUNS,
    RUNS_AS,
    Method,
    read_methods,
    recipe_claims,
    recipe_notes,
)
from kdbench.config.paths import recipe_names, shared_folder
from kdbench.config.schema import Notes, Recipe
from kdbench.config.yaml_reader import read_yaml
from kdbench.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
METHOD_LIST = read_methods()
VARIANTS = [method for method in METHOD_LIST.methods if method.variant_of is not None]

FILE = """\
methods:
  m1: {method: One, missing: a detector}
  m2: {method: Two, variant_of: {recipe: digits/kd, overrides: [terms.kd.temperature=2]}}
  m3: {method: Three, unstated: its loss}
  m4: {method: Four}
beyond:
  x-five: {method: Five, missing: much}
language_model:
  m6: Six
"""


def read(tmp_path: Path, text: str = FILE, **claims: list[str]):
    path = tmp_path / "methods.yaml"
    path.write_text(text, encoding="utf-8")
    return read_methods(path, {name.replace("_", "-"): recipes for name, recipes in claims.items()})


# The list


def test_status_follows_from_the_keys_of_a_row(tmp_path):
    assert [m.status for m in read(tmp_path).methods] == [NOT_YET, RUNS_AS, NOT_STATED, NOT_YET, NOT_YET]
    assert read(tmp_path).counts() == {RUNS: 0, RUNS_AS: 1, NOT_YET: 3, NOT_STATED: 1}
    assert [status_detail(m) for m in read(tmp_path).methods][2:4] == ["its loss", "a recipe"]


def test_recipe_of_a_method_overrules_every_key_of_its_row(tmp_path):
    method_list = read(
        tmp_path, m1=["digits/one"], m2=["digits/two"], m3=["digits/three", "cifar100/three"], x_five=["a"]
    )
    assert [m.status for m in method_list.methods] == [RUNS, RUNS, RUNS, NOT_YET, RUNS]
    assert method_list.methods[2].recipes == ("digits/three", "cifar100/three")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("missing: a detector", "mising: a detector"), "no key 'mising'. Did you mean 'missing'?"),
        (("unstated: its loss", "unstated: its loss, missing: all"), "missing and unstated exclude each other"),
        (("method: Four", "paper: none"), "expected a mapping with the key `method`"),
        (
            ("overrides: [terms.kd.temperature=2]", "override: a=1"),
            "expected variant_of: {recipe: NAME, overrides: [key=value, ...]}",
        ),
    ],
)
def test_wrong_row_raises(tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, FILE.replace(*change))


def test_claim_of_an_unknown_method_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"digits/one: methods: no method 'm11' in configs/methods\.yaml\. Did you"):
        read(tmp_path, m11=["digits/one"])
    with pytest.raises(ConfigError, match="This method needs a language model"):
        read(tmp_path, m6=["digits/six"])


def test_claims_equal_those_of_the_parsed_recipes():
    """Reading one key alone gives the same as parsing the whole recipe."""
    expected: dict[str, list[str]] = {}
    for recipe in recipe_names():
        methods = read_yaml(shared_folder("recipes") / f"{recipe}.yaml").data.get("methods", [])
        for name in methods if isinstance(methods, list) else [methods]:
            expected.setdefault(name, []).append(recipe)
    assert recipe_claims() == expected


def test_claims_are_read_from_every_yaml_form(tmp_path, monkeypatch):
    texts = {
        "a": "methods: [m1, m2]\n",
        "b": "title: t\nmethods:\n- m1\n\n- m3 # three\nepochs: 1\n",
        "c": "epochs: 1\n",
    }
    texts["d"] = "methods:\n  [m1,\n   m4]\nterms: {}\n"
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("kdbench.config.method_list.shared_folder", lambda kind: tmp_path)
    monkeypatch.setattr("kdbench.config.method_list.recipe_names", lambda: sorted(texts))
    assert recipe_claims() == {"m1": ["a", "b", "d"], "m2": ["a"], "m3": ["b"], "m4": ["d"]}


@pytest.mark.parametrize("method", VARIANTS, ids=lambda method: method.id)
def test_variant_loads_plans_and_differs_from_its_recipe(method):
    variant = method.variant_of
    recipe = load_recipe(variant.recipe, list(variant.overrides))
    assert recipe.resolved != load_recipe(variant.recipe, []).resolved, "overrides without effect are no other method"
    assert check_recipe(recipe, brief=True) == 0
    assert any(variant.recipe in m.recipes for m in METHOD_LIST.methods), (
        f"{variant.recipe} implements no listed method"
    )


def test_every_row_has_the_form_of_its_keys():
    assert len({method.id for method in METHOD_LIST.methods}) == len(METHOD_LIST.methods) > 130
    for method in METHOD_LIST.methods:
        assert re.fullmatch(r"x-[a-z-]+" if method.beyond else r"m\d{3}", method.id)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|[A-Za-z]+ \d{4}|", method.paper), method.id
        assert 20 < len(method.mechanism) < 180 and "\n" not in method.mechanism, method.id
        assert method.beyond or (method.title and method.field), method.id
        assert len(status_detail(method)) > 5, f"{method.id} is listed without a reason"
        assert method.id not in METHOD_LIST.language_model


# The notes of recipes


def notes_problems(recipe: Recipe) -> list[str]:
    """Returns the problems of a recipe's notes: none present though it implements a paper, or malformed items."""
    notes = recipe.notes
    if notes is None:
        return ["has methods or a paper, but no notes"] if recipe.methods or recipe.paper else []
    problems = [] if notes.source else ["notes without a source"]
    for item in (*notes.differs, *notes.scaled_down):
        if not item.endswith(".") or re.search(r"\. [A-Z]", item):
            problems.append(f"not one sentence: {item}")
    problems += [
        f"a source of several sentences without a period at its end: {item}"
        for item in notes.source
        if re.search(r"\. [A-Z]", item) and not item.endswith(".")
    ]
    return problems


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_of_a_method_has_complete_notes(name):
    assert notes_problems(load_recipe(name, [])) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("notes: {basis: code, source: [README]}\n", "", "no notes"),
        ("source: [README]", "differs: [Batches are small.]", "without a source"),
        ("source: [README]", "source: [README], differs: [batches]", "not one sentence"),
        ("source: [README]", "source: [README], scaled_down: [It is small. It is short.]", "not one sentence"),
        ("source: [README]", "source: [Loss in README. Data in README]", "without a period"),
    ],
)
def test_incomplete_notes_are_reported(tmp_path, old, new, problem):
    """Negative control of the test above."""
    text = (
        "methods: [x-kd]\nnotes: {basis: code, source: [README]}\ndataset: digits\nstudent: digits_mlp\n"
        "terms: {ce: cross_entropy}\noptimizer: {type: SGD, lr: 0.1}\nepochs: 1\n"
    )
    file = tmp_path / "method.yaml"
    file.write_text(text, encoding="utf-8")
    assert notes_problems(load_recipe(str(file), [])) == []
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert any(problem in text for text in notes_problems(load_recipe(str(file), [])))


def test_notes_read_alone_equal_those_of_the_loaded_recipe():
    assert {name: recipe_notes(name) for name in recipe_names()} == {
        name: load_recipe(name, []).notes for name in recipe_names()
    }


# The output


def test_page_is_fresh():
    hint = "write it with `kdbench list methods --markdown > docs/methods.md`"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods_page(), hint


def test_page_equals_the_output_of_the_command(capsys):
    assert main(["list", "methods", "--markdown"]) == 0
    assert capsys.readouterr().out == methods_page()


def test_page_contains_basis_and_notes_of_every_recipe():
    page = methods_page()
    plain = re.sub(r"\s+", " ", page)
    for name in {name for method in METHOD_LIST.methods for name in method.recipes}:
        notes = recipe_notes(name)
        assert notes is not None and f"[{notes.basis}](#{name.replace('/', '')})" in page
        assert f"\n### {name}\n\n- basis: {notes.basis}\n" in page
        for item in (*notes.source, *notes.differs, *notes.scaled_down):
            assert f"- {item}" in plain


def test_lines_of_the_page_outside_tables_stay_under_120_characters():
    lines = methods_page().splitlines()
    assert not [line for line in lines if len(line) >= 120 and not line.startswith("|")]
    assert [line for line in lines if line.startswith("|") and len(line) >= 120], "control: tables have longer lines"


def test_list_prints_every_method_by_status_with_counts(capsys):
    assert main(["list", "methods"]) == 0
    out = capsys.readouterr().out
    counts = METHOD_LIST.counts()
    assert f"{len(METHOD_LIST.methods)} methods: {counts[RUNS]} run, " in out.splitlines()[-1]
    assert sum(line.startswith(("  m", "  x-")) for line in out.splitlines()) == len(METHOD_LIST.methods)


def test_list_prints_one_status_alone(capsys):
    assert main(["list", "methods", "--status", NOT_YET]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert rows == [method.id for method in METHOD_LIST.methods if method.status == NOT_YET]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["terms", "--markdown"], "needs the kind `methods`"),
        (["methods", "--status", "run"], "no status 'run'. Did you mean 'runs'?"),
        (["methods", "--markdown", "--status", "runs"], "omit --status"),
    ],
)
def test_wrong_options_of_list_report_the_right_ones(capsys, arguments, message):
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_show_prints_one_method_in_full(capsys):
    assert main(["show", "m058"]) == 0
    out = capsys.readouterr().out
    assert "PS-KD" in out and "https://arxiv.org/abs/2006.12000" in out and "Progressive Refinement" in out
    assert "digits/ps_kd:\n  basis: code\n  source:\n    - Authors' code: " in out
    assert "  differs:\n    - The weight alpha" in out and "  scaled down:\n    - The training set has 300" in out


def test_method_text_leaves_out_empty_fields(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("kdbench.cli.methods.recipe_notes", lambda name: Notes(basis="text"))
    method = Method("m1", "One", mechanism="a long mechanism " * 5, recipes=("digits/one",))
    lines = method_text(method).splitlines()
    assert [line.split(":")[0] for line in lines if line and line[0] != " "] == [
        "m1 (method)",
        "Mechanism",
        "Runs",
        "digits/one",
    ]
    assert lines[-1] == "  basis: text" and max(map(len, lines)) <= 60
