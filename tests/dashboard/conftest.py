"""A browser (Debian's chromium), and servers on SQLite databases that are filled with rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from orchestrator.schemas import Role, TokenCreate
from orchestrator.services.auth import Actor
from orchestrator.services.tokens import create_token, ensure_admin_token
from orchestrator.storage.db import Database
from tests.dashboard.filled import fill
from tests.orchestrator.test_api_process import free_port

ADMIN = "pw_admin-token-of-the-tests"
_PATIENCE_MS = 30_000
"""A busy machine takes its time; what never comes is waited for as long."""
BROWSER_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser. Its absence is a failure with what to do about it.

    As long as it is there Playwright keeps an event loop running in this thread, and no test can run one of its own.
    """
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is missing, the dashboard's tests drive it: apt-get install chromium (as .ci/run does)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One for all tests of this folder."""
    with chromium() as browser:
        yield browser


@dataclass
class Server:
    """An API process with the dashboard. `db` is the same database; `ids` are the jobs of `fill`, by name."""

    url: str
    folder: Path
    db: Database
    ids: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and return once it answers."""
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST" and not k.startswith("PATCHWORK_")}
        env["PATCHWORK_SETTINGS_FILE"] = str(self.folder / "settings.json")
        command = [sys.executable, "-m", "orchestrator.api.server"]
        with (self.folder / "api.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "api.log").read_text()
            try:
                if httpx.get(f"{self.url}/healthz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        pytest.fail("the API did not answer within 60 s")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
            self.process = None

    def token(self, role: Role) -> str:
        """A new token with this role."""
        return create_token(self.db, Actor("tok_test", "root", "admin"), TokenCreate(name=f"a {role}", role=role)).token


@contextmanager
def serving(folder: Path, template: Path) -> Iterator[Server]:
    """A server on a database of its own, filled."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(template, folder / "patchwork.db")
    url = f"sqlite:///{folder}/patchwork.db"
    db = Database(url)
    ensure_admin_token(db, ADMIN, "root")
    port = free_port()
    settings = {
        "database_url": url,
        "s3_endpoint": "http://127.0.0.1:1",
        "s3_access_key": "key",
        "s3_secret_key": "secret",
        "worker_secret": "worker-secret",
        "session_secret": "session-secret",
        "port": port,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    server = Server(f"http://127.0.0.1:{port}", folder, db, fill(db))
    try:
        server.start()
        yield server
    finally:
        server.stop()
        db.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Server]:
    """One for all tests that change nothing which others look at."""
    with serving(tmp_path_factory.mktemp("dashboard"), sqlite_template) as server:
        yield server


class Visitor:
    """A person at a browser: a page with a session of its own, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def log_in(self, token: str, path: str = "/") -> None:
        self.page.goto(f"{self.url}/dashboard/login?next={path}")
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(lambda url: "/login" not in url)

    def go(self, path: str) -> Page:
        """Open a page of the dashboard and wait for its heading."""
        self.page.goto(f"{self.url}/dashboard{path}")
        self.page.locator("h1").first.wait_for()
        return self.page


@contextmanager
def visiting(browser: Browser, url: str, **options: object) -> Iterator[Visitor]:
    """A browser context of its own, closed at the end."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})  # type: ignore[arg-type]
    context.set_default_timeout(_PATIENCE_MS)
    expect.set_options(timeout=_PATIENCE_MS)
    try:
        yield Visitor(context.new_page(), url)
    finally:
        context.close()


@pytest.fixture
def admin(browser: Browser, server: Server) -> Iterator[Visitor]:
    """An administrator who is logged in. No page of theirs may report an error."""
    with visiting(browser, server.url) as visitor:
        visitor.log_in(ADMIN)
        yield visitor
        assert visitor.errors == []
