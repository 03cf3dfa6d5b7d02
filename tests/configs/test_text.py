from __future__ import annotations

import json
import math

import pytest

from configs.errors import SpecError
from configs.text import MAX_BYTES, check_tree, parse_text


def refusal(text: str | bytes) -> str:
    with pytest.raises(SpecError) as caught:
        parse_text(text)
    return caught.value.errors[0].message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("3.", 3.0),
        (".5", 0.5),
        ("-2.5e+3", -2500.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-7", -7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_text(f"a: {text}")["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_json_and_flow_yaml_are_read() -> None:
    document = {"a": {"b": [1, 2.5, None, True, "ü"]}}
    assert parse_text(json.dumps(document)) == document
    assert parse_text("{a: {b: [1, 2.5, null, true, ü]}}".encode()) == document


def test_tabs_are_allowed_in_json() -> None:
    assert parse_text('{\n\t"a": 1\n}') == {"a": 1}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &x 1\nb: 2", "line 1, column 4: anchors and aliases"),
        ("a: 1\nb: *x", "line 2, column 4: anchors and aliases"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("a: !!python/name:os.system x", "tags are not allowed"),
        ("a: !!set {b}", "tags are not allowed"),
        ("1: b", "keys must be text"),
        ("~: b", "keys must be text"),
        ("[a]: b", "keys must be text"),
        ("- a", "expected a mapping of fields, got a list"),
        ("just text", "expected a mapping of fields, got text"),
        ("", "expected a mapping of fields, got nothing"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: [1", "line"),
        ("a: \x00", "not YAML"),
        (b"a: \xff", "not UTF-8"),
        (b"a: " + b"x" * MAX_BYTES, "a job description has at most"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        ('{"a": ' * 50_000, "nested deeper than 32"),
        ("a: [" + "1," * 30_000 + "]", "more than 20000 values"),
        ('{"a": [' + "1," * 30_000 + "1]}", "more than 20000 values"),
        ("a: .nan", "finite number"),
        ("a: -.inf", "finite number"),
        ("a: 1e999", "finite number"),
        ('{"a": NaN}', "finite number"),
        ('{"a": 1e999}', "finite number"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ("a: " + "9" * 5000, ""),
    ],
)
def test_refuses(text: str | bytes, part: str) -> None:
    assert part in refusal(text)


def test_a_tree_names_each_fault() -> None:
    with pytest.raises(SpecError) as caught:
        check_tree({"optim": {"lr": math.nan}, "data": {"mean": [0.5, math.inf]}, "x/y": {1, 2}})
    assert {e.pointer for e in caught.value.errors} == {"/optim/lr", "/data/mean/1", "/x~1y"}
