from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

from orchestrator.storage.db import MIGRATIONS, Database, is_unavailable, upsert
from orchestrator.storage.insert import insert_row
from orchestrator.storage.tables import Base, ClusterRow, EventRow, JobRow, MetricRow
from tests.factories import make_job

pytestmark = pytest.mark.db
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def point(step: int, value: float) -> dict[str, object]:
    return {"job_id": "job_1", "name": "train/loss", "step": step, "attempt": 1, "value": value, "at": NOW}


KEYS = ["job_id", "name", "step", "attempt"]


def test_revisions_give_exactly_the_tables(empty_database_url: str) -> None:
    db = Database(empty_database_url)
    db.upgrade()
    with db.engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    db.close()


def test_upgrade_again_changes_nothing(db: Database) -> None:
    with db.session() as session:
        session.add(ClusterRow(id=1, seen_at=NOW))
    db.upgrade()
    with db.reader() as session:
        assert session.scalar(select(func.count()).select_from(ClusterRow)) == 1


def test_processes_that_start_together_upgrade_once(empty_database_url: str) -> None:
    start = threading.Barrier(4)

    def boot() -> None:
        database = Database(empty_database_url)
        start.wait(timeout=10)
        database.upgrade()
        database.close()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(boot) for _ in range(4)]:
            done.result(timeout=60)
    db = Database(empty_database_url)
    assert set(inspect(db.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
    db.close()


def test_connections_that_open_a_new_file_together_all_get_its_write_ahead_log(tmp_path: Path) -> None:
    def connect(url: str, start: threading.Barrier) -> str:
        database = Database(url)
        start.wait(timeout=10)
        with database.reader() as session:
            mode = session.execute(text("PRAGMA journal_mode")).scalar_one()
        database.close()
        return str(mode)

    with ThreadPoolExecutor(4) as pool:
        for trial in range(25):  # without trying again, about one file in ten is refused
            start = threading.Barrier(4)
            modes = pool.map(connect, [f"sqlite:///{tmp_path}/{trial}.db"] * 4, [start] * 4)
            assert list(modes) == ["wal"] * 4


def test_sqlite_writes_by_the_connection_that_wrote_last(tmp_path: Path) -> None:
    """Any other would have to read again what it has in memory."""
    db = Database(f"sqlite:///{tmp_path}/patchwork.db")
    db.upgrade()
    with db.session() as writer, db.reader() as one, db.reader() as two:
        first = writer.connection().connection.driver_connection
        others = {id(session.connection().connection.driver_connection) for session in (one, two)}
    assert id(first) not in others
    for _ in range(5):
        with db.session() as session:
            assert session.connection().connection.driver_connection is first
    db.close()


def test_session_rolls_back_when_the_block_raises(db: Database) -> None:
    def write_half() -> None:
        with db.session() as session:
            session.add(ClusterRow(id=1, seen_at=NOW))
            session.flush()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    with db.reader() as session:
        assert session.get(ClusterRow, 1) is None


def test_reader_keeps_nothing(db: Database) -> None:
    with db.reader() as session:
        session.add(ClusterRow(id=1, seen_at=NOW))
        session.flush()
    with db.reader() as session:
        assert session.get(ClusterRow, 1) is None


def test_times_come_back_aware_and_in_utc(db: Database) -> None:
    with db.session() as session:
        session.add(ClusterRow(id=1, seen_at=NOW.astimezone(timezone(timedelta(hours=5)))))
    with db.reader() as session:
        seen_at = session.get_one(ClusterRow, 1).seen_at
    assert seen_at == NOW
    assert seen_at.utcoffset() == timedelta(0)


def test_naive_time_is_refused(db: Database) -> None:
    with pytest.raises(StatementError, match="naive"), db.session() as session:
        session.add(ClusterRow(id=1, seen_at=datetime(2026, 1, 1)))


def test_upsert_overwrites_by_key_and_last_wins(db: Database) -> None:
    with db.session() as session:
        upsert(session, MetricRow, [point(1, 0.5), point(2, 0.25), point(2, 0.125)], KEYS)
    with db.session() as session:
        upsert(session, MetricRow, [point(1, 0.75)], KEYS)
    with db.reader() as session:
        assert list(session.execute(select(MetricRow.step, MetricRow.value).order_by(MetricRow.step))) == [
            (1, 0.75),
            (2, 0.125),
        ]


def test_upsert_of_keys_alone_keeps_what_is_there(db: Database) -> None:
    with db.session() as session:
        upsert(session, MetricRow, [point(1, 0.5)], KEYS)
        upsert(session, MetricRow, [point(1, 0.75)], KEYS, update=[])
    with db.reader() as session:
        assert session.scalar(select(MetricRow.value)) == 0.5


def test_upsert_of_more_rows_than_one_statement_holds(db: Database) -> None:
    with db.session() as session:
        upsert(session, MetricRow, [point(step, 0.0) for step in range(5000)], KEYS)
    with db.reader() as session:
        assert session.scalar(select(func.count()).select_from(MetricRow)) == 5000


def test_read_then_write_of_two_writers_loses_no_update(db: Database) -> None:
    """Both read before they write; without BEGIN IMMEDIATE or the row lock one update would be lost or refused."""
    with db.session() as session:
        session.add(ClusterRow(id=1, seen_at=NOW, message="0"))

    def add_one(_: int) -> None:
        with db.session() as session:
            row = session.scalars(select(ClusterRow).where(ClusterRow.id == 1).with_for_update()).one()
            row.message = str(int(row.message) + 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(40)))
    with db.reader() as session:
        assert session.get_one(ClusterRow, 1).message == "40"


def test_foreign_keys_are_enforced(db: Database) -> None:
    orphan = EventRow(job_id="job_x", type="job.queued", at=NOW)
    with pytest.raises(IntegrityError), db.session() as session:
        session.add(orphan)


def test_unavailable_is_told_from_wrong(db: Database) -> None:
    with pytest.raises(Exception, match="no_such_table") as wrong, db.session() as session:
        session.execute(text("SELECT * FROM no_such_table"))
    assert not is_unavailable(wrong.value)
    assert is_unavailable(OperationalError("SELECT 1", {}, Exception("database is locked")))
    away = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(OperationalError) as refused, away.session() as session:
        session.execute(text("SELECT 1"))
    assert is_unavailable(refused.value)
    away.close()


def test_points_from_before_arrivals_were_counted_come_before_all_reports(empty_database_url: str) -> None:
    """Revision 0003 numbers them by step."""
    db = Database(empty_database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with db.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        insert = text("INSERT INTO metrics (job_id, name, step, attempt, at) VALUES ('job_1', 'a', :step, 1, :at)")
        connection.execute(insert, [{"step": step, "at": "2026-11-22 12:00:00"} for step in (7, 3)])
    db.upgrade()
    with db.reader() as session:
        seqs = dict(session.execute(select(MetricRow.step, MetricRow.seq)).all())
    assert seqs[3] < seqs[7] < 0
    db.close()


def test_a_row_inserted_at_once_is_the_row_that_is_read_and_belongs_to_the_session(db: Database) -> None:
    row = make_job()
    with db.session() as session:
        insert_row(session, row)
        inserted = {column.key: getattr(row, column.key) for column in JobRow.__table__.columns}
        assert row in session
        assert not inspect(row).modified
        row.message = "changed later"
    with db.reader() as session:
        found = session.get_one(JobRow, row.id)
        assert {name: getattr(found, name) for name in inserted} == inserted | {"message": "changed later"}
