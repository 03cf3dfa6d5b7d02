"""What axe-core finds on each page, in light and in dark; and that pages can be used from the keyboard alone."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.dashboard.conftest import ADMIN, Server, visiting

_SERIOUS = ("serious", "critical")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_serious_findings(browser: Browser, server: Server, scheme: str) -> None:
    ids = server.ids
    tabs = [f"/jobs/{ids['running']}?tab={tab}" for tab in ("curves", "attempts", "logs", "checkpoints", "description")]
    compare = f"/compare?jobs={ids['running']},{ids['done']}"
    paths = ["/overview", "/jobs", *tabs, f"/jobs/{ids['failed']}", "/submit", compare, "/tokens"]
    # axe is put into the page as a script of its own, which the pages' policy would not let run.
    with visiting(browser, server.url, color_scheme=scheme, bypass_csp=True) as visitor:
        visitor.page.goto(f"{server.url}/dashboard/login")
        found = {"/login": _findings(visitor.page)}
        visitor.log_in(ADMIN)
        for path in paths:
            page = visitor.go(path)
            page.wait_for_function("window.socket && window.socket.connected")
            found[path] = _findings(page)
        assert {path: findings for path, findings in found.items() if findings} == {}


def _findings(page: Any) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]} {v['nodes'][0]['failureSummary'][:300]}"
        for v in violations
        if v["impact"] in _SERIOUS
    ]


def test_a_keyboard_is_enough(browser: Browser, server: Server) -> None:
    with visiting(browser, server.url) as visitor:
        page = visitor.page
        page.goto(f"{server.url}/dashboard/login?next=/jobs")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Jobs").wait_for()
        page.wait_for_function("window.socket && window.socket.connected")
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to main content")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Submit a job")).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.type("too-large")
        link = page.get_by_role("table", name="Jobs").locator("a.name")
        expect(link).to_have_text(["too-large"])
        link.focus()
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Fork").wait_for()
        page.get_by_role("button", name="Fork").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
