"""Logging in with a token, and out: plain pages that need no script."""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from orchestrator.dashboard.access import COOKIE, PATH, Access, is_same_origin
from orchestrator.services.problems import Unauthorized
from orchestrator.services.sessions import LASTS

_LARGEST_FORM = 4096
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Log in · Patchwork</title>
<link rel="icon" href="{path}/static/patchwork.svg">
<link rel="stylesheet" href="{path}/static/login.css">
</head>
<body>
<main>
<img src="{path}/static/patchwork.svg" alt="" width="48" height="48">
<h1>Patchwork</h1>
<p>Log in with a token to see jobs, curves and logs.</p>
<form method="post" action="{path}/login">
<input type="hidden" name="next" value="{wanted}">
<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus
 placeholder="pw_…" maxlength="512" spellcheck="false"{invalid}>
{error}<button type="submit">Log in</button>
</form>
<details>
<summary>Where do I find a token?</summary>
<p>On the machine that runs <code>patchwork up</code> it is in <code>client.json</code> in its data directory.
Elsewhere an administrator makes one: <code>patchwork tokens add NAME</code>, or on the page Tokens.</p>
</details>
</main>
</body>
</html>
"""


async def answer(request: Request, access: Access) -> Response:
    """The login page; or, for its form, the session cookie and the way to the page that was wanted."""
    if request.method != "POST":
        return _page(request.query_params.get("next", "/"), None, 200)
    if not is_same_origin(request):
        return _page("/", "The form was sent from another site.", 403)
    form = parse_qs((await _body(request)).decode("utf-8", "replace"))
    wanted, token = form.get("next", ["/"])[0], form.get("token", [""])[0].strip()
    try:
        cookie = await access.open(token)
    except Unauthorized as error:
        return _page(wanted, error.detail if token else "Give a token.", 401)
    response = RedirectResponse(PATH + _local(wanted), 303)
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=int(LASTS.total_seconds()),
        path=PATH,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


def leave(request: Request) -> Response:
    """Forget the session, if one of our own pages asks for it."""
    response = RedirectResponse(f"{PATH}/login", 303)
    if request.method == "POST" and is_same_origin(request):
        response.delete_cookie(COOKIE, path=PATH)
    return response


def _page(wanted: str, error: str | None, status: int) -> Response:
    said = f'<p class="error" id="error" role="alert">{escape(error)}</p>\n' if error else ""
    invalid = ' aria-invalid="true" aria-describedby="error"' if error else ""
    text = _PAGE.format(path=PATH, wanted=escape(_local(wanted)), error=said, invalid=invalid)
    return HTMLResponse(text, status, {"Cache-Control": "no-store"})


def _local(wanted: str) -> str:
    """A path within the dashboard, whatever was asked for."""
    is_local = wanted.startswith("/") and not wanted.startswith(("//", "/\\", "/login", "/logout"))
    return wanted if is_local and wanted.isprintable() else "/"


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_FORM:
            return b""
    return body
