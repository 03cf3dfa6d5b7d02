"""From what a user sends to a checked job description: text, overrides, presets, then the schema.

    parse_text -> apply_overrides -> parse_spec (merges the preset) -> configs.resolve.resolve

A preset is a YAML file under configs/presets; its name is its path. Its header says in comments what it is, where its
settings come from, what it costs and what it should reach. A preset may inherit from another (`preset:`); those whose
name starts with an underscore are only there to be inherited from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from configs.errors import FieldError, SpecError, close_matches, field_errors, show, to_pointer, value_at
from configs.spec import (
    EvaluateJob,
    ExportJob,
    FinetuneJob,
    ImportJob,
    InspectJob,
    JobSpec,
    PretrainJob,
    SearchJob,
    job_spec_adapter,
)
from configs.text import MAX_DEPTH, check_tree, parse_text, parse_value
from configs.unused import unused_fields

__all__ = [
    "FieldError",
    "PresetInfo",
    "SpecError",
    "apply_overrides",
    "list_presets",
    "load_preset",
    "merge",
    "parse_for_plan",
    "parse_spec",
    "parse_text",
    "with_preset",
]

KINDS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainJob,
    "finetune": FinetuneJob,
    "evaluate": EvaluateJob,
    "inspect": InspectJob,
    "export": ExportJob,
    "import": ImportJob,
    "search": SearchJob,
}

_Value = TypeVar("_Value")
MAX_OVERRIDES = 200
UNDECIDED = "ckpt_undecided"
"""Stands for a checkpoint that is not chosen yet, in plans."""


# -- overrides and merging ---------------------------------------------------------------------------------------------
def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with dotted keys set: {"optim.lr": "3e-4"}. Text values are read as YAML.

    Raises:
        SpecError: a key is empty or goes through something that is not a mapping, a value is not YAML, or there are
            more than 200 overrides.
    """
    if len(overrides) > MAX_OVERRIDES:
        raise SpecError.at("", f"{len(overrides)} overrides: at most {MAX_OVERRIDES} are taken, write a file instead")
    result = _copied(dict(raw))
    for dotted, given in overrides.items():
        parts = dotted.split(".")
        if not all(parts) or len(parts) > MAX_DEPTH:
            raise SpecError.at("", f"override {show(dotted)}: expected field names joined by dots, such as optim.lr")
        try:
            value = parse_value(given) if isinstance(given, str) else _copied(given)
        except SpecError as error:
            raise SpecError.at(to_pointer(parts), f"override {dotted!r}: {error.errors[0].message}", given) from None
        change: dict[str, Any] = {}
        here = change
        for depth, part in enumerate(parts[:-1]):
            current = value_at(result, tuple(parts[: depth + 1]))
            if current is not None and not isinstance(current, dict):
                pointer = to_pointer(parts[: depth + 1])
                raise SpecError.at(
                    pointer, f"override {dotted!r}: {'.'.join(parts[: depth + 1])} is no mapping", current
                )
            here[part] = {}
            here = here[part]
        # A whole mapping given as an override replaces what was there.
        here[parts[-1]] = value
        if isinstance(value, dict):
            result = _without(result, parts)
        result = merge(result, change)
    return result


def _without(raw: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    owner = value_at(raw, tuple(parts[:-1]))
    if isinstance(owner, dict):
        owner.pop(parts[-1], None)
    return raw


# Fields that say the same thing in different ways: giving one drops the others of what is overridden.
_ALTERNATIVES = (
    ("total_steps", "total_epochs", "total_examples"),
    ("warmup_steps", "warmup_epochs", "warmup_examples"),
    ("every_steps", "every_epochs", "every_examples"),
    ("fraction", "examples", "per_class"),
)
_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "stem", "resnet")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, mapping by mapping; lists and scalars are replaced, null included.

    What `over` says in other words replaces what it means: total_steps drops the base's total_epochs, a variant drops
    its five sizes, stem and resnet, another source type drops the old source.
    """
    if "type" in over and "type" in base and over["type"] != base["type"]:
        return _copied(dict(over))
    result = _copied(dict(base))
    for group in _ALTERNATIVES:
        if any(over.get(field) is not None for field in group):
            for field in group:
                result.pop(field, None)
    if over.get("variant") is not None:
        for field in _SIZES:
            result.pop(field, None)
    for key, value in over.items():
        current = result.get(key)
        both = isinstance(current, dict) and isinstance(value, dict)
        result[key] = merge(current, value) if both else _copied(value)  # type: ignore[arg-type]
    return result


# -- presets -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PresetInfo:
    """A preset: its header and the settings it stands for."""

    name: str
    kind: str
    title: str
    command: str
    source: str
    cost: str
    accuracy: str
    shown: str
    """Whether a run of ours has shown the accuracy: "no", or what was run."""
    spec: dict[str, Any]


_HEADER = ("command", "source", "cost", "accuracy", "shown")
_HEADER_LINE = re.compile(r"^#\s*([a-z]+):\s+(.*)$")


def list_presets() -> list[PresetInfo]:
    """Every preset, by name."""
    return [load_preset(name) for name in sorted(_preset_files()) if not name.rsplit("/", 1)[-1].startswith("_")]


def load_preset(name: str) -> PresetInfo:
    """The preset of that name.

    Raises:
        SpecError: there is none; the message names close ones.
    """
    public = {n for n in _preset_files() if not n.rsplit("/", 1)[-1].startswith("_")}
    if name not in public:
        hint = close_matches(name, public) or " See `patchwork presets`."
        raise SpecError.at("/preset", f"unknown preset {name!r}.{hint}", name, ", ".join(sorted(public)))
    title, header, raw = _read_preset(name)
    return PresetInfo(name=name, kind=raw["kind"], title=title, **header, spec=_copied(raw))


@cache
def _preset_files() -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry

    walk(resources.files("configs").joinpath("presets"), "")
    return found


@cache
def _read_preset(name: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    text = _preset_files()[name].read_text(encoding="utf-8")
    raw = parse_text(text)
    base = raw.pop("preset", None)
    if base is not None:
        raw = merge(_read_preset(base)[2], raw)
    title, header = _read_header(text)
    return title, header, raw


def _read_header(text: str) -> tuple[str, dict[str, str]]:
    """The first comment line is the title; `# key: value` lines follow, continued by indented comment lines."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    title = lines[0].lstrip("# ").rstrip(".") if lines else ""
    header = dict.fromkeys(_HEADER, "")
    key = ""
    for line in lines[1:]:
        match = _HEADER_LINE.match(line)
        if match and match[1] in header:
            key = match[1]
            header[key] = match[2].strip()
        elif key:
            header[key] = f"{header[key]} {line.lstrip('# ').rstrip()}".strip()
    return title, header


# -- the schema --------------------------------------------------------------------------------------------------------
def parse_spec(raw: Mapping[str, Any]) -> JobSpec:
    """The job description in `raw`, laid over its preset if it names one, checked against the schema.

    Raises:
        SpecError: with every fault found, each at the field it is about.
    """
    check_tree(dict(raw))
    merged = with_preset(raw)
    kind = merged.get("kind")
    names = ", ".join(KINDS)
    if kind is None:
        raise SpecError.at("/kind", f"kind is missing: expected one of {names}", None, names)
    if not isinstance(kind, str) or kind not in KINDS:
        hint = close_matches(kind, KINDS) if isinstance(kind, str) else ""
        raise SpecError.at("/kind", f"unknown kind {show(kind)}: expected one of {names}.{hint}", kind, names)
    spec = _validate(_plain_numbers(merged))
    if faults := unused_fields(raw, spec):
        raise SpecError(faults)
    return spec


def _validate(document: dict[str, Any]) -> JobSpec:
    """`document` against the schema, strictly: no text for numbers, no numbers for true and false."""
    try:
        return job_spec_adapter.validate_json(to_json(document), strict=True)
    except ValidationError as error:
        faults = field_errors(error, document, KINDS[document["kind"]])
    repaired = _repair_yaml_floats(document, faults)
    if repaired is None:
        raise SpecError(faults)
    return _validate(repaired)


def parse_for_plan(raw: Mapping[str, Any]) -> JobSpec:
    """As `parse_spec`; but of a fine-tune that says its own sizes the checkpoint need not be chosen yet.

    Raises:
        SpecError
    """
    try:
        return parse_spec(raw)
    except SpecError as error:
        if "init_from" in raw or [fault.pointer for fault in error.errors] != ["/init_from"]:
            raise
        spec = parse_spec({**raw, "init_from": UNDECIDED})
        if isinstance(spec, FinetuneJob) and spec.model.has_sizes:
            return spec
        raise


def with_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` laid over the preset it names; its name is still there.

    Raises:
        SpecError: there is no such preset, or it is of another kind.
    """
    name = raw.get("preset")
    if name is None:
        return _copied(dict(raw))
    if not isinstance(name, str):
        raise SpecError.at("/preset", f"{show(name)} is not allowed: expected text", name, "text")
    preset = load_preset(name)
    kind = raw.get("kind", preset.kind)
    if kind != preset.kind:
        raise SpecError.at(
            "/kind", f"kind {show(kind)} contradicts preset {name!r}, a {preset.kind} job", kind, preset.kind
        )
    return merge(preset.spec, raw)


def _copied(value: _Value) -> _Value:
    """A copy of the mappings and lists of a document; what they hold is never changed."""
    made: Any = value
    if isinstance(value, dict):
        made = {key: _copied(child) for key, child in value.items()}
    elif isinstance(value, list):
        made = [_copied(child) for child in value]
    return made  # type: ignore[no-any-return]


def _plain_numbers(value: Any) -> Any:
    """1e4 for 10000: a float without a fraction is a whole number, for strict fields (number fields take both)."""
    if isinstance(value, dict):
        return {key: _plain_numbers(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(child) for child in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


_YAML_1_1_GAP = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def _repair_yaml_floats(document: dict[str, Any], faults: Iterable[FieldError]) -> dict[str, Any] | None:
    """`1e-3` is text to a YAML 1.1 reader such as PyYAML's, which a caller may have used: where a number was expected
    and only there, such text is one. None if nothing was to repair."""
    repaired: dict[str, Any] | None = None
    for fault in faults:
        text = fault.value
        if isinstance(text, str) and "number" in (fault.allowed or "") and _YAML_1_1_GAP.match(text):
            repaired = _copied(document) if repaired is None else repaired
            _put(repaired, fault.pointer, _plain_numbers(float(text)))
    return repaired


def _put(document: Any, pointer: str, value: object) -> None:
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/"))
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]
    document[int(last) if isinstance(document, list) else last] = value
