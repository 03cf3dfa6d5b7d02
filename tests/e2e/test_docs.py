"""What the documents say is so: commands, presets, files and functions, fields, settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from configs.load import list_presets, parse_spec
from configs.service import Queue, Resources, Retry
from configs.spec import EvaluateJob, ExportJob, FinetuneJob, InspectJob, PretrainJob, SearchJob
from orchestrator.cli.main import run
from orchestrator.settings import Settings
from workers.node import NodeSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
ALL = "\n".join(TEXTS.values())


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language, with the document they are in."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(name, match[1]) for name, text in TEXTS.items() for match in pattern.finditer(text)]


def commands(program: str) -> list[str]:
    """Command lines of a program: in shell blocks and in presets' headers."""
    lines = [line.split(" #")[0].strip() for _, block in blocks("bash") for line in block.splitlines()]
    lines += [preset.command for preset in list_presets()]
    return sorted({line for line in lines if line.split()[:1] == [program]})


@pytest.mark.parametrize("line", commands("patchwork"))
def test_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    # --help is looked at after unknown commands and options were refused, and before anything is done.
    arguments = shlex.split(line)[1:]
    assert run([*arguments, "--help"]) == 0, capsys.readouterr().err
    if "--preset" in arguments:
        assert arguments[arguments.index("--preset") + 1] in {preset.name for preset in list_presets()}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", ALL, re.MULTILINE))
    assert mentioned
    assert {a or b for a, b in mentioned} <= targets


@pytest.mark.parametrize(("name", "block"), blocks("yaml"))
def test_job_descriptions_are_valid(name: str, block: str) -> None:
    kinds = ("pretrain", "finetune", "evaluate", "inspect", "export", "search")
    assert parse_spec(yaml.safe_load(block)).kind in kinds, name


@pytest.mark.parametrize(("name", "block"), blocks("python"))
def test_python_parses(name: str, block: str) -> None:
    compile(block, name, "exec")


def test_files_functions_and_links_exist() -> None:
    named = re.findall(r"`((?:configs|vit|workers|orchestrator|infra|tests)/[\w/.-]+\.(?:py|sh))(?::([\w.]+))?`", ALL)
    assert len(named) > 30
    for path, symbol in named:
        assert (ROOT / path).is_file(), path
        if symbol:
            source = (ROOT / path).read_text()
            assert re.search(rf"^\s*(?:async )?(?:def|class) {symbol}\b", source, re.MULTILINE), f"{path}:{symbol}"
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def fields(model: type[BaseModel]) -> set[str]:
    """The names of all fields of a model and of the models in it."""
    found = set(model.model_fields)
    for definition in model.model_json_schema().get("$defs", {}).values():
        found |= set(definition.get("properties", {}))
    return found


def test_every_field_of_a_job_is_documented() -> None:
    text = TEXTS["docs/jobs.md"]
    for model in (PretrainJob, FinetuneJob, EvaluateJob, InspectJob, ExportJob):
        missing = {field for field in fields(model) if not re.search(rf"\b{field}\b", text)}
        assert not missing


def test_every_field_of_a_search_is_documented() -> None:
    text = TEXTS["docs/search.md"]
    common = set(ExportJob.model_fields) - {"resources"}
    own = fields(SearchJob) - common - fields(Resources) - fields(Queue) - fields(Retry)
    assert not {field for field in own if not re.search(rf"\b{field}\b", text)}


def test_every_setting_is_documented() -> None:
    control_plane, _, nodes = TEXTS["docs/production.md"].partition("## The nodes")
    assert not {name for name in Settings.model_fields if f"`{name}`" not in control_plane}
    assert not {name for name in NodeSettings.model_fields if f"`{name}`" not in nodes}


def test_the_readme_names_every_document() -> None:
    readme = TEXTS["README.md"]
    assert not [name for name in TEXTS if name != "README.md" and f"]({name})" not in readme]


def test_every_test_that_the_fault_table_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXTS["docs/faults.md"])
    assert len(named) > 20
    for path, function in named:
        assert re.search(rf"^def {function}", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{function}"
