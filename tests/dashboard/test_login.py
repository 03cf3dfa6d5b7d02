"""Who gets in, with which cookie and which headers: asked without a browser, and without loading a page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from orchestrator.api.app import create_app
from orchestrator.dashboard.mount import Dashboard, Services
from orchestrator.schemas import TokenCreate
from orchestrator.services.auth import Actor
from orchestrator.services.tokens import create_token, revoke_token
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from tests.fakes.memory_store import MemoryStore

ROOT = Actor("tok_test", "root", "admin")


@pytest.fixture
def http(db: Database) -> Iterator[TestClient]:
    settings = Settings(session_secret="a secret of the tests")
    store = MemoryStore()
    app = create_app(settings, db, store, Dashboard(Services(settings, db, store)))
    with TestClient(app, follow_redirects=False, base_url="http://patchwork.test") as client:
        yield client


@pytest.fixture
def token(db: Database) -> str:
    return create_token(db, ROOT, TokenCreate(name="someone")).token


def test_a_stranger_is_led_to_the_login_page_and_back(http: TestClient, token: str) -> None:
    answer = http.get("/dashboard/jobs?state=RUNNING&q=a%26b")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/dashboard/login?next=%2Fjobs%3Fstate%3DRUNNING%26q%3Da%2526b"
    page = http.get(answer.headers["location"])
    assert page.status_code == 200
    assert 'value="/jobs?state=RUNNING&amp;q=a%26b"' in page.text
    answer = http.post("/dashboard/login", data={"token": token, "next": "/jobs?state=RUNNING"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/jobs?state=RUNNING")
    assert http.get("/dashboard/").headers["location"] == "/dashboard/overview"


def test_the_root_leads_to_the_dashboard_and_v1_is_as_it_was(http: TestClient) -> None:
    assert http.get("/").headers["location"] == "/dashboard"
    missing = http.get("/v1/nothing")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
    assert http.get("/v1/jobs").status_code == 401


def test_the_cookie_is_for_the_dashboard_only_and_does_not_hold_the_token(http: TestClient, token: str) -> None:
    answer = http.post("/dashboard/login", data={"token": token})
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=lax", "Path=/dashboard", "Max-Age=604800"):
        assert part in cookie
    assert token not in cookie
    assert "Secure" not in cookie, "this is plain HTTP"
    assert http.get("/v1/whoami").status_code == 401, "a session is no token"


@pytest.mark.parametrize("wrong", ["", "pw_unknown", "\x00", "x" * 5000])
def test_a_wrong_token_is_refused_with_the_reason(http: TestClient, wrong: str) -> None:
    answer = http.post("/dashboard/login", data={"token": wrong})
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text
    assert "set-cookie" not in answer.headers


def test_a_session_ends_with_its_token(http: TestClient, db: Database) -> None:
    made = create_token(db, ROOT, TokenCreate(name="someone"))
    http.post("/dashboard/login", data={"token": made.token})
    assert http.get("/dashboard/").headers["location"] == "/dashboard/overview"
    revoke_token(db, made.id)
    assert "/login" in http.get("/dashboard/").headers["location"]


def test_a_forged_or_cut_cookie_is_no_session(http: TestClient, token: str) -> None:
    http.post("/dashboard/login", data={"token": token})
    good = http.cookies["patchwork_session"]
    body, _, signature = good.rpartition(".")
    token_id, _, ends = body.rpartition(".")
    for forged in (f"{token_id}.{int(ends) + 9999}.{signature}", body, signature, f"..{signature}", good[:-1], "é.1.x"):
        http.cookies.clear()
        answer = http.get("/dashboard/", headers={"Cookie": f"patchwork_session={forged}".encode()})
        assert "/login" in answer.headers["location"], forged


def test_logging_out_forgets_the_session_when_our_own_page_asks(http: TestClient, token: str) -> None:
    http.post("/dashboard/login", data={"token": token})
    http.get("/dashboard/logout")
    http.post("/dashboard/logout", headers={"Origin": "http://elsewhere.test"})
    assert http.get("/dashboard/").headers["location"] == "/dashboard/overview"
    http.post("/dashboard/logout", headers={"Origin": "http://patchwork.test"})
    assert "/login" in http.get("/dashboard/").headers["location"]


@pytest.mark.parametrize("wanted", ["//evil.test", "https://evil.test", "/\\evil.test", "/login", "jobs", "/a\nb"])
def test_the_way_back_never_leads_elsewhere(http: TestClient, token: str, wanted: str) -> None:
    answer = http.post("/dashboard/login", data={"token": token, "next": wanted})
    assert answer.headers["location"] == "/dashboard/"


def test_another_site_can_neither_log_in_nor_open_a_socket(http: TestClient, token: str) -> None:
    answer = http.post("/dashboard/login", data={"token": token}, headers={"Origin": "http://evil.test"})
    assert answer.status_code == 403
    http.post("/dashboard/login", data={"token": token})
    with (
        pytest.raises(WebSocketDisconnect),
        http.websocket_connect("/dashboard/_nicegui_ws/socket.io", headers={"Origin": "http://evil.test"}),
    ):
        pass
    http.cookies.clear()
    with pytest.raises(WebSocketDisconnect), http.websocket_connect("/dashboard/_nicegui_ws/socket.io"):
        pass


def test_pages_may_run_no_script_but_their_own(http: TestClient) -> None:
    first, second = (http.get("/dashboard/login").headers["content-security-policy"] for _ in range(2))
    policy = dict(part.strip().split(" ", 1) for part in first.split(";"))
    assert policy["default-src"] == "'none'"
    assert "'unsafe-inline'" not in policy["script-src"]
    assert "'nonce-" in policy["script-src"]
    assert policy["frame-ancestors"] == "'none'"
    assert "http" not in first, "nothing comes from another host"
    assert first != second, "a nonce is good for one page"


def test_styles_and_pictures_are_there_for_strangers(http: TestClient) -> None:
    for name in ("login.css", "patchwork.css", "patchwork.js", "patchwork.svg"):
        answer = http.get(f"/dashboard/static/{name}")
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert http.get("/dashboard/static/../mount.py").status_code in (303, 404)
    assert http.get("/dashboard/static/%2e%2e/mount.py").status_code == 404
