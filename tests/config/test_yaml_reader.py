"""What a YAML file of ours may hold, and where each key stands."""

from __future__ import annotations

import pytest

from kdbench.config.compose.shorthand import name_listed_terms
from kdbench.config.yaml_reader import parse_yaml
from kdbench.errors import ConfigError


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "r.yaml")
    return str(caught.value)


def test_every_key_knows_its_line():
    source = parse_yaml("a: 1\nb:\n  c: [x, {d: 2}]\n", "r.yaml")
    assert source.data == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    assert {key: place.line for key, place in source.locations.items() if key} == {
        "a": 1,
        "b": 2,
        "b.c": 3,
        "b.c.0": 3,
        "b.c.1": 3,
        "b.c.1.d": 3,
    }
    assert str(source.locations["b.c.1.d"]) == "r.yaml:3 b.c.1.d"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3),
        ("5e4", 5e4),
        ("-2.5E+1", -25.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'on'", "on"),
        ('"010"', "010"),
        ("resnet20", "resnet20"),
        ("generator:image", "generator:image"),
        ("${vars.width}", "${vars.width}"),
    ],
)
def test_scalars_are_what_they_look_like(written: str, value: object):
    read = parse_yaml(f"key: {written}", "r.yaml").data["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("written", "read_as"),
    [("on", "true"), ("Yes", "true"), ("off", "false"), ("no", "false"), ("010", "8"), ("0x1f", "31"), ("1:30", "90")],
)
def test_yaml_traps_are_refused_with_what_yaml_would_read(written: str, read_as: str):
    said = fault(f"a: 1\nseed: {written}\n")
    assert said.startswith("r.yaml:2 seed: ") and repr(written) in said and f"reads it as {read_as};" in said


def test_dates_and_truth_as_a_key_are_refused():
    assert "as a date" in fault("title: 2024-01-01")
    assert "the key 'on' is ambiguous" in fault("on: 3")
    assert "must be text" in fault("1: 3")


def test_a_duplicate_key_names_both_lines():
    said = fault("terms:\n  kd: {type: kd}\n  ce: {type: cross_entropy}\n  kd: {type: dkd}\n")
    assert said == "r.yaml:4 terms.kd: the key 'kd' is given twice, first on line 2; keep one of them."


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {job_logging: x}",
        "defaults: [a]",
        "student: {_target_: os.system}",
        "a: {b: [{_partial_: true}]}",
        "a: !!python/object/apply:os.system [ls]",
        "a: !!python/name:os.system",
        "a: !import os",
        "a: !!str 010",
        "a: ${oc.env:HOME}",
        "a: 'x ${env:HOME}'",
        "a: ${hydra.job.name}",
        "a: ${vars.${x}}",
        "a: &x {b: 1}\nc: {<<: *x}",
    ],
)
def test_a_recipe_is_data(text: str):
    assert "refused" in fault(text)


def test_an_alias_that_contains_itself_or_explodes_is_refused():
    assert "contains itself" in fault("a: &x [*x]")
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "unfolds" in fault("\n".join(lines))


def test_all_faults_of_a_file_are_told_in_order():
    lines = fault("a: on\nb: 010\nhydra: {}\n").splitlines()
    assert lines[0] == "r.yaml has 3 mistakes:"
    assert [line.split(":")[1].split(" ")[0] for line in lines[1:]] == ["1", "2", "3"]


@pytest.mark.parametrize("text", ["", "# only a comment", "- a\n- b\n", "just text", "a: [1\nb: 2", "a: b: c"])
def test_what_is_no_mapping_is_said_in_words(text: str):
    assert fault(text).startswith("r.yaml")


def test_a_list_of_terms_becomes_a_mapping_that_keeps_the_lines():
    text = "terms:\n  - {type: kd, weight: 1}\n  - cross_entropy\n  - {type: kd, weight: 2}\n"
    source = name_listed_terms(parse_yaml(text, "r.yaml"))
    assert list(source.data["terms"]) == ["kd", "cross_entropy", "kd_2"]
    assert source.locations["terms.kd_2.weight"].line == 4
    assert source.locations["terms.kd_2.weight"].key == "terms.kd_2.weight"


def test_a_list_of_terms_in_a_stage_becomes_a_mapping():
    source = name_listed_terms(parse_yaml("stages:\n  one:\n    terms: [{type: kd}]\n", "r.yaml"))
    assert source.data["stages"]["one"]["terms"] == {"kd": {"type": "kd"}}
    assert "stages.one.terms.kd.type" in source.locations


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('title: "\\e]0;x\\a"\n', "r.yaml:1 title: '\\x1b]0;x\\x07' holds control characters"),
        ('a: {"\\e[2J": 1}\n', "holds control characters"),
        ("seed: 99999999999999999999\n", "r.yaml:1 seed: the value is a whole number of more than 64 bits"),
        ("seed: " + "9" * 5000 + "\n", "more than 64 bits"),
        ("a: " + "[" * 2000 + "]" * 2000 + "\n", "more deeply than can be read"),
    ],
    ids=["value", "key", "number", "long number", "depth"],
)
def test_what_would_fool_a_terminal_or_a_machine_is_refused(text, told):
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "r.yaml")
    assert told in str(raised.value) and "\x1b" not in str(raised.value)
    assert parse_yaml(f"seed: {2**63 - 1}\ntitle: two\\tlines \u00e9\n", "r.yaml").data["seed"] == 2**63 - 1
