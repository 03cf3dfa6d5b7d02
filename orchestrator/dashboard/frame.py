"""What every page has: navigation, theme, whoever is logged in, and how it follows feeds and acts for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import structlog
from fastapi import Request
from nicegui import Client, ui

from configs.errors import SpecError
from orchestrator.dashboard import parts
from orchestrator.dashboard.access import COOKIE, PATH, Access
from orchestrator.dashboard.feeds import Feed, Feeds, Look, Trouble
from orchestrator.dashboard.mount import Services
from orchestrator.schemas import Role
from orchestrator.services.auth import Actor, require
from orchestrator.services.problems import ApiError, Forbidden, Unauthorized

log = structlog.get_logger(__name__)
THEME_COOKIE = "patchwork_theme"
RECHECK_S = 15.0
PATIENCE_S = 30.0
"""For what a page reads before it is shown: on a busy machine more than NiceGUI's three seconds."""
_THEMES = {"light": False, "dark": True}
_NAV = (("overview", "Overview"), ("jobs", "Jobs"), ("submit", "Submit"), ("compare", "Compare"), ("tokens", "Tokens"))
_View = TypeVar("_View")
_Result = TypeVar("_Result")


def url(path: str, **query: str) -> str:
    """Where a page of ours lies."""
    parts_ = [f"{quote(key)}={quote(value, safe='')}" for key, value in query.items() if value]
    return f"{PATH}{path}" + (f"?{'&'.join(parts_)}" if parts_ else "")


class Site:
    """What all pages of this process share."""

    def __init__(self, services: Services, access: Access) -> None:
        self.services = services
        self.access = access
        self.feeds = Feeds(access)


class Frame:
    """One open page: its chrome, and a place for its content (`with frame:`)."""

    def __init__(self, site: Site, request: Request, title: str, active: str = "") -> None:
        self.site = site
        self.services = site.services
        self.actor: Actor = request.scope["state"]["actor"]
        self.client: Client = ui.context.client
        self._cookie = request.cookies.get(COOKIE)
        self._troubles: dict[object, str] = {}
        self._here = str(request.url.path).removeprefix(PATH) + (f"?{request.url.query}" if request.url.query else "")
        self.set_title(title)
        self._theme(request.cookies.get(THEME_COOKIE, "auto"))
        self._bar(active)
        # NiceGUI's layout holds everything in a <main> of its own.
        self.main = parts.tag("div", "", "page")
        with self.main:
            self._trouble = parts.tag("div", "", "trouble", role="status")
            self._trouble.set_visibility(False)
        ui.skip_link(target=self.main)
        self._watch_session()

    def __enter__(self) -> Frame:
        self.main.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.main.__exit__(*error)

    @property
    def may_write(self) -> bool:
        return self.may("member")

    def may(self, role: Role) -> bool:
        """Whether whoever is logged in has this role. (Asked again when something is done.)"""
        try:
            require(self.actor, role)
        except Forbidden:
            return False
        return True

    def set_title(self, title: str) -> None:
        self.client.title = f"{title} · Patchwork"

    # -- reading -------------------------------------------------------------------------------------------------------
    async def read(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, run on a thread."""
        return await self.site.access.run(work)

    def follow(
        self, key: object, read: Callable[[], Look[_View]], on_view: Callable[[_View], None]
    ) -> Callable[[], None]:
        """Show a view now and whenever it changes, while this page is open. Returns how to stop that."""
        feed: Feed[_View] = self.site.feeds.feed((type(self).__name__, key), read)
        stops: list[Callable[[], None]] = []

        def on_change(view: _View | Trouble) -> None:
            if self.client.is_deleted:
                return
            with self.main:
                if isinstance(view, Trouble):
                    self._say_trouble(key, view.message)
                    return
                self._say_trouble(key, "")
                on_view(view)

        def start() -> None:
            if not stops:
                stops.append(feed.follow(on_change))

        def stop() -> None:
            while stops:
                stops.pop()()
            if not self.client.is_deleted:
                self._say_trouble(key, "")

        if self.client.has_socket_connection:
            start()
        self.client.on_connect(start)
        self.client.on_delete(stop)
        return stop

    def _say_trouble(self, key: object, message: str) -> None:
        """A line above the content for as long as a view cannot be read."""
        self._troubles.pop(key, None)
        if message:
            self._troubles[key] = message
        text = next(iter(self._troubles.values()), "")
        parts.set_text(self._trouble, text)
        parts.show(self._trouble, bool(text))

    # -- acting --------------------------------------------------------------------------------------------------------
    async def act(self, work: Callable[[Actor], _Result], done: str = "", *, role: Role = "member") -> _Result | None:
        """Do something as whoever is logged in, and say how it went. None: it was refused, and said so."""

        def checked() -> _Result:
            return work(require(self.site.access.look_up(self._cookie), role))

        try:
            result = await self.site.access.run(checked)
        except Unauthorized:
            self._log_in_again()
            return None
        except ApiError as error:
            self.say(f"{error.detail} {error.hint or ''}".strip(), bad=True)
            return None
        except SpecError as error:
            self.say("; ".join(f"{fault.pointer or '/'}: {fault.message}" for fault in error.errors), bad=True)
            return None
        except Exception:
            log.exception("dashboard_action_failed")
            self.say("That failed. The server's log says why.", bad=True)
            return None
        self.site.feeds.look_now()
        if done:
            self.say(done)
        return result

    def say(self, message: str, *, bad: bool = False) -> None:
        """A message that goes away by itself."""
        with self.main:
            ui.notify(message, type="negative" if bad else "positive", position="top", multi_line=len(message) > 80)

    def go(self, address: str) -> None:
        """Leave for another page of ours (an `url`)."""
        # NiceGUI puts the dashboard's place in front of it again.
        self.client.open(address.removeprefix(PATH))

    # -- chrome --------------------------------------------------------------------------------------------------------
    def _bar(self, active: str) -> None:
        with parts.tag("header", "", "bar"):
            with parts.link("", url("/overview"), "brand"):
                parts.tag("img", "", "", src=f"{PATH}/static/patchwork.svg", alt="")
                parts.tag("span", "Patchwork")
            with parts.tag("nav", aria_label="Pages"):
                for name, text in _NAV:
                    if (name == "tokens" and not self.may("admin")) or (name == "submit" and not self.may_write):
                        continue
                    current = {"aria_current": "page"} if name == active else {}
                    parts.tag("a", text, "", href=url(f"/{name}"), **current)
            with parts.tag("div", "", "me"):
                parts.tag(
                    "span", f"{self.actor.name}", "who soft small", title=f"{self.actor.name} ({self.actor.role})"
                )
                parts.button("Theme", self._next_theme, "quiet", aria_label="Change between light, dark and automatic")
                with parts.tag("form", method="post", action=url("/logout")):
                    parts.tag("button", "Log out", "btn quiet", type="submit")

    def _theme(self, wanted: str) -> None:
        self._theme_name = wanted if wanted in _THEMES else "auto"
        self._dark = ui.dark_mode(_THEMES.get(self._theme_name))

    def _next_theme(self) -> None:
        names = ("auto", "light", "dark")
        self._theme_name = names[(names.index(self._theme_name) + 1) % len(names)]
        self._dark.value = _THEMES.get(self._theme_name)
        self.client.run_javascript(f'pw.cookie("{self._theme_name}")')
        self.say({"auto": "Theme: as the system", "light": "Theme: light", "dark": "Theme: dark"}[self._theme_name])

    # -- the session ---------------------------------------------------------------------------------------------------
    def _watch_session(self) -> None:
        cookie = self._cookie

        def read() -> Look[Actor | None]:
            try:
                return Look(self.site.access.look_up(cookie), RECHECK_S)
            except Unauthorized:
                return Look(None, RECHECK_S)

        def shown(actor: Actor | None) -> None:
            if actor is None:
                self._log_in_again()

        self.follow(("session", cookie), read, shown)

    def _log_in_again(self) -> None:
        self.go(url("/login", next=self._here))


def section(render: Callable[[Any], None], key: Callable[[Any], object] = lambda view: view) -> Callable[[Any], None]:
    """A part of a page that is drawn anew when `key` of its view has changed, and left alone otherwise."""
    box = parts.tag("div", "", "stack")
    last: list[object] = []

    def update(view: Any) -> None:
        now = key(view)
        if last != [now]:
            last[:] = [now]
            box.clear()
            with box:
                render(view)

    return update
