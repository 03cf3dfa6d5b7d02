"""YAML or JSON text of a job description as plain values, with everything ambiguous or explosive refused.

YAML is read by the 1.2 core schema: `no` is text, `1e-3` is a number, `010` is ten. Aliases and anchors (the "billion
laughs" of a document that grows when dumped), tags, merge keys and duplicate keys are errors with their line.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

from configs.errors import FieldError, SpecError, to_pointer

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 32
MAX_VALUES = 20_000


class _Refused(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """A loader of the YAML 1.2 core schema without aliases, anchors, tags, merge and duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Refused(None, None, "anchors and aliases are not allowed", mark)
        if getattr(event, "tag", None) is not None:
            raise _Refused(None, None, f"tags are not allowed, found {event.tag}", mark)
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        if self._values > MAX_VALUES:
            raise _Refused(None, None, f"more than {MAX_VALUES} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != "tag:yaml.org,2002:str":
                raise _Refused(None, None, "keys must be text", key_node.start_mark)
            if key in seen:
                raise _Refused(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Base 10 even with leading zeros, as YAML 1.2 reads it; 0o and 0x say so themselves.
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_RESOLVERS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
for _kind, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(rf"^(?:{_pattern})$"),
        [*_first, ""] if _kind == "null" else list(_first),
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_text(text: str | bytes) -> dict[str, Any]:
    """The mapping a YAML or JSON text holds.

    Raises:
        SpecError: more than 1 MiB, not UTF-8, not YAML or JSON, no mapping, or anything refused above.
    """
    data = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise SpecError.at("", f"{len(data)} bytes: a job description has at most {MAX_BYTES}")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError.at("", f"not UTF-8 text: byte {error.start}") from None
    value = _parse_json(decoded) if decoded.lstrip()[:1] == "{" else None
    if value is None:
        value = parse_value(decoded)
    if not isinstance(value, dict):
        raise SpecError.at("", f"expected a mapping of fields, got {_name(value)}")
    check_tree(value)
    return value


def parse_value(text: str) -> Any:
    """One YAML value: a scalar, or a list or mapping in flow style. Raises SpecError."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError.at("", f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError.at("", f"not YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _parse_json(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON (then it may still be YAML in flow style)."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise SpecError.at("", f"key {key!r} is given twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except RecursionError:
        raise SpecError.at("", f"nested deeper than {MAX_DEPTH} levels") from None
    except SpecError:
        raise
    except ValueError:
        return None


def check_tree(value: object) -> None:
    """Refuse what no job description holds: non-finite numbers, lone surrogates, keys that are not text, too much depth
    or too many values.

    Raises:
        SpecError: with the pointer of each fault.
    """
    errors: list[FieldError] = []
    root: _Place = (None, "", 0)
    todo: list[tuple[_Place, object]] = [(root, value)]
    count = 0
    while todo:
        place, here = todo.pop()
        count += 1
        depth = place[2]
        if depth > MAX_DEPTH:
            raise SpecError.at("", f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise SpecError.at("", f"more than {MAX_VALUES} values")
        if isinstance(here, str):
            if not _is_utf8(here):
                errors.append(FieldError(_pointer(place), "not valid Unicode text"))
        elif isinstance(here, dict):
            for key, child in here.items():
                if not isinstance(key, str):
                    raise SpecError.at(_pointer(place), f"keys must be text, got {key!r}")
                if not _is_utf8(key):
                    raise SpecError.at(_pointer(place), "a key is not valid Unicode")
                todo.append(((place, key, depth + 1), child))
        elif isinstance(here, (list, tuple)):
            todo.extend(((place, i, depth + 1), child) for i, child in enumerate(here))
        elif isinstance(here, float) and not math.isfinite(here):
            errors.append(
                FieldError(
                    _pointer(place), f"{here} is not allowed: expected a finite number", str(here), "a finite number"
                )
            )
        elif here is not None and not isinstance(here, (bool, int, float)):
            errors.append(FieldError(_pointer(place), f"a {type(here).__name__} cannot be a value"))
    if errors:
        raise SpecError(errors)


_Place = tuple["_Place | None", str | int, int]
"""Where a value lies: in what, by which key, how deep. A path is made of it only where something is wrong."""


def _pointer(place: _Place) -> str:
    path: list[str | int] = []
    above, key, _ = place
    while above is not None:
        path.append(key)
        above, key, _ = above
    return to_pointer(path[::-1])


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _name(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
