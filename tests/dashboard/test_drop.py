"""Images that are dropped on a page: who may, and what is told of those that are refused. Without a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from configs.layout import image_key
from orchestrator.api.app import create_app
from orchestrator.dashboard.mount import Dashboard, Services
from orchestrator.schemas import Role, TokenCreate
from orchestrator.services.auth import Actor
from orchestrator.services.images import MAX_IMAGE_BYTES
from orchestrator.services.tokens import create_token
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import StoreUnavailable
from tests.fakes.memory_store import MemoryStore

IMAGES = "/dashboard/files/images"
PNG = b"\x89PNG\r\n\x1a\n and so on"
ROOT = Actor("tok_test", "root", "admin")


class Visit:
    """A visitor of a dashboard whose pages are loaded once for all tests: NiceGUI has one application for a process."""

    def __init__(self, http: TestClient, db: Database, store: MemoryStore) -> None:
        self.http, self.db, self.store = http, db, store

    def log_in(self, role: Role) -> TestClient:
        self.http.cookies.clear()
        made = create_token(self.db, ROOT, TokenCreate(name="someone", role=role))
        assert self.http.post("/dashboard/login", data={"token": made.token}).status_code == 303
        return self.http

    @property
    def num_kept(self) -> int:
        return len(list(self.store.list("images/")))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("drop")
    shutil.copy(sqlite_template, folder / "patchwork.db")
    db, store = Database(f"sqlite:///{folder}/patchwork.db"), MemoryStore()
    settings = Settings(session_secret="a secret of the tests")
    app = create_app(settings, db, store, Dashboard(Services(settings, db, store)))
    with TestClient(app, follow_redirects=False, base_url="http://patchwork.test") as client:
        yield Visit(client, db, store)
    db.close()


@pytest.fixture
def visit(loaded: Visit) -> Visit:
    loaded.http.cookies.clear()
    loaded.store.delete([found.key for found in loaded.store.list("images/")])
    return loaded


def test_a_dropped_image_is_kept(visit: Visit) -> None:
    answer = visit.log_in("member").post(IMAGES, content=PNG, headers={"Origin": "http://patchwork.test"})
    assert answer.status_code == 201, answer.text
    assert visit.store.get(image_key(answer.json()["id"])) == PNG


def test_what_is_no_image_or_too_large_is_told(visit: Visit) -> None:
    http = visit.log_in("member")
    refused = http.post(IMAGES, content=b"a note")
    assert (refused.status_code, refused.text) == (422, "This is not an image.")
    assert http.post(IMAGES, content=PNG + bytes(MAX_IMAGE_BYTES)).status_code == 413
    assert visit.num_kept == 0


def test_nobody_else_drops_images(visit: Visit) -> None:
    assert visit.http.post(IMAGES, content=PNG).status_code == 401
    assert visit.log_in("viewer").post(IMAGES, content=PNG).status_code == 403
    http = visit.log_in("member")
    for origin in ("http://elsewhere.test", "null"):
        assert http.post(IMAGES, content=PNG, headers={"Origin": origin}).status_code == 403
    assert visit.num_kept == 0


def test_a_store_that_is_away_is_told_in_words(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(visit.store, "put", away)
    answer = visit.log_in("member").post(IMAGES, content=PNG)
    assert answer.status_code == 503
    assert answer.text == "The object store cannot be reached at the moment. Try again."
