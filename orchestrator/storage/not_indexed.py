"""A column that SQLite is not to look for by an index of its own: without statistics it takes any index that begins
with a column for a way to a few rows, reads them all, and sorts them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class _NotIndexed(FunctionElement[Any]):
    inherit_cache = True


def not_indexed(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """The same value (PostgreSQL, which keeps statistics, sees the column itself)."""
    element = _NotIndexed(column)
    element.type = column.type
    return element


@compiles(_NotIndexed)
def _column(element: _NotIndexed, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(_NotIndexed, "sqlite")
def _value_of_column(element: _NotIndexed, compiler: SQLCompiler, **options: Any) -> str:
    # https://www.sqlite.org/optoverview.html, "Disqualifying WHERE Clause Terms Using Unary-+".
    return f"+{_column(element, compiler, **options)}"
