"""Constant statements, compiled once and run with plain tuples.

SQLAlchemy's own path takes the parameters of every execution apart anew: 10 us for each
row written, 2 us for each value in an IN. A group has hundreds of both. No value here
needs a conversion on its way to the driver or back: they are int, str and bytes.
"""

from __future__ import annotations

from functools import cache, lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sqlalchemy import Dialect
    from sqlalchemy.sql.dml import UpdateBase
    from sqlalchemy.sql.selectable import SelectBase

    from provisioning.registry.engine import Statements, Stored
    from provisioning.registry.page import Parameters


def fetch(
    statements: Statements,
    statement: SelectBase,
    lists: Mapping[str, Collection[object]] | None = None,
) -> Sequence[Stored]:
    """All rows of a SELECT whose parameters are the lists of its INs."""
    lists = lists or {}
    sizes = tuple((name, _padded(len(values))) for name, values in lists.items())
    sql, order = _expanded(statement, statements.dialect, sizes)
    columns = {name: _pad(values) for name, values in lists.items()}
    values = tuple(columns[name][index] for name, index in order)
    return statements.fetch(sql, values)


def write(
    statements: Statements, statement: UpdateBase, rows: Sequence[Parameters]
) -> None:
    """Run a statement for each of its rows."""
    if rows:
        sql, arranged = _arranged(statement, statements.dialect, tuple(rows[0]))
        statements.run(sql, [arranged(row) for row in rows])


def _padded(size: int) -> int:
    """A power of two: a few compiled statements serve every size of group."""
    return 1 << (size - 1).bit_length() if size else 0


def _pad(values: Collection[object]) -> list[object]:
    # The last value again: IN asks for a set.
    padded = list(values)
    if padded:
        padded += padded[-1:] * (_padded(len(padded)) - len(padded))
    return padded


@lru_cache(maxsize=512)
def _expanded(
    statement: SelectBase, dialect: Dialect, sizes: tuple[tuple[str, int], ...]
) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The SQL for lists of these sizes, and which value stands at which place."""
    compiled = statement.compile(dialect=dialect)
    places = {name: [f"{name}:{index}" for index in range(n)] for name, n in sizes}
    state = compiled.construct_expanded_state(places)
    order = []
    for expanded in state.positiontup or ():
        name, _, index = str(state.parameters[expanded]).rpartition(":")
        order.append((name, int(index)))
    return state.statement, tuple(order)


@cache
def _arranged(
    statement: UpdateBase, dialect: Dialect, names: tuple[str, ...]
) -> tuple[str, Callable[[Parameters], tuple[object, ...]]]:
    """The SQL, and what puts a row's values into its order."""
    compiled = statement.compile(dialect=dialect, column_keys=list(names))
    order = compiled.positiontup or names
    # Numbers that stand in the statement itself are parameters of the SQL, too.
    constants = {name: compiled.params[name] for name in order if name not in names}
    if constants or len(order) == 1:
        return str(compiled), lambda row: tuple(
            (constants | row)[name] for name in order
        )
    return str(compiled), itemgetter(*order)
