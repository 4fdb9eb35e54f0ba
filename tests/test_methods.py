"""The list of methods says what is true: each `runs` has a recipe, each `runs as` plans, the page is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdbench.cli.check import check_recipe as check
from kdbench.cli.main import main
from kdbench.cli.methods import methods_page, status_detail
from kdbench.config.load import load_recipe
from kdbench.config.method_list import NOT_STATED, NOT_YET, RUNS, RUNS_AS, read_methods, recipe_claims
from kdbench.config.paths import recipe_names, shared_folder
from kdbench.config.yaml_reader import read_yaml
from kdbench.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
LISTED = read_methods()
SAME_AS = [method for method in LISTED.methods if method.variant_of is not None]

FILE = """\
methods:
  m1: {method: One, missing: a detector}
  m2: {method: Two, same_as: {recipe: digits/kd, keys: [terms.kd.temperature=2]}}
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


def test_the_page_is_fresh():
    fresh = "write it with `kdbench list methods --markdown > docs/methods.md`"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods_page(), fresh


def test_the_status_of_a_row_follows_from_its_facts(tmp_path):
    assert [m.status for m in read(tmp_path).methods] == [NOT_YET, RUNS_AS, NOT_STATED, NOT_YET, NOT_YET]
    assert read(tmp_path).counts() == {RUNS: 0, RUNS_AS: 1, NOT_YET: 3, NOT_STATED: 1}
    assert [status_detail(m) for m in read(tmp_path).methods][2:4] == ["its loss", "a recipe"]


def test_a_recipe_of_its_own_wins_over_every_fact(tmp_path):
    listed = read(tmp_path, m1=["digits/one"], m2=["digits/two"], m3=["digits/three", "cifar100/three"], x_five=["a"])
    assert [m.status for m in listed.methods] == [RUNS, RUNS, RUNS, NOT_YET, RUNS]
    assert listed.methods[2].recipes == ("digits/three", "cifar100/three")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("missing: a detector", "mising: a detector"), "no key 'mising'. Did you mean 'missing'?"),
        (("unstated: its loss", "unstated: its loss, missing: all"), "missing and unstated exclude each other"),
        (("method: Four", "paper: none"), "a mapping with the key `method` was expected"),
        (
            ("keys: [terms.kd.temperature=2]", "key: a=1"),
            "same_as: {recipe: NAME, keys: [key=value, ...]} was expected",
        ),
    ],
)
def test_a_wrong_row_is_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read(tmp_path, FILE.replace(*change))


def test_a_recipe_that_is_no_row_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"digits/one: methods: no row 'm11' in the list of methods\. Did you mean"):
        read(tmp_path, m11=["digits/one"])
    with pytest.raises(ConfigError, match="it needs a language model there"):
        read(tmp_path, m6=["digits/six"])


def test_what_recipes_say_they_are_is_read_whole():
    """The quick look at one key finds what the whole recipe says, however it is written."""
    said: dict[str, list[str]] = {}
    for recipe in recipe_names():
        named = read_yaml(shared_folder("recipes") / f"{recipe}.yaml").data.get("methods", [])
        for name in named if isinstance(named, list) else [named]:
            said.setdefault(name, []).append(recipe)
    assert recipe_claims() == said


def test_one_key_is_read_in_every_way_of_writing_it(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("method", SAME_AS, ids=lambda method: method.id)
def test_what_runs_as_another_recipe_loads_and_plans(method):
    same = method.same_as
    changed = load_recipe(same.recipe, list(same.keys))
    assert changed.resolved != load_recipe(same.recipe, []).resolved, "keys that change nothing make no other method"
    assert check(changed, brief=True) == 0
    shown = [m for m in LISTED.methods if same.recipe in m.recipes]
    assert shown, f"{same.recipe} is itself no method of the list"


def test_the_facts_of_every_row_are_of_their_form():
    assert len({method.id for method in LISTED.methods}) == len(LISTED.methods) > 130
    for method in LISTED.methods:
        assert re.fullmatch(r"x-[a-z-]+" if method.beyond else r"m\d{3}", method.id)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|[A-Za-z]+ \d{4}|", method.paper), method.id
        assert 20 < len(method.mechanism) < 180 and "\n" not in method.mechanism, method.id
        assert method.beyond or (method.title and method.field), method.id
        assert len(status_detail(method)) > 5, f"{method.id} is listed without a reason"
        assert method.id not in LISTED.language_model


def test_the_list_is_printed_by_status_with_counts(capsys):
    assert main(["list", "methods"]) == 0
    out = capsys.readouterr().out
    counts = LISTED.counts()
    assert f"{len(LISTED.methods)} methods: {counts[RUNS]} run, " in out.splitlines()[-1]
    assert sum(line.startswith(("  m", "  x-")) for line in out.splitlines()) == len(LISTED.methods)


def test_one_status_alone(capsys):
    assert main(["list", "methods", "--status", NOT_YET]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert rows == [method.id for method in LISTED.methods if method.status == NOT_YET]


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["list", "methods", "--markdown"]) == 0
    assert capsys.readouterr().out == methods_page()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["terms", "--markdown"], "are for `kdbench list methods` alone"),
        (["methods", "--status", "run"], "no status 'run'. Did you mean 'runs'?"),
        (["methods", "--markdown", "--status", "runs"], "leave --status out"),
    ],
)
def test_a_wrong_question_is_answered_in_words(capsys, words, said):
    assert main(["list", *words]) == 2
    assert said in capsys.readouterr().err


def test_one_row_is_shown_in_full(capsys):
    assert main(["show", "m058"]) == 0
    out = capsys.readouterr().out
    assert "PS-KD" in out and "https://arxiv.org/abs/2006.12000" in out and "Progressive Refinement" in out
