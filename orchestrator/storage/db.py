"""The database connection: SQLite (WAL, synchronous=FULL) or PostgreSQL, the same statements on both."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from pydantic_core import from_json, to_json
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, TimeoutError
from sqlalchemy.orm import Session

from orchestrator.storage.tables import Base

SQLITE_BUSY_TIMEOUT_S = 10
MIGRATIONS = Path(__file__).parent / "migrations"
_BETWEEN_TRIES_S = 0.01
_BETWEEN_TURNS_S = 0.001
_UPGRADE_LOCK = 0x7061746368  # any constant: two processes that start together take turns
_MAX_BOUND_VALUES = 20_000  # SQLite allows 32,766 per statement, PostgreSQL 65,535


class Database:
    """Engine and sessions of one database. Sessions are short: no network call happens inside one."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.engine = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url)
        self._writing = threading.RLock()

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that may write: committed at the end of the block, rolled back if it raises.

        On SQLite it holds the write lock from its first statement (BEGIN IMMEDIATE), so that a transaction which reads
        before it writes never fails half-way with SQLITE_BUSY_SNAPSHOT.
        """
        with self._turn(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """On SQLite, this process's writers one after the other, woken as soon as it is their turn; those of several
        processes ask again and again (`_begin_to_write`). One that has waited as long as SQLite would asks, too."""
        waited = self.is_sqlite and self._writing.acquire(timeout=SQLITE_BUSY_TIMEOUT_S)
        try:
            yield
        finally:
            if waited:
                self._writing.release()

    @contextmanager
    def reader(self) -> Iterator[Session]:
        """A session that only reads: one snapshot on SQLite, never waiting for a writer. Nothing is committed."""
        engine = self.engine.execution_options(patchwork_read_only=True)
        with Session(engine, expire_on_commit=False, autoflush=False) as session:
            yield session

    def upgrade(self) -> None:
        """Create or migrate the schema to the newest revision. Safe to call by several processes at once."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self.engine.begin() as connection:
            if not self.is_sqlite:  # SQLite: BEGIN IMMEDIATE already keeps the others out
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self.engine.dispose()


def upsert(
    session: Session,
    row: type[Base],
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    update: Sequence[str] | None = None,
) -> None:
    """Insert `rows`; where one with the same `keys` exists, overwrite `update` (left out: every other given column).

    `keys` must be the primary key or a unique constraint. Of rows with equal keys the last wins. All rows give the
    same columns.
    """
    unique = list({tuple(values[k] for k in keys): dict(values) for values in rows}.values())
    if not unique:
        return
    changed = [name for name in unique[0] if name not in keys] if update is None else list(update)
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    size = max(1, _MAX_BOUND_VALUES // (len(unique[0]) + 8))
    for start in range(0, len(unique), size):
        statement = insert(row).values(unique[start : start + size])
        if changed:
            statement = statement.on_conflict_do_update(
                index_elements=list(keys), set_={name: statement.excluded[name] for name in changed}
            )
        else:
            statement = statement.on_conflict_do_nothing(index_elements=list(keys))
        session.execute(statement)


def is_unavailable(error: BaseException) -> bool:
    """Whether `error` says that the database is busy or away (try again), rather than that a statement is wrong."""
    if isinstance(error, TimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    message = str(error.orig)
    return error.connection_invalidated or any(words in message for words in _UNAVAILABLE)


_UNAVAILABLE = (
    "database is locked",
    "database table is locked",
    "disk is full",
    "connection failed",
    "could not connect",
    "deadlock detected",
    "lock timeout",
    "the database system is",
    "too many clients",
    "remaining connection slots",
)


# Columns of JSON, by pydantic's writer and reader: several times as fast as the standard library's.
_JSON: dict[str, Any] = {"json_serializer": lambda value: to_json(value).decode(), "json_deserializer": from_json}


def _sqlite_engine(url: str) -> Engine:
    # Last in, first out: who writes next gets the connection that wrote last. The pages that another one has in memory
    # are out of date since, and would be read again.
    engine = create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S}, pool_use_lifo=True, **_JSON)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        # The driver must not begin transactions by itself: see _begin.
        connection.isolation_level = None
        _keep_a_write_ahead_log(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()
        _let_wait(connection, SQLITE_BUSY_TIMEOUT_S)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("patchwork_read_only", False):
            connection.exec_driver_sql("BEGIN")
        else:
            _begin_to_write(connection)

    return engine


def _begin_to_write(connection: Connection) -> None:
    """BEGIN IMMEDIATE, tried every millisecond while another process writes: SQLite itself would sleep up to 100 ms
    from one try to the next, and most transactions take 2. Raises OperationalError after as long as SQLite would."""
    driver: Any = connection.connection.driver_connection
    give_up_at = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    _let_wait(driver, 0)
    try:
        while time.monotonic() < give_up_at:
            try:
                driver.execute("BEGIN IMMEDIATE").close()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
            time.sleep(_BETWEEN_TURNS_S)
        # Once more by SQLAlchemy, whose errors are known to all.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        _let_wait(driver, SQLITE_BUSY_TIMEOUT_S)


def _let_wait(connection: sqlite3.Connection, seconds: int) -> None:
    connection.execute(f"PRAGMA busy_timeout={seconds * 1000}").close()


def _keep_a_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Put the file into WAL mode, for good. Its first openers try again themselves: two that change the mode of a new
    file at once would deadlock, so SQLite refuses one of them without its busy timeout (sqlite3_busy_handler)."""
    give_up_at = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up_at:
                raise
        time.sleep(_BETWEEN_TRIES_S)


def _postgresql_engine(url: str) -> Engine:
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        connect_args={"connect_timeout": 5, "options": "-c timezone=UTC -c lock_timeout=20000"},
        **_JSON,
    )
