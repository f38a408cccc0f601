"""Follows what any process wrote to the registry: revocations, rotations, releases.

Every change has a number. This gateway looks for new ones at least every 250 ms,
applies them in order and says up to which it has come, which is how `devices revoke`
knows that it bites. Without the registry, revocation cannot be seen: then live
connections end after `registry_grace`.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provisioning.model.credentials import CredentialState, DeviceState
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.model.events import CUT, REGISTRY_AWAY, REGISTRY_BACK
from provisioning.model.ids import Serial
from provisioning.model.refusals import (
    AWAY,
    CREDENTIAL_EXPIRED,
    CREDENTIAL_REVOKED,
    CREDENTIAL_SUPERSEDED,
    DEVICE_RETIRED,
    DEVICE_REVOKED,
    DEVICE_SUSPENDED,
    Refusal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime, timedelta

    from gateway.live import Connection, Live
    from provisioning.model.credentials import Standing
    from provisioning.psk.keys import KeyCache
    from provisioning.registry.changes import Change
    from provisioning.registry.store import Registry

LOOK_S = 0.2
"""Between two looks: the design allows 250 ms."""

STALE_S = 2.0
"""Nobody new is let in when the registry was not seen for so long."""

PAGE = 500
"""Changes applied before the gateway says how far it has come."""


@dataclass(frozen=True, slots=True)
class Followers:
    """What a change leads to. on_rotate: a device was asked to rotate by then.

    on_changed: a device or credential changed; CRL and OCSP may have to follow.
    """

    on_rotate: Callable[[Change], None]
    on_changed: Callable[[Change], None]


class Follower:
    """The task that keeps this gateway in step with the registry."""

    def __init__(  # noqa: PLR0913 - the parts it joins, each by its name
        self,
        name: str,
        registry: Registry,
        live: Live,
        keys: KeyCache,
        followers: Followers,
        *,
        grace: timedelta,
        clock: Callable[[], datetime],
        tell: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._name = name
        self._registry = registry
        self._live = live
        self._keys = keys
        self._followers = followers
        self._grace_s = grace.total_seconds()
        self._clock = clock
        self._tell = tell
        self._seq = 0
        self._gateway = 0
        self._good = 0.0
        """When, by the loop's clock, the registry was last looked at."""
        self._away = False

    @property
    def in_step(self) -> bool:
        """False while the registry is away: what is remembered may be out of date."""
        return asyncio.get_running_loop().time() - self._good < STALE_S

    async def join(self) -> None:
        """Begin at the newest change: what came before is read where it is needed."""
        self._good = asyncio.get_running_loop().time()
        self._seq = await self._registry.latest_seq()
        self._gateway = await self._registry.join_gateway(
            self._name, os.getpid(), self._clock()
        )

    async def leave(self) -> None:
        """No change waits for this gateway any more."""
        await self._registry.leave(self._gateway)

    async def run(self) -> None:
        """Look, apply, acknowledge, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._watch())

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        beaten = 0.0
        while True:
            try:
                moved = await self._step()
                now = loop.time()
                if moved or now - beaten > 1:
                    await self._registry.beat(self._gateway, self._seq, self._clock())
                    beaten = now
            except (Unavailable, Unusable, OutcomeUnknown) as error:
                if not self._away:
                    self._away = True
                    self._tell(REGISTRY_AWAY, {"why": str(error)})
            else:
                self._good = loop.time()
                if self._away:
                    self._away = False
                    self._tell(REGISTRY_BACK, {})
            await asyncio.sleep(LOOK_S)

    async def _watch(self) -> None:
        """End live connections when the registry has been away for too long.

        A task of its own: a database that hangs answers no look.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1)
            if loop.time() - self._good > self._grace_s:
                self._end_all()

    async def _step(self) -> bool:
        moved = False
        while changes := await self._registry.changes_after(self._seq, PAGE):
            for change in changes:
                self._registry.apply_change(change)
                await self._apply(change)
                self._seq = change.seq
                moved = True
            if len(changes) < PAGE:
                break
        return moved

    async def _apply(self, change: Change) -> None:
        if change.device is None:
            return
        for connection in self._live.of(change.device):
            refusal = cut_reason(await self._standing(connection))
            if refusal is not None:
                self._tell(
                    CUT,
                    {"device": change.device.text, "reason": refusal.code},
                )
                self._live.remove(connection)
                connection.cut(refusal)
        if change.kind == "device" or change.detail.get("generation") is not None:
            self._keys.forget(change.device)
        if change.kind in ("device", "credential"):
            self._followers.on_changed(change)
        if change.kind == "rotate":
            self._followers.on_rotate(change)

    async def _standing(self, connection: Connection) -> Standing | None:
        named = connection.credential
        if isinstance(named, Serial):
            return await self._registry.standing_of_certificate(named, self._clock())
        return await self._registry.standing_of_psk(named, self._clock())

    def _end_all(self) -> None:
        for connection in self._live.everyone():
            self._live.remove(connection)
            connection.cut(AWAY)


_DEVICE_CUTS = {
    DeviceState.REVOKED: DEVICE_REVOKED,
    DeviceState.SUSPENDED: DEVICE_SUSPENDED,
    DeviceState.RETIRED: DEVICE_RETIRED,
}


def cut_reason(standing: Standing | None) -> Refusal | None:
    """Why a live connection with this credential has to end; None if it may stay."""
    if standing is None:
        return CREDENTIAL_REVOKED
    by_device = _DEVICE_CUTS.get(standing.device_state)
    if by_device is not None:
        return by_device
    if standing.credential.state is CredentialState.REVOKED:
        return CREDENTIAL_REVOKED
    if standing.credential.state is CredentialState.SUPERSEDED:
        return CREDENTIAL_SUPERSEDED
    if standing.credential.state is CredentialState.EXPIRED:
        return CREDENTIAL_EXPIRED
    return None
