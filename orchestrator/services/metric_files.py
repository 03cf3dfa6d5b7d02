"""A job's metrics as a file, every point of it: CSV or Parquet, in pieces, however many points there are.

Columns: name, step, value, attempt, at (UTC). Points are cut where the next attempt resumed, as everywhere (`metrics`),
but not joined. A value that was not finite is empty (CSV) or null (Parquet).

No transaction is held open while a slow client reads: points come in pages, each in a session of its own. What counts
is decided once, at the beginning; points of attempts that start later are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from sqlalchemy import ColumnElement, and_, or_, select

from orchestrator.services.jobs import find_job
from orchestrator.services.metrics import Point, in_lineage, last_valid_steps_of, latest_attempts, metric_names
from orchestrator.services.problems import Invalid, NotAcceptable, field_error
from orchestrator.storage.db import Database
from orchestrator.storage.tables import MetricRow

FileFormat = Literal["csv", "parquet"]
MEDIA_TYPES: dict[FileFormat, str] = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
COLUMNS = ("name", "step", "value", "attempt", "at")
_PAGE = 5_000
_ROW_GROUP = 50_000
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Selection:
    """Which points of a job go into the file, as decided when it was asked for."""

    job_id: str
    names: tuple[str, ...]
    condition: ColumnElement[bool]
    page_size: int
    """Points read at once."""


def metrics_file(
    db: Database,
    job_id: str,
    names: Sequence[str],
    file_format: FileFormat,
    *,
    page_size: int = _PAGE,
    row_group_size: int = _ROW_GROUP,
) -> Iterator[bytes]:
    """The file's bytes, in pieces. What can be refused is refused at the call, before anything is sent.

    Raises:
        NotFound: there is no such job.
        Invalid: it has no metric of one of these names.
        NotAcceptable: this server cannot write the format.
    """
    selection = _select(db, job_id, names, page_size)
    if file_format == "csv":
        return _csv(db, selection)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NotAcceptable(
            "This server cannot write Parquet: the package pyarrow is not installed on it.",
            hint="Ask for format=csv, or install the extra: pip install 'patchwork-vit[server]'.",
        ) from None
    return _parquet(db, selection, row_group_size, pyarrow)


def _select(db: Database, job_id: str, names: Sequence[str], page_size: int) -> Selection:
    with db.reader() as session:
        find_job(session, job_id)
        known = metric_names(session, job_id)
        limits = last_valid_steps_of(session, job_id)
    missing = [name for name in names if name not in known]
    if missing:
        listed = ", ".join(known) or "none yet"
        errors = [field_error("/names", "the job has no such metric", name, allowed=listed) for name in missing]
        raise Invalid(f"Job {job_id} has no metric {missing[0]!r}.", errors=errors)
    started = MetricRow.attempt <= max(limits, default=0)
    wanted = tuple(name for name in known if not names or name in names)
    return Selection(job_id, wanted, and_(started, in_lineage(limits)), page_size)


def _points(db: Database, selection: Selection, name: str) -> Iterator[Point]:
    """The metric's points that count, by step."""
    return latest_attempts(_all_points(db, selection, name))


def _all_points(db: Database, selection: Selection, name: str) -> Iterator[Point]:
    query = (
        select(MetricRow.step, MetricRow.attempt, MetricRow.value, MetricRow.at)
        .where(MetricRow.job_id == selection.job_id, MetricRow.name == name, selection.condition)
        .order_by(MetricRow.step, MetricRow.attempt)
        .limit(selection.page_size)
    )
    after: tuple[int, int] | None = None
    while True:
        with db.reader() as session:
            page = session.execute(query if after is None else query.where(_behind(*after))).all()
        for step, attempt, value, at in page:
            yield Point(step, attempt, value, at)
        if len(page) < selection.page_size:
            return
        after = (page[-1].step, page[-1].attempt)


def _behind(step: int, attempt: int) -> ColumnElement[bool]:
    # The first condition alone lets the database go straight to the place in the index.
    same = and_(MetricRow.step == step, MetricRow.attempt > attempt)
    return and_(MetricRow.step >= step, or_(MetricRow.step > step, same))


def _csv(db: Database, selection: Selection) -> Iterator[bytes]:
    yield (",".join(COLUMNS) + "\n").encode()
    for name in selection.names:
        for points in _groups(_points(db, selection, name), selection.page_size):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(
                (name, p.step, "" if p.value is None else repr(p.value), p.attempt, p.at.isoformat() if p.at else "")
                for p in points
            )
            yield text.getvalue().encode()


def _groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


class _Outbox(io.RawIOBase):
    """A file that is only written to; what was written is taken away piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        taken, self._pieces = b"".join(self._pieces), []
        return taken


def _parquet(db: Database, selection: Selection, row_group_size: int, pyarrow: Any) -> Iterator[bytes]:
    schema = pyarrow.schema(
        [
            pyarrow.field("name", pyarrow.string(), nullable=False),
            pyarrow.field("step", pyarrow.int64(), nullable=False),
            pyarrow.field("value", pyarrow.float64()),
            pyarrow.field("attempt", pyarrow.int32(), nullable=False),
            pyarrow.field("at", pyarrow.timestamp("us", tz="UTC")),
        ],
        metadata={"patchwork.job_id": selection.job_id},
    )
    outbox = _Outbox()
    rows = ((name, p) for name in selection.names for p in _points(db, selection, name))
    with pyarrow.parquet.ParquetWriter(outbox, schema, compression="zstd") as writer:
        for group in _groups(rows, row_group_size):
            columns = {
                "name": [name for name, _ in group],
                "step": [point.step for _, point in group],
                "value": [point.value for _, point in group],
                "attempt": [point.attempt for _, point in group],
                "at": [point.at for _, point in group],
            }
            writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))
            yield outbox.take()
    # The footer.
    yield outbox.take()
