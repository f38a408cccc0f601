"""Reads beside the writer: standings that memory missed, asked for in groups."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from provisioning.registry import reads
from provisioning.registry.engine import BUSY_TIMEOUT_S, fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from provisioning.registry.standings import Held, Key, Standings

MAX_GROUP = 256
"""Keys in one question."""


class Reader:
    """Owns the reading connections; fills the cache of standings."""

    def __init__(self, engine: AsyncEngine, standings: Standings) -> None:
        self._engine = engine
        self._standings = standings
        self._waiting: dict[Key, list[asyncio.Future[Held | None]]] = {}
        self._draining: asyncio.Task[None] | None = None
        self.groups = 0
        """Questions asked so far."""

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """A connection for questions; its faults are Unavailable or Unusable."""
        try:
            async with (
                asyncio.timeout(BUSY_TIMEOUT_S * 2),
                self._engine.connect() as connection,
            ):
                yield connection
        except (DBAPIError, PoolTimeout, TimeoutError, OSError) as error:
            raise fault(error) from error

    async def standing(self, key: Key) -> Held | None:
        """What a key stands for, asked for together with whatever else is missed."""
        future: asyncio.Future[Held | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        if self._draining is None:
            # Not in a TaskGroup: it ends by itself, and `close` waits for it.
            self._draining = asyncio.create_task(self._drain(), name="registry reader")
        return await future

    async def close(self) -> None:
        """Answer what is waiting, and let the connections go."""
        if self._draining is not None:
            await asyncio.shield(self._draining)
        await self._engine.dispose()

    async def _drain(self) -> None:
        taken: dict[Key, list[asyncio.Future[Held | None]]] = {}
        try:
            while self._waiting:
                keys = list(self._waiting)[:MAX_GROUP]
                taken = {key: self._waiting.pop(key) for key in keys}
                await self._answer(taken)
        finally:
            self._draining = None
            # Only when this task was ended from outside: nobody will come back.
            for futures in (*taken.values(), *self._waiting.values()):
                for future in futures:
                    future.cancel()
            self._waiting.clear()

    async def _answer(
        self, asked: dict[Key, list[asyncio.Future[Held | None]]]
    ) -> None:
        found: dict[Key, Held] = {}
        failure: Exception | None = None
        try:
            with self._standings.reading() as reading:
                async with self.connection() as connection:
                    for held in await reads.standings(connection, asked):
                        found[held.key] = held
                        reading.put(held)
            self.groups += 1
        except Exception as error:  # noqa: BLE001 - this task's outermost shell
            failure = error
        for key, futures in asked.items():
            for future in futures:
                if future.done():
                    continue
                if failure is not None:
                    future.set_exception(failure)
                else:
                    future.set_result(found.get(key))
