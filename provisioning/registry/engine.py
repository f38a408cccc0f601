"""Connections to the database; the one file that knows SQLite from PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiosqlite
from aiosqlite.cursor import Cursor
from sqlalchemy import event, make_url
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from typing_extensions import override

from provisioning.model.errors import Unavailable, Unusable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy import Connection, Dialect
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.pool import PoolProxiedConnection

Values = tuple[object, ...]
Stored = tuple[Any, ...]
"""A row as the driver gives it: its types end where a row of ours is made of it."""

BUSY_TIMEOUT_S = 10.0
"""How long SQLite waits for another process that is writing; `?timeout=S` in the URL
says otherwise."""


# A transaction that begins by reading could not become a writing one once another
# process has written (SQLITE_BUSY_SNAPSHOT): take the lock first.
_BEGIN = "BEGIN IMMEDIATE"

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


class Statements(Protocol):
    """A transaction of the writer, as plain SQL with values in its order."""

    @property
    def dialect(self) -> Dialect: ...

    def begin(self) -> None: ...

    def fetch(self, sql: str, values: Values) -> Sequence[Stored]: ...

    def run(self, sql: str, rows: Sequence[Values]) -> None: ...

    def commit(self) -> None: ...


async def inside(
    connection: AsyncConnection, work: Callable[[Statements], None]
) -> None:
    """Do a part of a transaction where the database is.

    SQLite is in a thread of this process: the work goes there in one trip, where
    SQLAlchemy would make one of 100 us for each statement; a group has a dozen.
    """
    if connection.dialect.name != "sqlite":
        await connection.run_sync(lambda inner: work(_Through(inner)))
        return
    raw = await connection.get_raw_connection()
    driver = cast("_OneHopConnection", raw.driver_connection)
    try:
        await driver.inside(connection.dialect, work)
    except sqlite3.IntegrityError as error:
        raise IntegrityError("a group's work", None, error) from error
    except sqlite3.OperationalError as error:
        raise OperationalError("a group's work", None, error) from error
    except sqlite3.Error as error:
        raise DatabaseError("a group's work", None, error) from error


class _Direct:
    """SQLite's connection, in its own thread."""

    def __init__(self, connection: sqlite3.Connection, dialect: Dialect) -> None:
        self._connection = connection
        self.dialect = dialect

    def begin(self) -> None:
        self._connection.execute(_BEGIN)

    def fetch(self, sql: str, values: Values) -> Sequence[Stored]:
        return self._connection.execute(sql, values).fetchall()

    def run(self, sql: str, rows: Sequence[Values]) -> None:
        self._connection.executemany(sql, rows)

    def commit(self) -> None:
        self.dialect.do_commit(cast("PoolProxiedConnection", self._connection))


class _Through:
    """SQLAlchemy's connection, for every other database."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect = connection.dialect

    def begin(self) -> None:
        if not self._connection.in_transaction():
            self._connection.begin()

    def fetch(self, sql: str, values: Values) -> Sequence[Stored]:
        rows = self._connection.exec_driver_sql(sql, values)
        return [tuple(row) for row in rows]

    def run(self, sql: str, rows: Sequence[Values]) -> None:
        self._connection.exec_driver_sql(sql, list(rows))

    def commit(self) -> None:
        self._connection.commit()


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
    connection.exec_driver_sql(_BEGIN)


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
    _stopping: asyncio.Future[None] | None = None

    @override
    async def _connect(self) -> aiosqlite.Connection:
        try:
            return await super()._connect()
        except BaseException:
            # It has told its thread to end. Wait for that: the thread answers to this
            # loop, which may be closed right after such an error.
            if self._stopping is not None:
                await self._stopping
            raise

    @override
    def stop(self) -> asyncio.Future[None] | None:
        self._stopping = super().stop()
        return self._stopping

    async def inside(
        self, dialect: Dialect, work: Callable[[Statements], None]
    ) -> None:
        """Do this in the connection's thread."""
        run = partial(work, _Direct(self._conn, dialect))
        await self._execute(run)  # type: ignore[no-untyped-call] # aiosqlite's own way

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
