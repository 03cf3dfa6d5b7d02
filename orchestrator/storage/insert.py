"""Inserting one new row without the unit of work of SQLAlchemy's ORM, which costs several times the statement: jobs are
submitted by the thousand, a request each."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Insert, ScalarSelect, insert
from sqlalchemy.orm import Session, make_transient_to_detached

from orchestrator.storage.tables import Base


def insert_row(session: Session, row: Base, asked: ScalarSelect[Any] | None = None, **bound: Any) -> Any:
    """Insert a new row whose primary key is set; it belongs to the session afterwards, as if it had been added and
    flushed. What its class has defaults for is filled in.

    `asked`, with the values that it names as parameters, is asked of the database by the same statement, and its answer
    is returned: it does not see the row. A statement of its own would take as long again, on PostgreSQL a round trip.
    """
    statement, columns = _statement(type(row), asked)
    values = vars(row)
    for name, default in columns.items():
        if values.get(name) is None:
            value = None
            if default is not None:
                value = default.arg(None) if default.is_callable else default.arg
            # None too: an attribute that was never set would be read from the database when it is asked for. Put where
            # SQLAlchemy puts what it has loaded: to set forty attributes would take as long as the statement.
            values[name] = value
    done = session.connection().execute(statement, {name: values[name] for name in columns} | bound)
    answer = None if asked is None else done.scalar_one()
    make_transient_to_detached(row)
    session.add(row)
    return answer


@cache
def _statement(row_class: type[Base], asked: ScalarSelect[Any] | None) -> tuple[Any, dict[str, Any]]:
    """The statement, and every column with its default."""
    table: Any = row_class.__table__
    statement: Insert = insert(table).inline()
    columns = {column.key: column.default for column in table.columns}
    return (statement if asked is None else statement.returning(asked)), columns
