"""PostgreSQL is only another URL: all statements compile for it, and writers queue."""

from __future__ import annotations

import pytest
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.base import Executable

from provisioning.registry import (
    changes,
    enrolments,
    flush,
    lookup,
    orders,
    proofs,
    reads,
)
from provisioning.registry.schema import counters, metadata
from provisioning.registry.sql import fetch, write

DIALECTS = {"sqlite": aiosqlite.dialect(), "postgresql": asyncpg.dialect()}
STATEMENTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": statement
    for module in (changes, enrolments, flush, lookup, orders, proofs, reads)
    for name, statement in vars(module).items()
    if isinstance(statement, Executable)
}


class Heard:
    """Statements that remember what they were told, and know nothing."""

    def __init__(self, dialect: str) -> None:
        self.dialect = DIALECTS[dialect]
        self.said: list[tuple[str, object]] = []

    def fetch(self, sql, values):
        self.said.append((sql, values))
        return []

    def run(self, sql, rows):
        self.said.append((sql, rows))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_compiles(name, dialect):
    assert str(STATEMENTS[name].compile(dialect=DIALECTS[dialect]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_table_compiles(dialect):
    for table in metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=DIALECTS[dialect]))
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=DIALECTS[dialect]))


def test_in_postgresql_a_writers_first_statement_is_a_lock_and_in_sqlite_begin_is():
    (locking,) = [
        statement
        for name, statement in STATEMENTS.items()
        if name == "lookup._COUNTERS"
    ]
    assert "FOR UPDATE" in str(locking.compile(dialect=DIALECTS["postgresql"]))
    assert "FOR UPDATE" not in str(locking.compile(dialect=DIALECTS["sqlite"]))


def test_lists_of_every_length_need_few_statements():
    heard = Heard("postgresql")
    for size in range(1, 33):
        fetch(heard, STATEMENTS["lookup._BY_KEY"], by_key(range(size)))
    assert len({sql for sql, _ in heard.said}) == 6
    sql, values = heard.said[2]
    assert values == (0, 1, 2, 2)  # the last again: the list is a set
    assert "$4" in sql
    assert "$5" not in sql


def test_no_list_finds_nothing():
    heard = Heard("sqlite")
    fetch(heard, STATEMENTS["lookup._BY_KEY"], by_key([]))
    assert heard.said[0][1] == ()
    fetch(heard, select(counters.c.name))
    assert heard.said[1][1] == ()


def test_rows_are_written_in_the_statements_own_order():
    heard = Heard("sqlite")
    row = {"new_value": 7, "key": "group"}
    write(heard, STATEMENTS["flush._COUNTERS"], [row, row])
    write(heard, STATEMENTS["flush._COUNTERS"], [])
    ((sql, rows),) = heard.said
    assert sql.index("value=?") < sql.index("name = ?")
    assert rows == [(7, "group")] * 2


def test_numbers_that_stand_in_a_statement_reach_the_driver():
    heard = Heard("sqlite")
    write(heard, STATEMENTS["enrolments._GIVE_BACK"], [{"key": "t1"}])
    ((sql, rows),) = heard.said
    assert sql.count("?") == len(rows[0]) == 3
    assert sorted(map(str, rows[0])) == ["0", "1", "t1"]


def by_key(ids):
    return {"ids": list(ids), "serials": [], "spkis": [], "requests": []}
