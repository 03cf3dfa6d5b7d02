"""The real stack, started once for all tests of this folder: SeaweedFS, Ray, API and controller, on free ports."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import Client
from orchestrator.embedded.data_dir import DataDir
from orchestrator.embedded.stack import Stack
from tests.stack.jobs import fashion_mnist_folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images where the workers look for them."""
    root = tmp_path_factory.mktemp("data-root")
    (root / "fashion-mnist").symlink_to(fashion_mnist_folder())
    return root


@pytest.fixture(scope="session")
def stack(data_root: Path) -> Iterator[Stack]:
    # Logical CPUs above the real two: two jobs of two workers fit side by side.
    folder = Path(tempfile.mkdtemp(prefix="pw-st-"))
    stack = Stack(DataDir(folder), port=0, num_cpus=8, data_root=data_root)
    stack.start()
    stop = threading.Event()
    watcher = threading.Thread(target=stack.watch, args=(lambda _: None, stop))
    watcher.start()
    yield stack
    stop.set()
    watcher.join()
    stack.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, stack.token) as client:
        yield client
