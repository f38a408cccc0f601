"""What a gateway opens before it serves: registry, token, CA, and the sole right."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from gateway.live import Live
from gateway.peers import Peers
from provisioning.ca.hierarchy import Hierarchy, load_hierarchy
from provisioning.ca.publish import Publisher
from provisioning.ca.renew import Own, load_own
from provisioning.hsm.pin import read_pin
from provisioning.hsm.pkcs11 import TokenConfig, open_token
from provisioning.model.errors import Unusable
from provisioning.psk.keys import KeyCache
from provisioning.registry.store import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from pathlib import Path

    from gateway.log import EventLog
    from provisioning.config import Config
    from provisioning.hsm.token import Token

CLOSE_S = 1.0

CLOCK_SLACK = timedelta(seconds=5)
"""How far this clock may be behind the newest thing the registry has seen."""


def now() -> datetime:
    """The clock of the whole process."""
    return datetime.now(UTC)


@dataclass(slots=True)
class Parts:
    """What is open while the gateway runs."""

    config: Config
    log: EventLog
    token: Token
    registry: Registry
    hierarchy: Hierarchy
    own: Own
    publisher: Publisher
    keys: KeyCache
    live: Live
    peers: Peers


@contextlib.asynccontextmanager
async def opened(config: Config, log: EventLog) -> AsyncIterator[Parts]:
    """Registry, token and CA, opened in the order that finds mistakes first."""
    registry = await Registry.open(config.registry_url)
    try:
        newest = await registry.newest_time()
        if newest is not None and now() < newest - CLOCK_SLACK:
            raise Unusable(
                "the clock",
                f"it says {now():%Y-%m-%d %H:%M:%S}, but the registry has seen "
                f"{newest:%Y-%m-%d %H:%M:%S} UTC; set the clock",
            )
        token = await open_token(token_config(config), on_event=log.tell)
        try:
            hierarchy = load_hierarchy(config.ca)
            own = load_own(config.ca)
            publisher = Publisher(
                registry=registry,
                token=token,
                hierarchy=hierarchy,
                settings=config.ca,
                own=own,
                clock=now,
                on_event=log.tell,
            )
            keys = KeyCache(
                token,
                clock=now,
                keep_for=config.psk.cache_for,
                size=config.psk.cache_size,
            )
            live = Live()
            peers = Peers(
                registry,
                live,
                clock=now,
                grace=config.rotation.grace,
                most=config.limits.connections_of_a_device,
            )
            yield Parts(
                config,
                log,
                token,
                registry,
                hierarchy,
                own,
                publisher,
                keys,
                live,
                peers,
            )
        finally:
            await _bounded(token.close())
    finally:
        await _bounded(registry.close())


async def _bounded(closing: Awaitable[None]) -> None:
    """A module that is stuck or a database that is locked does not hold the end up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await closing


def token_config(config: Config) -> TokenConfig:
    """The token as the configuration names it."""
    hsm = config.hsm
    return TokenConfig(
        module=hsm.module,
        token_label=hsm.token_label,
        pin=read_pin(hsm.pin, folder=config.folder),
        softhsm_conf=str(config.path(hsm.softhsm_conf)) if hsm.softhsm_conf else None,
        deadline_s=hsm.deadline.total_seconds(),
    )


@contextlib.contextmanager
def sole_gateway(folder: Path) -> Iterator[None]:
    """Hold the data directory's lock; Unusable if another gateway has it."""
    run = folder / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(run / "gateway.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unusable(
                str(folder),
                "another gateway serves this data directory; end it first",
            ) from None
        yield
    finally:
        os.close(descriptor)
