"""One Ray head and one object store for all driver tests of a session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="pw-drv-"))
    cluster = Cluster.start(directory)
    yield cluster
    cluster.stop()
    shutil.rmtree(directory, ignore_errors=True)
