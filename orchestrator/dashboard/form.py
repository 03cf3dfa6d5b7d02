"""The form of a job description, made of its schema: what can be set, with its words, its choices and its default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from configs.load import KINDS

FORM_KINDS = ("pretrain", "finetune", "evaluate", "export")
_NOT_SET_HERE = ("schema_version", "kind", "preset")
_ESSENTIAL = (
    "name",
    "init_from",
    "format",
    "data.source.type",
    "data.source.name",
    "model.variant",
    "model.image_size",
    "schedule.total_epochs",
    "schedule.total_steps",
    "train.global_batch_size",
    "optim.lr",
    "resources.workers",
    "resources.gpus_per_worker",
    "zero.stage",
    "queue.priority",
    "queue.project",
)
_WORDS = {
    "data.source.type": "Data source",
    "data.source.name": "Data set",
    "init_from": "Checkpoint to start from",
    "zero.stage": "ZeRO stage",
    "lr": "Learning rate",
    "gpus_per_worker": "GPUs per worker",
    "cpus_per_worker": "CPUs per worker",
    "qk_norm": "QK norm",
    "mlp_dim": "MLP dim",
    "gelu": "GELU",
}


@dataclass(frozen=True)
class FormField:
    """One field of a description. `options` is empty where it may be anything."""

    path: str
    help: str
    default: str
    options: tuple[str, ...]

    @property
    def group(self) -> str:
        """The part of the description that it belongs to."""
        return self.path.partition(".")[0]

    @property
    def label(self) -> str:
        name = self.path.rpartition(".")[2]
        return _WORDS.get(self.path) or _WORDS.get(name) or name.replace("_", " ").capitalize()


def essentials(kind: str) -> tuple[FormField, ...]:
    """The fields that most descriptions set, in a sensible order."""
    fields = {field.path: field for field in form_fields(kind)}
    return tuple(fields[path] for path in _ESSENTIAL if path in fields)


def groups(kind: str) -> dict[str, tuple[FormField, ...]]:
    """Every other field, by the part of the description that it belongs to."""
    found: dict[str, list[FormField]] = {}
    for field in form_fields(kind):
        if field.path not in _ESSENTIAL:
            found.setdefault(field.group if "." in field.path else "general", []).append(field)
    return {group: tuple(fields) for group, fields in found.items()}


@cache
def form_fields(kind: str) -> tuple[FormField, ...]:
    """Every field of this kind of job, in the order of its schema."""
    schema = KINDS[kind].model_json_schema()
    found: dict[str, FormField] = {}
    for field in _fields(schema, schema.get("$defs", {}), ""):
        other = found.get(field.path)
        if other is not None:
            # The same name in several forms of one thing, such as data sources.
            both = other.options and field.options
            options = tuple(dict.fromkeys(other.options + field.options)) if both else ()
            field = FormField(field.path, other.help or field.help, other.default, options)
        found[field.path] = field
    return tuple(found.values())


def _fields(schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str) -> Iterator[FormField]:
    for name, raw in schema.get("properties", {}).items():
        if not prefix and name in _NOT_SET_HERE:
            continue
        path = f"{prefix}{name}"
        forms = [_resolve(form, defs) for form in _forms(raw)]
        inner = [form for form in forms if "properties" in form]
        if inner and all("properties" in form or form.get("type") == "null" for form in forms):
            for form in inner:
                yield from _fields(form, defs, f"{path}.")
        else:
            help = str(raw.get("description") or next((f["description"] for f in forms if "description" in f), ""))
            yield FormField(path, help, _shown(raw.get("default")), _options(forms))


def _forms(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a field; itself where it has none."""
    forms: list[Mapping[str, Any]] = raw.get("anyOf") or raw.get("oneOf") or [raw]
    return forms


def _resolve(form: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = defs[form["$ref"].rpartition("/")[2]] if "$ref" in form else form
    return found


def _options(forms: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """What may be chosen; nothing where other values are allowed, too."""
    options: list[str] = []
    for form in forms:
        if "enum" in form:
            options += map(_shown, form["enum"])
        elif "const" in form:
            options.append(_shown(form["const"]))
        elif form.get("type") == "boolean":
            options += ["true", "false"]
        elif form.get("type") == "null":
            options.append("null")
        else:
            return ()
    return tuple(options)


def _shown(value: Any) -> str:
    """A value as it is written in a job file."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def value_at(spec: Mapping[str, Any], path: str) -> str:
    """What a description says at a dotted path, as text; empty where it says nothing."""
    here: Any = spec
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return ""
        here = here[part]
    return "null" if here is None else _shown(here)
