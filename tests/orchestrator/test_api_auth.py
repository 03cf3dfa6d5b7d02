"""Tokens and roles: what opens which door."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select, update
from starlette.testclient import TestClient

from orchestrator.api.app import create_app
from orchestrator.schemas import Role
from orchestrator.services.tokens import ensure_admin_token
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import TokenRow
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import ADMIN_TOKEN, headers_for
from tests.orchestrator.rows import spec_with

OPEN = {"/healthz", "/readyz", "/openapi.json"}


def operations(app: FastAPI) -> list[tuple[str, str]]:
    """Every (method, path) of the document, ids filled in."""
    paths = app.openapi()["paths"]
    return [(method.upper(), re.sub(r"\{[^}]+\}", "x", path)) for path, item in paths.items() for method in item]


def test_every_route_but_health_wants_a_token(anonymous: TestClient, app: FastAPI) -> None:
    closed = [(method, path) for method, path in operations(app) if path not in OPEN]
    assert len(closed) > 30
    for method, path in closed:
        for headers in ({}, {"Authorization": "Bearer pw_wrong"}, {"Authorization": "Basic cm9vdDpyb290"}):
            response = anonymous.request(method, path, headers=headers, content=b"{}")
            assert response.status_code == 401, (method, path, response.text)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            assert response.headers["Content-Type"] == "application/problem+json"
            assert response.json()["code"] == "unauthorized"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer  ", "bearer pw_\u00e9", "Bearer " + "x" * 5000])
def test_odd_headers_are_unauthorized(anonymous: TestClient, header: str) -> None:
    response = anonymous.get("/v1/jobs", headers={"Authorization": header.encode("latin-1")})
    assert response.status_code == 401


def test_a_user_token_opens_no_internal_route_and_the_worker_secret_nothing_else(
    api: TestClient, anonymous: TestClient, driver: dict[str, str]
) -> None:
    path = "/internal/v1/attempts/att_01JD3Q8Z6M0000000000000000_0001/claim"
    assert api.post(path, json={}).status_code == 401
    assert anonymous.get("/v1/jobs", headers=driver).status_code == 401
    assert anonymous.post(path, json={"nonce": "n" * 16, "node": "n", "pid": 1}, headers=driver).status_code == 404


def test_without_a_worker_secret_no_driver_gets_in(db: Database, store: MemoryStore) -> None:
    with TestClient(create_app(Settings(), db, store)) as client:
        response = client.post("/internal/v1/attempts/x/claim", json={}, headers={"Authorization": "Bearer "})
        assert response.status_code == 401


@pytest.mark.parametrize(
    ("role", "submit", "tokens"), [("viewer", 403, 403), ("member", 201, 403), ("admin", 201, 200)]
)
def test_roles(anonymous: TestClient, db: Database, role: Role, submit: int, tokens: int) -> None:
    headers = headers_for(db, role)
    assert anonymous.get("/v1/jobs", headers=headers).status_code == 200
    assert anonymous.post("/v1/plans", json={"spec": spec_with()}, headers=headers).status_code == 200
    assert anonymous.post("/v1/jobs", json={"spec": spec_with()}, headers=headers).status_code == submit
    assert anonymous.get("/v1/tokens", headers=headers).status_code == tokens
    assert anonymous.get("/v1/whoami", headers=headers).json()["role"] == role


@pytest.mark.db
def test_a_token_is_shown_once_and_stored_as_a_hash(api: TestClient, db: Database) -> None:
    response = api.post("/v1/tokens", json={"name": "ci", "role": "viewer", "expires_in_s": 3600})
    assert response.status_code == 201
    assert response.headers["Cache-Control"] == "no-store"
    created = response.json()
    assert re.fullmatch(r"pw_[A-Za-z0-9_-]{43}", created["token"])
    listed = api.get("/v1/tokens")
    assert created["token"] not in listed.text
    assert {(item["name"], item["role"]) for item in listed.json()["items"]} == {("ci", "viewer"), ("root", "admin")}
    with db.reader() as session:
        row = session.scalars(select(TokenRow).where(TokenRow.id == created["id"])).one()
    assert row.sha256 == hashlib.sha256(created["token"].encode()).hexdigest()
    whoami = api.get("/v1/whoami", headers={"Authorization": f"Bearer {created['token']}"}).json()
    assert whoami == {"name": "ci", "role": "viewer", "token_id": created["id"]}


def test_a_revoked_or_expired_token_is_useless(api: TestClient, db: Database) -> None:
    revoked = api.post("/v1/tokens", json={"name": "a"}).json()
    expired = api.post("/v1/tokens", json={"name": "b", "expires_in_s": 60}).json()
    assert api.delete(f"/v1/tokens/{revoked['id']}").status_code == 204
    assert api.delete(f"/v1/tokens/{revoked['id']}").status_code == 204
    with db.session() as session:
        past = datetime.now(UTC) - timedelta(seconds=1)
        session.execute(update(TokenRow).where(TokenRow.id == expired["id"]).values(expires_at=past))
    for token, word in ((revoked, "revoked"), (expired, "expired")):
        response = api.get("/v1/jobs", headers={"Authorization": f"Bearer {token['token']}"})
        assert response.status_code == 401
        assert word in response.json()["detail"]


def test_the_last_administrator_stays(api: TestClient, db: Database) -> None:
    root = api.get("/v1/whoami").json()["token_id"]
    assert api.delete(f"/v1/tokens/{root}").status_code == 409
    headers_for(db, "admin")
    assert api.delete(f"/v1/tokens/{root}").status_code == 204


def test_an_unknown_token_id_is_not_found(api: TestClient) -> None:
    assert api.delete("/v1/tokens/tok_none").status_code == 404


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/name"),
        ({"name": "a", "role": "root"}, "/role"),
        ({"name": "a\x00"}, "/name"),
        ({"name": "a" * 65}, "/name"),
        ({"name": "a", "expires_in_s": 1}, "/expires_in_s"),
        ({"name": "a", "token": "mine"}, "/token"),
    ],
)
def test_a_wrong_token_request_is_named(api: TestClient, body: dict[str, Any], pointer: str) -> None:
    response = api.post("/v1/tokens", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


def test_the_bootstrap_token_is_made_once(db: Database) -> None:
    for _ in range(2):
        ensure_admin_token(db, ADMIN_TOKEN, "root")
    with db.reader() as session:
        assert [row.role for row in session.scalars(select(TokenRow))] == ["admin"]
