"""What is wrong with a job description, field by field, in words a user can act on."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class FieldError:
    """One fault: where it is (RFC 6901 pointer), what it is, the value found there and what would be accepted."""

    pointer: str
    message: str
    value: object | None = None
    allowed: str | None = None

    def __str__(self) -> str:
        return f"{self.pointer or '/'}: {self.message}"


class SpecError(ValueError):
    """A job description that cannot be accepted. `errors` names every fault found."""

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, self.errors)))

    @classmethod
    def at(cls, pointer: str, message: str, value: object | None = None, allowed: str | None = None) -> SpecError:
        return cls([FieldError(pointer, message, value, allowed)])


def to_pointer(path: Sequence[str | int]) -> str:
    """The RFC 6901 JSON pointer of a path."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def close_matches(word: str, words: Iterable[str]) -> str:
    """' Did you mean …?' or nothing, for the end of a message."""
    matches = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def show(value: object) -> str:
    """A value as a user would write it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


# -- pydantic's errors as ours -----------------------------------------------------------------------------------------
def field_errors(error: ValidationError, raw: Mapping[str, Any], model: type[BaseModel]) -> tuple[FieldError, ...]:
    """Pydantic's errors about `raw` as FieldErrors with exact pointers.

    Pydantic puts the tags of unions into `loc` ("torchvision", "constrained-int"); they are no part of the document and
    are dropped. Of the alternatives of a union only the errors of the one the user seems to have meant are kept.
    """
    found: dict[str, FieldError] = {}
    for details in error.errors(include_url=False):
        path = _document_path(details, raw)
        field = _cross_field(details, path, raw, model) if details["type"] == "value_error" else None
        one = field or _field_error(details, path, raw, model)
        earlier = found.get(one.pointer)
        found[one.pointer] = one if earlier is None else _either(earlier, one)
    deepest = [p for p in found if not any(other.startswith(f"{p}/") and p for other in found)]
    return tuple(found[p] for p in deepest)


def _document_path(details: ErrorDetails, raw: object) -> Path:
    """`loc` without what is not in the document. A missing key is the last part of its loc and stays."""
    path: list[str | int] = []
    here = raw
    for position, part in enumerate(details["loc"]):
        is_last = position == len(details["loc"]) - 1
        if isinstance(here, dict) and (part in here or (is_last and details["type"] == "missing")):
            path.append(part)
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
    return tuple(path)


def _either(first: FieldError, second: FieldError) -> FieldError:
    if first.message == second.message:
        return first
    allowed = "; or ".join(dict.fromkeys(a for a in (first.allowed, second.allowed) if a)) or None
    if first.allowed and second.allowed:
        return FieldError(
            first.pointer, f"{show(first.value)} is not allowed: expected {allowed}", first.value, allowed
        )
    return FieldError(first.pointer, f"{first.message}; or: {second.message}", first.value, allowed)


_FIRST_WORD = re.compile(r"^([a-z_]+(?:\.[a-z_]+)*)\b")


def _cross_field(details: ErrorDetails, path: Path, raw: object, model: type[BaseModel]) -> FieldError | None:
    """Messages of cross-field checks start with the field they are about, relative to their model."""
    message = details["msg"].removeprefix("Value error, ")
    match = _FIRST_WORD.match(message)
    if match is None:
        return None
    names = tuple(match[1].split("."))
    if _model_at(model, (*path, *names[:-1]), raw, names[-1]) is None:
        return None
    full = (*path, *names)
    return FieldError(to_pointer(full), message, value_at(raw, full))


def _field_error(details: ErrorDetails, path: Path, raw: object, model: type[BaseModel]) -> FieldError:
    pointer, value = to_pointer(path), value_at(raw, path)
    kind, ctx = details["type"], details.get("ctx", {})
    if kind == "missing":
        return FieldError(pointer, f"{path[-1]} is missing", None, "required")
    if kind == "extra_forbidden":
        owner = _model_at(model, path[:-1], raw)
        fields = [] if owner is None else list(owner.model_fields)
        name = str(path[-1])
        return FieldError(
            pointer, f"unknown field {name!r}.{close_matches(name, fields)}", value, ", ".join(sorted(fields))
        )
    if kind == "value_error":
        return FieldError(pointer, details["msg"].removeprefix("Value error, "), value)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = ctx["discriminator"].strip("'")
        known = ctx.get("expected_tags") or ", ".join(repr(t) for t in _tags(model, path, tag))
        given = value_at(raw, (*path, tag))
        what = f"{tag} is missing" if given is None else f"{show(given)} is not allowed"
        return FieldError(to_pointer((*path, tag)), f"{what}: expected one of {known}", given, known)
    allowed = _allowed(kind, ctx)
    if allowed is None:
        return FieldError(pointer, f"{show(value)}: {details['msg']}", value)
    return FieldError(pointer, f"{show(value)} is not allowed: expected {allowed}", value, allowed)


_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "none_required": "null (it is not available yet)",
    "finite_number": "a finite number",
}


def _allowed(kind: str, ctx: Mapping[str, Any]) -> str | None:
    """What would have been accepted, from the type of pydantic's error and its context."""
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    if kind in ("literal_error", "enum"):
        expected = str(ctx["expected"])
        one_of = "" if expected.count("'") == 2 or expected == "False" else "one of "
        return one_of + expected.replace("False", "false")
    if kind == "string_pattern_mismatch":
        return f"text matching {ctx['pattern']}"
    bounds = {
        "greater_than": "a number above {gt:g}",
        "greater_than_equal": "a number of at least {ge:g}",
        "less_than": "a number below {lt:g}",
        "less_than_equal": "a number of at most {le:g}",
        "string_too_short": "text of at least {min_length} characters",
        "string_too_long": "text of at most {max_length} characters",
        "too_long": "at most {max_length} entries",
        "too_short": "at least {min_length} entries",
    }
    return bounds[kind].format(**ctx) if kind in bounds else None


def value_at(raw: object, path: Path) -> object | None:
    """What lies at a path of a document; None where nothing does."""
    for part in path:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def _model_at(model: type[BaseModel], path: Path, raw: object, field: str | None = None) -> type[BaseModel] | None:
    """The model that describes the mapping at `path`; None if there is none, or it has no field `field`."""
    here: type[BaseModel] | None = model
    for position, part in enumerate(path):
        info = None if here is None else here.model_fields.get(str(part))
        if info is None:
            return None
        models = _models_in(info.annotation)
        tag = value_at(raw, (*path[: position + 1], "type"))
        here = next((m for m in models if _has_tag(m, tag)), models[0] if models else None)
    if here is not None and field is not None and field not in here.model_fields:
        return None
    return here


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def _tags(model: type[BaseModel], path: Path, field: str) -> list[object]:
    """What the discriminator `field` of the union at `path` may be."""
    owner = _model_at(model, path[:-1], None)
    members = [] if owner is None else _models_in(owner.model_fields[str(path[-1])].annotation)
    return [tag for member in members for tag in get_args(member.model_fields[field].annotation)]


def _has_tag(model: type[BaseModel], tag: object) -> bool:
    info = model.model_fields.get("type")
    return info is not None and get_origin(info.annotation) is Literal and tag in get_args(info.annotation)
