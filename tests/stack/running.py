"""A real stack for programs that bring it up themselves: benchmarks, checks, pictures."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from orchestrator.embedded.data_dir import DataDir
from orchestrator.embedded.stack import Stack
from tests.stack.jobs import fashion_mnist_folder

DATA = "data"
"""Where in a stack's folder its real images lie."""


@contextmanager
def running_stack(
    num_cpus: int, folder: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Stack, Path]]:
    """A stack that is watched, and its folder, `folder` or a temporary one: both are gone afterwards. `say` hears what
    the watch restarts."""
    folder = folder or Path(tempfile.mkdtemp(prefix="pw-rs-"))
    (folder / DATA).mkdir()
    (folder / DATA / "fashion-mnist").symlink_to(fashion_mnist_folder())
    stack = Stack(DataDir(folder / "stack"), port=0, num_cpus=num_cpus, data_root=folder / DATA)
    stop = threading.Event()
    watcher = threading.Thread(target=stack.watch, args=(say, stop))
    try:
        stack.start()
        watcher.start()
        yield stack, folder
    finally:
        stop.set()
        if watcher.is_alive():
            watcher.join()
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def ray_client(stack: Stack) -> httpx.Client:
    """Ray's own REST API. To be closed."""
    settings = json.loads(stack.dir.settings_file.read_text())
    return httpx.Client(
        base_url=settings["ray_address"],
        headers={"Authorization": f"Bearer {settings['ray_token']}"},
        timeout=60.0,
        trust_env=False,
    )
