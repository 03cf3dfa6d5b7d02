"""Inserting one new row without the unit of work of SQLAlchemy's ORM, which costs several times the statement: jobs are
submitted by the thousand, a request each."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Insert, insert
from sqlalchemy.orm import Session, make_transient_to_detached

from orchestrator.storage.tables import Base


def insert_row(session: Session, row: Base) -> None:
    """Insert a new row whose primary key is set; it belongs to the session afterwards, as if it had been added and
    flushed. What its class has defaults for is filled in."""
    statement, columns = _statement(type(row))
    values = vars(row)
    for name, default in columns.items():
        if values.get(name) is None:
            value = None
            if default is not None:
                value = default.arg(None) if default.is_callable else default.arg
            # None too: an attribute that was never set would be read from the database when it is asked for. Put where
            # SQLAlchemy puts what it has loaded: to set forty attributes would take as long as the statement.
            values[name] = value
    session.connection().execute(statement, {name: values[name] for name in columns})
    make_transient_to_detached(row)
    session.add(row)


@cache
def _statement(row_class: type[Base]) -> tuple[Insert, dict[str, Any]]:
    """The statement, and every column with its default."""
    table: Any = row_class.__table__
    return insert(table).inline(), {column.key: column.default for column in table.columns}
