"""Group commit: waiting operations share one transaction and one trip to the disk.

While a transaction is on its way, further operations gather; the next one takes them
all. Each is decided by itself, in order, on one page; what they need is read, and what
they change is written, in few statements for all of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from provisioning.model.errors import OutcomeUnknown, PeerError, Unavailable
from provisioning.registry.engine import (
    BUSY_TIMEOUT_S,
    fault,
    inside,
    surely_not_committed,
)
from provisioning.registry.flush import flush
from provisioning.registry.lookup import begin, look_up
from provisioning.registry.page import Page, Wants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from provisioning.registry.engine import Statements
    from provisioning.registry.page import Operation

T = TypeVar("T")

MAX_GROUP = 256
"""Operations in one transaction: enough to share a disk flush, few enough to read."""

MAX_PAGE = 4_000
"""Rows and keys kept in memory between transactions, about 4 MB."""


class _Ticket(Generic[T]):
    """One operation, its caller, and what it came to."""

    def __init__(self, operation: Operation[T], future: asyncio.Future[T]) -> None:
        self.operation = operation
        self.future = future
        self.outcome: T | None = None
        self.error: BaseException | None = None

    def decide(self, page: Page) -> None:
        """Apply the operation; what it refuses is its caller's alone."""
        self.error = None
        try:
            self.outcome = self.operation.apply(page)
        except (PeerError, OutcomeUnknown) as answer:
            self.error = answer
        except Exception as error:
            # A bug, and perhaps half of its changes are on the page.
            self.error = error
            raise _DecisionError(self) from error

    def settle(self, error: BaseException | None = None) -> None:
        """Tell the caller, unless it has gone away meanwhile."""
        if self.future.done():
            return
        error = error or self.error
        if error is None:
            self.future.set_result(self.outcome)  # type: ignore[arg-type] # T was set
        else:
            self.future.set_exception(error)


class _DecisionError(Exception):
    """An operation raised what is no refusal."""

    def __init__(self, ticket: _Ticket[Any]) -> None:
        super().__init__(ticket)
        self.ticket = ticket


class Writer:
    """Owns the writing connection and the page.

    committed: called after each commit, before any caller hears of it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        committed: Callable[[Page], None],
        *,
        deadline_s: float = BUSY_TIMEOUT_S * 2,
    ) -> None:
        self._engine = engine
        self._committed = committed
        self._deadline_s = deadline_s
        self._connection: AsyncConnection | None = None
        self._page = Page()
        self._waiting: list[_Ticket[Any]] = []
        self._draining: asyncio.Task[None] | None = None
        self._writing = False
        self._committing = False
        self._closed = False
        self.groups = 0
        """Transactions committed so far."""

    async def run(self, operation: Operation[T]) -> T:
        """Do this with whatever else is waiting; return when it is on the disk.

        A caller that is cancelled hears nothing; its operation happens all the same.
        Raises what `apply` raised; Unavailable("registry") when nothing happened and
        a retry may help, Unusable when it will not; OutcomeUnknown when it may have
        happened.
        """
        if self._closed:
            raise Unavailable("registry")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        ticket = _Ticket(operation, future)
        self._waiting.append(ticket)
        if self._draining is None:
            # Not in a TaskGroup: it ends by itself, and `close` waits for it.
            self._draining = asyncio.create_task(self._drain(), name="registry writer")
        return await future

    async def close(self) -> None:
        """Finish what is waiting, and take nothing more."""
        self._closed = True
        if self._draining is not None:
            await asyncio.shield(self._draining)
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _drain(self) -> None:
        taken: list[_Ticket[Any]] = []
        try:
            while self._waiting:
                taken = self._waiting[:MAX_GROUP]
                del self._waiting[: len(taken)]
                try:
                    await self._transact(taken)
                except Exception as error:  # noqa: BLE001 - this task's outermost shell
                    await self._abandon()
                    for ticket in taken:
                        ticket.settle(error)
                # Callers that were just told may have a next operation for the next
                # group: let them say so.
                await asyncio.sleep(0)
        finally:
            self._draining = None
            # Only when this task was ended from outside: nobody will come back.
            for ticket in (*taken, *self._waiting):
                ticket.future.cancel()
            self._waiting.clear()

    async def _transact(self, group: Sequence[_Ticket[Any]]) -> None:
        try:
            await self._attempt(group)
        except _DecisionError as broken:
            await self._abandon()
            broken.ticket.settle()
            await self._one_by_one([one for one in group if one is not broken.ticket])
        except IntegrityError as error:
            await self._abandon()
            if len(group) > 1:
                await self._one_by_one(group)
            else:
                group[0].settle(error)
        except DBAPIError as error:
            await self._fail(group, error)
        except (PoolTimeout, OSError) as error:
            await self._fail(group, error)
        except TimeoutError:
            await self._fail(group, None)
        else:
            for ticket in group:
                ticket.settle()

    async def _one_by_one(self, group: Sequence[_Ticket[Any]]) -> None:
        for ticket in group:
            await self._transact([ticket])

    async def _attempt(self, group: Sequence[_Ticket[Any]]) -> None:
        page = self._page
        wants = Wants()
        for ticket in group:
            ticket.operation.want(wants)

        def read(statements: Statements) -> None:
            statements.begin()
            begin(statements, page)
            look_up(statements, page, wants)

        def write(statements: Statements) -> None:
            flush(statements, page)
            self._committing = True
            statements.commit()

        self._writing = self._committing = False
        # The page is handed to the database's thread and back; decisions are made
        # here, where their callers live.
        async with asyncio.timeout(self._deadline_s):
            if self._connection is None:
                self._connection = await self._engine.connect()
            await inside(self._connection, read)
            for ticket in group:
                ticket.decide(page)
            self._writing = True
            await inside(self._connection, write)
        self.groups += 1
        self._committed(page)
        page.settled()
        if page.known.size() > MAX_PAGE:
            page.forget()

    async def _fail(
        self, group: Sequence[_Ticket[Any]], error: BaseException | None
    ) -> None:
        await self._abandon()
        if error is None:
            # Out of time: what was on its way may still arrive.
            unknown = self._writing
        else:
            unknown = self._committing and not (
                isinstance(error, DBAPIError) and surely_not_committed(error)
            )
        for ticket in group:
            answer = (
                OutcomeUnknown("a write to the registry") if unknown else fault(error)
            )
            answer.__cause__ = error
            ticket.settle(answer)

    async def _abandon(self) -> None:
        """Roll back by throwing the connection away, and begin a new page.

        The database's thread may still be at work on the old one.
        """
        self._page = Page()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.invalidate()
            await connection.close()
