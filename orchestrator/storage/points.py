"""Many points of metrics into the database at once.

A driver that was cut off delivers thousands. Through SQLAlchemy's types and parameters each costs three times what the
database takes for it, so the statements are given to the driver as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from itertools import chain

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from configs.wire import MetricColumns

_EPOCH = datetime(1970, 1, 1)
_ROWS = 500
"""In one statement: fewer cost more calls, and many more would be over SQLite's 32,766 values."""
_OVERWRITE = (
    " ON CONFLICT (job_id, name, step, attempt)"
    " DO UPDATE SET seq = excluded.seq, value = excluded.value, at = excluded.at"
)
_KEEP = " ON CONFLICT (job_id, name, step, attempt) DO NOTHING"
_INSERT = "INSERT INTO metrics (job_id, attempt, seq, name, step, value, at) "
_POSTGRESQL = (
    _INSERT + "SELECT %s, %s, %s, name, step, value, timestamptz 'epoch' + at_us * interval '1 microsecond' "
    "FROM unnest(%s::text[], %s::bigint[], %s::float8[], %s::bigint[]) AS points (name, step, value, at_us)"
)

_Row = tuple[str, int, float | None, int]


def finite(value: float | None) -> float | None:
    """The value as every database holds it: None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def upsert_points(
    session: Session, job_id: str, attempt: int, seq: int, columns: Iterable[MetricColumns], *, keep: bool = False
) -> None:
    """Store the points of a batch, in the session's transaction. Of several for the same step, and of those that are
    there, the last given one stays; with `keep` what is there stays."""
    rows: dict[tuple[str, int], tuple[float | None, int]] = {}
    for column in columns:
        name = column.name
        for step, value, at_us in zip(column.steps, column.values, column.at_us, strict=True):
            rows[name, step] = finite(value), at_us
    # In the order of the primary key: neighbours lie on the same pages.
    points: list[_Row] = [(*key, *rows[key]) for key in sorted(rows)]
    if not points:
        return
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        _into_sqlite(connection, (job_id, attempt, seq), points, _KEEP if keep else _OVERWRITE)
    else:
        names, steps, values, times = map(list, zip(*points, strict=True))
        statement = _POSTGRESQL + (_KEEP if keep else _OVERWRITE)
        connection.exec_driver_sql(statement, (job_id, attempt, seq, names, steps, values, times))


def _into_sqlite(connection: Connection, batch: tuple[str, int, int], points: list[_Row], on_conflict: str) -> None:
    times = {at_us: _stored(at_us) for at_us in {point[3] for point in points}}
    rows = [(name, step, value, times[at_us]) for name, step, value, at_us in points]
    whole = len(rows) - len(rows) % _ROWS
    for start in range(0, whole, _ROWS):
        connection.exec_driver_sql(_MANY + on_conflict, (*batch, *chain.from_iterable(rows[start : start + _ROWS])))
    if rows[whole:]:
        connection.exec_driver_sql(_ONE + on_conflict, [(*batch, *row) for row in rows[whole:]])


def _stored(at_us: int) -> str:
    """A time as SQLAlchemy writes it into SQLite."""
    return (_EPOCH + timedelta(microseconds=at_us)).isoformat(" ", "microseconds")


def _sqlite_insert(num_rows: int) -> str:
    rows = (f"(?1, ?2, ?3, ?{n}, ?{n + 1}, ?{n + 2}, ?{n + 3})" for n in range(4, 4 + 4 * num_rows, 4))
    return f"{_INSERT}VALUES {', '.join(rows)}"


_ONE, _MANY = _sqlite_insert(1), _sqlite_insert(_ROWS)
