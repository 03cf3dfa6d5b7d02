"""The API on a database of the test's own and an object store in memory, with a token for every role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from fastapi import FastAPI
from starlette.testclient import TestClient

from orchestrator.api.app import create_app
from orchestrator.schemas import Role, TokenCreate
from orchestrator.services.auth import Actor
from orchestrator.services.tokens import create_token, ensure_admin_token
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from tests.fakes.memory_store import MemoryStore

ADMIN_TOKEN = "pw_admin-token-of-the-tests"
WORKER_SECRET = "worker-secret-of-the-tests"


@pytest.fixture(autouse=True, scope="session")
def plain_logs() -> None:
    """structlog's default draws tracebacks with every local variable, which takes seconds."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    root = tmp_path / "images"
    root.mkdir()
    return Settings(worker_secret=WORKER_SECRET, data_root=root)


@pytest.fixture
def app(settings: Settings, db: Database, store: MemoryStore) -> FastAPI:
    ensure_admin_token(db, ADMIN_TOKEN, "root")
    return create_app(settings, db, store)


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    """A client without a token."""
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def api(anonymous: TestClient) -> TestClient:
    """An administrator's client."""
    anonymous.headers["Authorization"] = f"Bearer {ADMIN_TOKEN}"
    return anonymous


@pytest.fixture
def driver() -> dict[str, str]:
    """Headers of a driver."""
    return {"Authorization": f"Bearer {WORKER_SECRET}"}


def headers_for(db: Database, role: Role) -> dict[str, str]:
    """Headers of a new token with this role."""
    token = create_token(db, Actor("tok_test", "root", "admin"), TokenCreate(name=f"a {role}", role=role)).token
    return {"Authorization": f"Bearer {token}"}
