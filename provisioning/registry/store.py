"""The registry: what is remembered of devices, credentials and tokens.

Writes go through one writer in groups and are on the disk when the call returns; known
standings come from memory. All times are aware UTC and given by the caller. Every call
raises Unavailable("registry") while the database is away; a write raises
OutcomeUnknown when it may have happened.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.registry import reads
from provisioning.registry.desk import Desk
from provisioning.registry.engine import exists, fault, reader_engine, writer_engine
from provisioning.registry.enrolments import Admit, Finish, Void
from provisioning.registry.gather import Reader
from provisioning.registry.proofs import Connect, EndIfDue, NextPsk, Rotated, Seen
from provisioning.registry.records import LastSeen
from provisioning.registry.schema import SCHEMA_VERSION, to_us
from provisioning.registry.standings import Standings, held
from provisioning.registry.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta

    from sqlalchemy.ext.asyncio import AsyncEngine

    from provisioning.model.credentials import AuthMethod, Credential, Standing
    from provisioning.model.ids import DeviceId, PskIdentity, Serial
    from provisioning.registry.changes import Change
    from provisioning.registry.page import Page
    from provisioning.registry.records import Ask, Decision, Facts, NewIntent
    from provisioning.registry.standings import Key

SEEN_EVERY_S = 1.0
"""How long sightings of devices gather before they are written."""

SWEEP = 500
"""Credentials that one sweep ends at most."""


class Registry(Desk):
    """One process's registry; several processes may have the same database open."""

    def __init__(
        self, writing: AsyncEngine, reading: AsyncEngine, *, cache_size: int
    ) -> None:
        self._standings = Standings(cache_size)
        self._writing = writing
        self._writer = Writer(writing, self._committed)
        self._reader = Reader(reading, self._standings)
        self._seen: dict[int, LastSeen] = {}
        self._seen_timer: asyncio.TimerHandle | None = None
        self._seen_task: asyncio.Task[None] | None = None
        self._doubts: list[tuple[NewIntent, datetime]] = []

    @classmethod
    async def open(cls, url: str, *, cache_size: int = 50_000) -> Self:
        """Open a registry that `upgrade` has made; `url` as SQLAlchemy writes it.

        Raises Unusable for one that is missing, older or newer than this program.
        """
        if not exists(url):
            raise Unusable("registry", "there is none yet; run `birthmark db upgrade`")
        reading = reader_engine(url)
        try:
            await _check_version(reading)
        except BaseException:
            await reading.dispose()
            raise
        return cls(writer_engine(url), reading, cache_size=cache_size)

    async def close(self) -> None:
        """Write what is waiting, and let the database go."""
        await self.write_seen()
        if self._seen_task is not None:
            await self._seen_task
        await self._writer.close()
        await self._writing.dispose()
        await self._reader.close()

    # Enrolment ---------------------------------------------------------------------

    async def admit(self, ask: Ask, decide: Callable[[Facts], Decision]) -> Decision:
        """Gather the facts, decide, and record the intent, in one transaction.

        decide: pure; called once, more often when others of its group failed. What it
        raises as PeerError goes to this caller. A NewIntent comes back with its id.
        """
        await self._settle_doubts()
        admit = Admit(ask, decide)
        try:
            return await self._writer.run(admit)
        except OutcomeUnknown:
            # The intent may be there, and nobody will sign for it: void it when the
            # database is back, or the device's retries would wait for it.
            if admit.recorded is not None:
                self._doubts.append((admit.recorded, ask.now))
            raise

    async def finish(
        self, intent: NewIntent, certificate_der: bytes, now: datetime
    ) -> Credential:
        """Record an issued certificate; only when this returns may it be released.

        May be repeated. Raises PeerError(device_revoked | device_retired) when that
        happened meanwhile, and OutcomeUnknown when the intent was voided by others.
        """
        return await self._writer.run(Finish(intent, certificate_der, now))

    async def void(self, intent_id: int, why: str, now: datetime) -> bool:
        """Give an intent up, and its token's use back; nothing if it is resolved.

        Gives whether it was open: False means that its certificate stands, or never
        will.
        """
        return await self._writer.run(Void(intent_id, why, now))

    async def _settle_doubts(self) -> None:
        while self._doubts:
            intent, now = self._doubts.pop()
            try:
                await self._writer.run(
                    Void(intent.id, "answer lost", now, serial=intent.serial)
                )
            except (Unavailable, OutcomeUnknown):
                self._doubts.append((intent, now))
                raise

    # Standing ----------------------------------------------------------------------

    async def standing_of_certificate(
        self, serial: Serial, now: datetime | None = None
    ) -> Standing | None:
        """What a certificate stands for; None for one that is not in the registry.

        now: when given, a grace that is over by then counts although no sweep saw it.
        """
        return await self._standing(serial, now)

    async def standing_of_psk(
        self, identity: PskIdentity, now: datetime | None = None
    ) -> Standing | None:
        """What a PSK identity stands for; None for one that was never given out."""
        return await self._standing(identity, now)

    async def _standing(self, key: Key, now: datetime | None) -> Standing | None:
        entry = self._standings.get(key) or await self._reader.standing(key)
        if entry is None:
            return None
        return entry.at(None if now is None else to_us(now))

    async def connected(  # noqa: PLR0913 - what is told of a connection
        self,
        credential_id: int,
        *,
        auth: AuthMethod,
        resumed: bool,
        address: str,
        now: datetime,
        grace: timedelta,
    ) -> Standing:
        """A credential was proven on a connection; how it stands after that.

        The first proof makes it active and gives older ones of its line until
        `grace` after it; the second ends those. Later ones write nothing but when the
        device was last seen, gathered over a second. One that may not connect is left
        as it is, so look at what comes back. Raises PeerError(credential_unknown).
        """
        entry = self._standings.of_credential(credential_id)
        if entry is not None and entry.settled(to_us(now)):
            standing, device = entry.standing, entry.device
        else:
            standing, device = await self._writer.run(
                Connect(credential_id, now, grace)
            )
        self._seen[device] = LastSeen(now, auth, resumed, address)
        if self._seen_timer is None:
            self._seen_timer = asyncio.get_running_loop().call_later(
                SEEN_EVERY_S, self._seen_due
            )
        return standing

    async def rotated(
        self, device: DeviceId, named: Serial | int, now: datetime
    ) -> None:
        """The device uses this serial or generation: older ones of its line end.

        Raises PeerError(device_unknown | credential_unknown), and state_not_allowed
        when it has not connected with it yet.
        """
        await self._writer.run(Rotated(device, named, now))

    async def sweep(self, now: datetime) -> int:
        """Write down whose grace or lifetime is over; how many there were."""
        async with self._reader.connection() as connection:
            due = await reads.due(connection, now, SWEEP)
        ended = await asyncio.gather(
            *(self._writer.run(EndIfDue(number, now)) for number in due)
        )
        return sum(ended)

    async def next_psk(self, device: DeviceId, now: datetime, auth: AuthMethod) -> int:
        """The generation to give to a device that proved itself.

        The unproven one as long as there is one. Raises PeerError(device_unknown |
        device_revoked | device_retired).
        """
        return await self._writer.run(
            NextPsk(device, auth.value, f"device {device.text}", now)
        )

    def apply_change(self, change: Change) -> None:
        """Another process wrote this: what is in memory of that device is old."""
        if change.kind == "issued":
            return  # nothing that was known has changed
        if change.device is None:
            self._standings.clear()
        else:
            self._standings.drop(change.device.folded)

    def _committed(self, page: Page) -> None:
        for folded in page.work.touched:
            self._standings.drop(folded)
        for row in page.work.learnt.values():
            self._standings.put(held(row, page.device_of(row)))

    # Last seen ---------------------------------------------------------------------

    def _seen_due(self) -> None:
        self._seen_timer = None
        if self._seen_task is None or self._seen_task.done():
            # Not in a TaskGroup: it ends by itself, and `close` waits for it.
            self._seen_task = asyncio.create_task(
                self.write_seen(), name="registry last seen"
            )

    async def write_seen(self) -> None:
        """Write when devices were last seen now; it happens by itself every second."""
        if self._seen_timer is not None:
            self._seen_timer.cancel()
            self._seen_timer = None
        seen, self._seen = self._seen, {}
        if not seen:
            return
        try:
            await self._writer.run(Seen(seen))
        except (Unavailable, OutcomeUnknown):
            # Not worth a retry of its own: it goes with the next second's.
            self._seen = seen | self._seen


async def _check_version(engine: AsyncEngine) -> None:
    try:
        async with engine.connect() as connection:
            found = list(
                await connection.scalars(
                    text("SELECT version_num FROM alembic_version")
                )
            )
    except (OperationalError, ProgrammingError) as error:
        if "alembic_version" not in str(error.orig):
            raise fault(error) from error
        found = []
    except (DBAPIError, OSError) as error:
        raise fault(error) from error
    if not found or found[0] < SCHEMA_VERSION:
        raise Unusable("registry", "its schema is old; run `birthmark db upgrade`")
    if found != [SCHEMA_VERSION]:
        raise Unusable(
            "registry",
            f"its schema {found[0]} is newer than this program's {SCHEMA_VERSION}; "
            "install the newer program again (`birthmark db upgrade` cannot go back)",
        )
