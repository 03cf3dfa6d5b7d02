"""Pages of the dashboard that stay open without a browser: loaded once, then a socket that takes what it is told."""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

import httpx
import socketio

_CLIENT = re.compile(r"'client_id': '([0-9a-f-]{36})', 'next_message_id': (\d+)")


@contextmanager
def open_pages(url: str, cookie: str, path: str, number: int) -> Iterator[None]:
    """So many pages of a server, open and connected while the block runs. Raises RuntimeError: one was refused."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    sockets: list[socketio.AsyncClient] = []
    try:
        asyncio.run_coroutine_threadsafe(_open(url, cookie, path, number, sockets), loop).result(600)
        yield
        if lost := sum(not socket.connected for socket in sockets):
            raise RuntimeError(f"{lost} of {number} pages lost their connection")
    finally:
        asyncio.run_coroutine_threadsafe(_close(sockets), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _open(url: str, cookie: str, path: str, number: int, sockets: list[socketio.AsyncClient]) -> None:
    headers = {"Cookie": cookie, "Origin": url}
    async with httpx.AsyncClient(trust_env=False, timeout=120, headers=headers) as http:
        for _ in range(number):
            page = await http.get(f"{url}/dashboard{path}")
            found = _CLIENT.search(page.text)
            if page.status_code != 200 or found is None:
                raise RuntimeError(f"{path}: {page.status_code} {page.text[:300]}")
            query = {
                "client_id": found[1],
                "next_message_id": found[2],
                "implicit_handshake": "true",
                "document_id": str(uuid.uuid4()),
                "tab_id": str(uuid.uuid4()),
                "old_tab_id": "null",
            }
            # Among its ordinary headers a cookie would get lost: aiohttp keeps none for an address without a name.
            socket = socketio.AsyncClient(reconnection=False, websocket_extra_options={"headers": dict(headers)})
            sockets.append(socket)
            await socket.connect(
                f"{url}?{urlencode(query)}",
                transports=["websocket"],
                socketio_path="/dashboard/_nicegui_ws/socket.io",
            )


async def _close(sockets: list[socketio.AsyncClient]) -> None:
    for socket in sockets:
        await socket.disconnect()
