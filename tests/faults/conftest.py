"""A real stack whose object store and Ray are reached through faulty proxies, with failpoints in every process."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.failpoints import VARIABLE
from orchestrator.client import Client
from orchestrator.embedded.data_dir import DataDir
from orchestrator.embedded.stack import Stack
from tests.faults.proxy import FaultProxy
from tests.faults.scene import Scene, golden_run
from tests.stack.jobs import fashion_mnist_folder

# Shorter than in production, so that a test need not wait; the defaults are told in docs/faults.md.
NODE_SETTINGS = {"silent_timeout_s": 10.0, "hang_timeout_s": 30.0, "s3_read_timeout_s": 4.0, "stop_grace_s": 15.0}
SETTINGS = {"backoff_initial_s": 0.5, "lease_s": 4.0}
STALE_LOCK = "deepspeed_shm_comm"


@pytest.fixture(scope="package")
def scene() -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(prefix="pw-f-"))
    data_root, failpoints, extensions = folder / "data", folder / "failpoints", folder / "extensions"
    for made in (data_root, failpoints, extensions / STALE_LOCK):
        made.mkdir(parents=True)
    (data_root / "fashion-mnist").symlink_to(fashion_mnist_folder())
    # What a compiler that was killed leaves behind (row 43).
    (extensions / STALE_LOCK / "lock").touch()
    store, ray = FaultProxy(), FaultProxy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(failpoints))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        stack = Stack(
            DataDir(folder / "stack"),
            port=0,
            num_cpus=8,
            data_root=data_root,
            settings=SETTINGS,
            node_settings=NODE_SETTINGS,
            front=lambda part, url: {"object store": store, "Ray": ray}[part].front(url),
        )
        stack.start()
        stop = threading.Event()
        watcher = threading.Thread(target=stack.watch, args=(lambda _: None, stop))
        watcher.start()
        try:
            with Client(stack.url, stack.token) as client:
                yield Scene(stack, client, store, ray, failpoints, extensions, golden_run(client))
        finally:
            stop.set()
            watcher.join()
            stack.stop()
            store.close()
            ray.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def disarmed(scene: Scene) -> Iterator[None]:
    """Each test begins and ends without failpoints."""
    scene.disarm()
    yield
    scene.disarm()
