"""Tokens: who may do what. For administrators."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from fastapi import Request
from nicegui import ui
from pydantic import ValidationError

from orchestrator.dashboard import parts
from orchestrator.dashboard.feeds import Look
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site
from orchestrator.schemas import Role, TokenCreate, TokenCreated, TokenPage, TokenPublic
from orchestrator.services.auth import Actor
from orchestrator.services.tokens import create_token, list_tokens, revoke_token

_ROLES = {"viewer": "Viewer: may look", "member": "Member: may submit and steer", "admin": "Admin: may do everything"}
_LASTS = {"": "Never", "86400": "In a day", "2592000": "In 30 days", "31536000": "In a year"}
_EVERY_S = 5.0
_COLUMNS = (
    {"key": "name", "label": "Name"},
    {"key": "role", "label": "Role"},
    {"key": "state", "label": "State"},
    {"key": "by", "label": "Made by"},
    {"key": "made", "label": "Made", "end": True},
    {"key": "expires", "label": "Expires", "end": True},
    {"key": "revoke", "label": "", "end": True},
)


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/tokens", response_timeout=PATIENCE_S)
    async def show(request: Request) -> None:
        with Frame(site, request, "Tokens", "tokens") as frame:
            if not frame.may("admin"):
                parts.empty("Tokens are for administrators.", "You are logged in with a token of another role.")
                return
            _Page(frame)


class _Page:
    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        with parts.tag("div", "", "head"), parts.tag("div", "", "title"):
            parts.tag("h1", "Tokens")
        with parts.card("Make a token"):
            with parts.tag("div", "", "form-grid"):
                self._name = parts.text_field("Name", help="Written beside every change that is made with it.")
                self._role = parts.choice("Role", _ROLES, "member")
                self._lasts = parts.choice("Expires", _LASTS, "")
            with parts.row():
                parts.button("Make the token", self._make, "main")
            self._made = parts.stack()
        with parts.card("All tokens", flush=True), parts.tag("div", "", "scroll-x"):
            self._rows = parts.Rows("Tokens", _COLUMNS, on_act=lambda token_id, _: self._ask(token_id))
        self._known: dict[str, TokenPublic] = {}
        frame.follow("tokens", lambda: Look(list_tokens(frame.services.db), _EVERY_S), self._show)

    def _show(self, view: TokenPage) -> None:
        self._known = {token.id: token for token in view.items}
        self._rows.show_rows([_row(token) for token in view.items])

    async def _make(self) -> None:
        try:
            wanted = TokenCreate(
                name=self._name.value.strip(),
                role=cast(Role, self._role.value),
                expires_in_s=int(self._lasts.value) if self._lasts.value else None,
            )
        except ValidationError as error:
            self._name.say_wrong(f"Not a name: {error.errors()[0]['msg']}.")
            return
        self._name.say_wrong("")

        def work(actor: Actor) -> TokenCreated:
            return create_token(self.frame.services.db, actor, wanted)

        made = await self.frame.act(work, role="admin")
        if made is None:
            return
        self._made.clear()
        with self._made, parts.tag("div", "", "note-box good", role="status"), parts.stack("tight"):
            parts.tag("p", f"The token of {made.name}. It is shown this once: copy it now.", "strong")
            with parts.row():
                parts.tag("code", made.token, "wrap grow", id="new-token")
                parts.copy_button(made.token, "Copy")

    def _ask(self, token_id: str) -> None:
        token = self._known.get(token_id)
        if token is None:
            return
        box, body = parts.dialog("Revoke this token?")
        with body:
            parts.tag("p", token.name, "strong wrap")
            parts.tag("p", "Whoever uses it is refused from now on. This cannot be undone.")

            async def revoke() -> None:
                box.close()
                work = self.frame.services.db
                await self.frame.act(lambda _: revoke_token(work, token_id), "The token was revoked.", role="admin")

            with parts.row():
                parts.button("Revoke", revoke, "danger")
                parts.button("Keep it", box.close)
        box.open()


def _row(token: TokenPublic) -> dict[str, Any]:
    now = datetime.now(UTC)
    if token.revoked_at is not None:
        state = {"text": "Revoked", "tone": "off"}
    elif token.expires_at is not None and token.expires_at <= now:
        state = {"text": "Expired", "tone": "off"}
    else:
        state = {"text": "Active", "tone": "good"}
    revoke = {"text": "", "action": "revoke", "button": "Revoke", "label": f"Revoke {token.name}", "look": "danger"}
    return {
        "id": token.id,
        "name": {"text": token.name, "sub": token.id},
        "role": token.role,
        "state": state,
        "by": token.created_by,
        "made": {"ago": token.created_at.isoformat()},
        "expires": token.expires_at.strftime("%Y-%m-%d") if token.expires_at else "never",
        "revoke": revoke if state["text"] == "Active" else "",
    }
