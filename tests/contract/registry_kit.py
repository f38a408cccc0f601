"""What the tests of the registry share: a fleet's words, and a database for each.

SQLite always; PostgreSQL too where BIRTHMARK_TEST_POSTGRESQL names a server, such as
`postgresql+asyncpg://user:password@host/database` (its schema is dropped each time).
"""

from __future__ import annotations

import hashlib
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from provisioning.model.credentials import AuthMethod
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.registry.records import Ask, NewIntent
from provisioning.registry.store import Registry
from provisioning.registry.upgrade import upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from provisioning.model.credentials import Credential, Standing
    from provisioning.registry.records import Facts

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
PUMP = DeviceId.parse("pump-7")
VALVE = DeviceId.parse("valve-2")
OPERATOR = "operator ada"

SERVERS = [
    name for name in [os.environ.get("BIRTHMARK_TEST_POSTGRESQL")] if name is not None
]


async def new_database(folder: Path, server: str = "sqlite") -> str:
    """The URL of an empty registry."""
    if server == "sqlite":
        # A test that makes the file busy need not wait as long as production would.
        url = f"sqlite+aiosqlite:///{folder / 'registry.sqlite3'}?timeout=0.3"
    else:
        url = server
        engine = create_async_engine(make_url(server))
        async with engine.begin() as connection:
            await connection.execute(text("DROP SCHEMA public CASCADE"))
            await connection.execute(text("CREATE SCHEMA public"))
        await engine.dispose()
    await upgrade(url)
    return url


@asynccontextmanager
async def opened(url: str, **options: int) -> AsyncIterator[Registry]:
    registry = await Registry.open(url, **options)
    try:
        yield registry
    finally:
        await registry.close()


def digest(*words: object) -> bytes:
    return hashlib.sha256(repr(words).encode()).digest()


@dataclass(frozen=True)
class Request:
    """A request for a certificate: which device, and which key of its."""

    device: DeviceId = PUMP
    key: object = "key"
    token: bytes | None = None
    credential: int | None = None
    line: str = "ldevid"
    now: datetime = NOW
    lifetime: timedelta | None = 30 * DAY

    @property
    def request_key(self) -> bytes:
        return digest("request", self.device, self.key, self.token, self.credential)

    @property
    def serial(self) -> Serial:
        return Serial.from_random(digest("serial", self, self.now))

    def ask(self) -> Ask:
        return Ask(
            request_key=self.request_key,
            device=self.device,
            token_hash=self.token,
            credential_id=self.credential,
            spki_sha256=digest("spki", self.key),
            line=self.line,
            now=self.now,
        )

    def intent(self, facts: Facts) -> NewIntent:
        """The decision to let it in, whatever the facts."""
        return NewIntent(
            request_key=self.request_key,
            device=self.device,
            line=self.line,
            profile=self.line,
            issuer="issuing",
            serial=self.serial,
            not_before=self.now,
            not_after=None if self.lifetime is None else self.now + self.lifetime,
            spki_sha256=digest("spki", self.key),
            csr_der=b"csr",
            token_id=None if facts.token is None else facts.token.id,
            auth=AuthMethod.TOKEN,
            created_at=self.now,
        )


async def admit(registry: Registry, request: Request) -> NewIntent:
    decision = await registry.admit(request.ask(), request.intent)
    assert isinstance(decision, NewIntent)
    return decision


class LookedError(Exception):
    """Enough was seen."""


async def facts_of(registry: Registry, request: Request) -> Facts:
    """What `decide` is shown; nothing is recorded."""
    seen: list[Facts] = []

    def decide(facts: Facts) -> NewIntent:
        seen.append(facts)
        raise LookedError

    try:
        await registry.admit(request.ask(), decide)
    except LookedError:
        return seen[-1]
    raise AssertionError


async def issue(registry: Registry, request: Request) -> Credential:
    intent = await admit(registry, request)
    return await registry.finish(intent, certificate(request), request.now)


def certificate(request: Request) -> bytes:
    return b"certificate of " + request.serial.hex.encode()


async def connect(
    registry: Registry, credential: Credential, now: datetime = NOW, *, times: int = 1
) -> Standing:
    standing = None
    for _ in range(times):
        standing = await registry.connected(
            credential.id,
            auth=AuthMethod.CERTIFICATE,
            resumed=False,
            address="192.0.2.7:4711",
            now=now,
            grace=HOUR,
        )
    assert standing is not None
    return standing


async def state_of(registry: Registry, credential: Credential) -> str:
    """The credential's state as it is written, past every cache."""
    view = await registry.device(credential.device)
    assert view is not None
    return next(one.state for one in view.credentials if one.id == credential.id)


async def psk_standing(
    registry: Registry, generation: int, device: DeviceId = PUMP
) -> Standing | None:
    return await registry.standing_of_psk(PskIdentity(device, generation))


async def new_token(
    registry: Registry,
    name: str = "token",
    *,
    uses: int = 1,
    device: DeviceId | None = None,
) -> bytes:
    token = digest(name)
    await registry.create_token(
        token_hash=token,
        device=device,
        uses=uses,
        expires=NOW + DAY,
        profile=None,
        now=NOW,
        actor=OPERATOR,
    )
    return token
