"""`make pictures`: its jobs are valid, and the documents show what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.load import parse_spec
from configs.model import VitConfig
from configs.pictures import pictures_of
from configs.spec import InspectJob, PretrainJob
from orchestrator.cli.demo import PRETRAIN, DemoError
from orchestrator.cli.gallery import GALLERY, inspection, trained_by_the_demo, training, write_gallery
from orchestrator.client import Client
from orchestrator.schemas import JobPublic
from tests.orchestrator.test_cli import job

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def model_of(spec: dict[str, Any]) -> VitConfig:
    found = parse_spec(spec)
    assert isinstance(found, PretrainJob)
    return found.model.model_copy(update={"num_classes": 10}).vit()


def test_its_models_have_the_pictures_it_shows() -> None:
    demo = model_of({"preset": PRETRAIN})
    models = {"vit": demo} | {name: model_of(spec) for name, spec in training().items()}
    assert models["start"] == models["vit"]
    assert (models["vit"].grid, models["hybrid"].grid) == ((4, 4), (7, 7))
    for owner, picture in GALLERY.values():
        assert picture in pictures_of(models[owner])


def test_its_hybrid_is_trained_as_the_demo_trains() -> None:
    demo, hybrid = parse_spec({"preset": PRETRAIN}), parse_spec(training()["hybrid"])
    assert isinstance(demo, PretrainJob)
    assert isinstance(hybrid, PretrainJob)
    assert hybrid.model_copy(update={"model": demo.model, "name": demo.name}) == demo


def test_its_start_is_the_initial_weights() -> None:
    """One step, at the beginning of a warm-up: its learning rate is 0."""
    spec = parse_spec(training()["start"])
    assert isinstance(spec, PretrainJob)
    assert (spec.schedule.total_steps, spec.schedule.warmup_steps) == (1, 1)


@pytest.mark.parametrize("name", ["gallery-start", "another"])
def test_it_looks_at_the_model_of_the_demo_and_at_no_other(name: str) -> None:
    theirs = job(id="job_01ARZ3NDEKTSV4RRFFQ69G5FAA", name=name, preset=None if name == "another" else PRETRAIN)
    demos = job(id="job_01ARZ3NDEKTSV4RRFFQ69G5FAB", preset=PRETRAIN)

    def found_in(*jobs: dict[str, Any]) -> JobPublic:
        page = {"items": list(jobs), "next_cursor": None}
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json=page))
        with Client("http://patchwork.test", "t", transport=transport) as client:
            return trained_by_the_demo(client)

    assert found_in(theirs, demos).id == demos["id"]
    with pytest.raises(DemoError, match="run make demo"):
        found_in(theirs)


def test_it_waits_for_what_it_looks_at() -> None:
    owner = JobPublic.model_validate(job())
    for name in ("vit", *training()):
        spec = parse_spec(inspection(name, owner))
        assert isinstance(spec, InspectJob)
        assert spec.queue.depends_on == (owner.id,)


def test_the_documents_show_what_it_writes(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, content=b"PNG")

    looking = {
        name: JobPublic.model_validate(job(id=f"job_01ARZ3NDEKTSV4RRFFQ69G5FA{letter}"))
        for name, letter in zip(("start", "vit", "hybrid"), "ABC", strict=True)
    }
    with Client("http://patchwork.test", "t", transport=httpx.MockTransport(answer)) as client:
        write_gallery(client, looking, tmp_path / "new")
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {path.name for path in PICTURES.iterdir()}
    assert len(asked) == len(set(asked)) == len(GALLERY)
    text = (PICTURES.parent / "pictures.md").read_text()
    assert not [name for name in written if f"](pictures/{name})" not in text]


@pytest.mark.parametrize("name", sorted(GALLERY))
def test_the_pictures_of_the_documents_are_small(name: str) -> None:
    assert 5_000 < (PICTURES / f"{name}.png").stat().st_size < 150_000
