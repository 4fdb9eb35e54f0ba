"""The YAML reader: accepted values, rejected values, and the location of each key."""

from __future__ import annotations

import pytest

from kdbench.config.compose.shorthand import name_listed_terms
from kdbench.config.yaml_reader import parse_yaml
from kdbench.errors import ConfigError


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "r.yaml")
    return str(raised.value)


def test_every_key_has_its_line():
    source = parse_yaml("a: 1\nb:\n  c: [x, {d: 2}]\n", "r.yaml")
    assert source.data == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    assert {key: location.line for key, location in source.locations.items() if key} == {
        "a": 1,
        "b": 2,
        "b.c": 3,
        "b.c.0": 3,
        "b.c.1": 3,
        "b.c.1.d": 3,
    }
    assert str(source.locations["b.c.1.d"]) == "r.yaml:3 b.c.1.d"


@pytest.mark.parametrize(
    ("text", "value"),
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
def test_scalars_have_the_type_that_they_look_like(text: str, value: object):
    result = parse_yaml(f"key: {text}", "r.yaml").data["key"]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", "true"), ("Yes", "true"), ("off", "false"), ("no", "false"), ("010", "8"), ("0x1f", "31"), ("1:30", "90")],
)
def test_ambiguous_scalars_are_rejected_with_the_value_of_yaml_1_1(text: str, value: str):
    message = error_of(f"a: 1\nseed: {text}\n")
    assert message.startswith("r.yaml:2 seed: ") and repr(text) in message and f"reads it as {value};" in message


def test_dates_and_ambiguous_keys_are_rejected():
    assert "as a date" in error_of("title: 2024-01-01")
    assert "the key 'on' is ambiguous" in error_of("on: 3")
    assert "must be text" in error_of("1: 3")


def test_duplicate_key_reports_both_lines():
    message = error_of("terms:\n  kd: {type: kd}\n  ce: {type: cross_entropy}\n  kd: {type: dkd}\n")
    assert message == "r.yaml:4 terms.kd: duplicate key 'kd', already set on line 2; keep one of them."


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
def test_code_and_tags_are_rejected(text: str):
    assert "rejected" in error_of(text)


def test_cyclic_and_exploding_aliases_are_rejected():
    assert "contains itself" in error_of("a: &x [*x]")
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "aliases expand" in error_of("\n".join(lines))


def test_all_errors_of_a_file_are_reported_in_order():
    lines = error_of("a: on\nb: 010\nhydra: {}\n").splitlines()
    assert lines[0] == "r.yaml has 3 mistakes:"
    assert [line.split(":")[1].split(" ")[0] for line in lines[1:]] == ["1", "2", "3"]


@pytest.mark.parametrize("text", ["", "# only a comment", "- a\n- b\n", "just text", "a: [1\nb: 2", "a: b: c"])
def test_file_without_a_mapping_is_reported(text: str):
    assert error_of(text).startswith("r.yaml")


def test_list_of_terms_becomes_a_mapping_with_the_same_lines():
    text = "terms:\n  - {type: kd, weight: 1}\n  - cross_entropy\n  - {type: kd, weight: 2}\n"
    source = name_listed_terms(parse_yaml(text, "r.yaml"))
    assert list(source.data["terms"]) == ["kd", "cross_entropy", "kd_2"]
    assert source.locations["terms.kd_2.weight"].line == 4
    assert source.locations["terms.kd_2.weight"].key == "terms.kd_2.weight"


def test_list_of_terms_in_a_stage_becomes_a_mapping():
    source = name_listed_terms(parse_yaml("stages:\n  one:\n    terms: [{type: kd}]\n", "r.yaml"))
    assert source.data["stages"]["one"]["terms"] == {"kd": {"type": "kd"}}
    assert "stages.one.terms.kd.type" in source.locations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title: "\\e]0;x\\a"\n', "r.yaml:1 title: '\\x1b]0;x\\x07' contains control characters"),
        ('a: {"\\e[2J": 1}\n', "contains control characters"),
        ("seed: 99999999999999999999\n", "r.yaml:1 seed: the value is a whole number that does not fit into 64 bits"),
        ("seed: " + "9" * 5000 + "\n", "does not fit into 64 bits"),
        ("a: " + "[" * 2000 + "]" * 2000 + "\n", "nested too deeply"),
    ],
    ids=["value", "key", "number", "long number", "depth"],
)
def test_control_characters_large_integers_and_deep_nesting_are_rejected(text, message):
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "r.yaml")
    assert message in str(raised.value) and "\x1b" not in str(raised.value)
    assert parse_yaml(f"seed: {2**63 - 1}\ntitle: two\\tlines \u00e9\n", "r.yaml").data["seed"] == 2**63 - 1
