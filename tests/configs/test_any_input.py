"""Whatever is sent, the answer is a job or a SpecError that points at fields; nothing else escapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from configs.errors import SpecError
from configs.load import parse_spec
from configs.resolve import canonical_json, load_resolved, resolve
from configs.spec import ExportJob
from configs.text import parse_text
from tests.configs.specs import CARD, EVALUATE, FINETUNE, PRETRAIN, source

T = TypeVar("T")
WORDS = st.sampled_from(
    ["auto", "null", "B/16", "1e-3", "sgd", "folder", "", "/", "~1", "é", "ckpt_x", "min", "gap", "sigmoid", "bf16"]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 64, 2**53, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan")])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=5))
FIELDS = st.sampled_from(
    [
        "type",
        "name",
        "min",
        "max",
        "fraction",
        "per_class",
        "total_steps",
        "warmup_epochs",
        "lr",
        "variant",
        "x",
        "seed",
    ]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4), max_leaves=6
)
# A fine-tune and an evaluation with everything spelled out, so that every field can be replaced.
COMPLETE: dict[str, dict[str, Any]] = {
    base["kind"]: parse_spec(base).model_dump(mode="json") for base in (PRETRAIN, FINETUNE, EVALUATE)
}


def outcome(step: Callable[[], T]) -> T | SpecError:
    try:
        return step()
    except SpecError as error:
        return error


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    return [here, *(path for key, child in inner for path in paths(child, (*here, key)))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_anywhere(data: st.DataObject) -> None:
    raw = copy.deepcopy(COMPLETE[data.draw(st.sampled_from(sorted(COMPLETE)))])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(raw)[1:]))
        here: Any = raw
        for part in path[:-1]:
            here = here[part]
        here[path[-1]] = data.draw(VALUES)
    src = source(data=DataConfig.model_validate(PRETRAIN["data"]))
    spec = outcome(lambda: resolve(parse_spec(raw), CARD, src))
    if isinstance(spec, SpecError):
        assert spec.errors
        assert all(fault.pointer == "" or fault.pointer.startswith("/") for fault in spec.errors)
        assert all(fault.message for fault in spec.errors)
        return
    stored = canonical_json(spec)
    assert load_resolved(stored) == spec
    assert isinstance(spec, ExportJob) or resolve(spec, CARD, src) == spec


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}[]:,-&*!|>'\"#%@` \n\tab1.e~", max_size=40))
def test_any_text(text: str) -> None:
    found = outcome(lambda: parse_text(text))
    assert isinstance(found, dict) or found.errors[0].message
