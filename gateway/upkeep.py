"""What has to be done now and then: sweeps, renewals, keys that leave the memory."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provisioning.ca.renew import renew_own
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.model.events import UPKEEP_FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from gateway.parts import Parts
    from provisioning.ca.renew import Own

TICK_S = 15.0
SWEEP_TICKS = 2
RENEW_TICKS = 240
"""An hour: certificates are renewed with a third of their life left."""

TICKET_TICKS = 5_760
"""A day: new contexts have new ticket keys (RFC 9325: rotated at least daily)."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """The task that looks after what nobody asks for.

    on_renewed: given the server's certificates as they are now, to serve with.
    """

    parts: Parts
    clock: Callable[[], datetime]
    on_renewed: Callable[[Own], None]
    tell: Callable[[str, Mapping[str, object]], None]

    async def run(self) -> None:
        """Work until cancelled; what is away is tried again at its next turn."""
        tick = 0
        while True:
            await asyncio.sleep(TICK_S)
            tick += 1
            self.parts.keys.expire()
            try:
                if tick % SWEEP_TICKS == 0:
                    await self.sweep()
                if tick % RENEW_TICKS == 0:
                    await self.renew(always=tick % TICKET_TICKS == 0)
            except (Unavailable, Unusable, OutcomeUnknown) as error:
                self.tell(UPKEEP_FAILED, {"why": str(error)})

    async def sweep(self) -> None:
        """Write down what the time has ended: grace periods and certificates."""
        await self.parts.registry.sweep(self.clock())

    async def renew(self, *, always: bool = False) -> None:
        """Renew our own certificates when two thirds of their life are gone."""
        before = self.parts.own
        own = await renew_own(
            self.parts.token,
            self.parts.config.ca,
            self.parts.hierarchy,
            self.clock(),
            secrets.token_bytes,
        )
        if always or own.server_chain_pem != before.server_chain_pem:
            self.on_renewed(own)
        elif own.responders != before.responders:
            self.parts.publisher.use(own)
