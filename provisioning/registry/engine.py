"""Connections to the database; the one file that knows SQLite from PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiosqlite
from aiosqlite.cursor import Cursor
from sqlalchemy import event, make_url
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only
from typing_extensions import override

from provisioning.model.errors import Unavailable, Unusable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncEngine

Batches = Sequence[tuple[str, Sequence[tuple[object, ...]]]]
"""Statements, each with the rows that it is run for."""

BUSY_TIMEOUT_S = 10.0
"""How long SQLite waits for another process that is writing; `?timeout=S` in the URL
says otherwise."""


_FOR_THE_OPERATOR = {
    "SQLITE_NOTADB": "the file is not a database; restore a backup",
    "SQLITE_CORRUPT": "the file is damaged; restore a backup",
    "SQLITE_READONLY": "this user may not write the file or its folder",
}


def writer_engine(url: str) -> AsyncEngine:
    """One connection whose transactions are the only writing ones while they last."""
    engine = _engine(url, connections=1)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


def reader_engine(url: str) -> AsyncEngine:
    """Two connections that read beside the writer; each statement by itself."""
    return _engine(url, connections=2)


def exists(url: str) -> bool:
    """Whether there is a database to open; a server is asked by connecting to it."""
    path = _sqlite_path(url)
    return path is None or path.is_file()


def make_file(url: str) -> None:
    """An empty database that only its owner may read, where there is no file yet.

    SQLite gives the write-ahead log and its index the same mode.
    Raises Unusable when the folder does not allow it.
    """
    path = _sqlite_path(url)
    if path is None:
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise Unusable("registry", f"{error.strerror} ({path.name})") from error


def fault(error: BaseException | None) -> Unavailable | Unusable:
    """What a failed statement or connection means, by who must act."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    for prefix, why in _FOR_THE_OPERATOR.items():
        # Extended codes begin with the plain one: SQLITE_READONLY_DIRECTORY.
        if code.startswith(prefix):
            return Unusable("registry", why)
    return Unavailable("registry")


def surely_not_committed(error: DBAPIError) -> bool:
    """Whether a commit that failed so is known to have left nothing behind.

    SQLite is in this process: it says so itself, and rolls back ("Response To Errors
    Within A Transaction"). A server's answer may be lost after the fact.
    """
    return isinstance(error.orig, sqlite3.OperationalError)


def run_batches(connection: Connection, batches: Batches) -> None:
    """Run statements for lists of rows; SQLite runs them all in one trip."""
    if connection.dialect.name != "sqlite":
        for sql, rows in batches:
            connection.exec_driver_sql(sql, list(rows))
        return
    driver = connection.connection.driver_connection
    try:
        await_only(cast("_OneHopConnection", driver).run(batches))
    except sqlite3.IntegrityError as error:
        raise IntegrityError("a group's writes", None, error) from error
    except sqlite3.Error as error:
        raise OperationalError("a group's writes", None, error) from error


def _engine(url: str, *, connections: int) -> AsyncEngine:
    path = _sqlite_path(url)
    arguments = {} if path is None else {"async_creator_fn": _connect}
    return create_async_engine(
        url,
        connect_args=arguments,
        pool_size=connections,
        max_overflow=0,
        # Errors reach logs; rows hold hashes of tokens.
        hide_parameters=True,
        # Longer than the wait for a busy file.
        pool_timeout=BUSY_TIMEOUT_S + 5,
    )


def _sqlite_path(url: str) -> Path | None:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise Unusable("registry", "a registry in memory would forget; name a file")
    return Path(parsed.database)


def _begin_immediate(connection: Connection) -> None:
    # A transaction that begins by reading could not become a writing one once
    # another process has written (SQLITE_BUSY_SNAPSHOT): take the lock first.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


class _OneHopCursor(Cursor):
    """Rows come with the statement that asked for them.

    Opening a cursor, fetching and closing it would each be a trip to the connection's
    thread and back, 40 us of CPU each; a group has a dozen statements.
    """

    _rows: list[sqlite3.Row] = []  # noqa: RUF012 - replaced, never changed

    def _execute_and_fetch(self, sql: str, parameters: Sequence[Any]) -> None:
        cursor = self._cursor.execute(sql, parameters)
        self._rows = cursor.fetchall() if cursor.description else []

    @override
    async def execute(
        self, sql: str, parameters: Iterable[Any] | None = None
    ) -> Cursor:
        run = partial(self._execute_and_fetch, sql, tuple(parameters or ()))
        await self._conn._execute(run)  # type: ignore[no-untyped-call]  # noqa: SLF001 - aiosqlite's one way to its thread
        return self

    @override
    async def fetchall(self) -> Iterable[sqlite3.Row]:
        rows, self._rows = self._rows, []
        return rows

    @override
    async def close(self) -> None:
        # The statement has run to its end, so there is nothing to wait for.
        self._cursor.close()


class _OneHopConnection(aiosqlite.Connection):
    async def run(self, batches: Batches) -> None:
        """Run statements for lists of rows, one after the other."""
        await self._execute(self._run, batches)  # type: ignore[no-untyped-call]

    def _run(self, batches: Batches) -> None:
        for sql, rows in batches:
            self._conn.executemany(sql, rows)

    @override
    def cursor(self) -> _OneHopCursor:  # type: ignore[override] # awaited by nobody
        return _OneHopCursor(self, self._conn.cursor())


def _connect(
    database: str, *, timeout: float = BUSY_TIMEOUT_S, **_: object
) -> _OneHopConnection:
    def connector() -> sqlite3.Connection:
        connection = sqlite3.connect(
            database,
            timeout=timeout,
            isolation_level=None,  # BEGIN is ours
            # Cursors are opened and closed in the loop's thread, between statements.
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        # Every commit reaches the disk before anybody hears of it.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    connection = _OneHopConnection(connector, iter_chunk_size=64)
    # As SQLAlchemy does: a process that is told to die does not wait for it.
    connection._thread.daemon = True  # noqa: SLF001 - aiosqlite has no other way
    return connection
