"""What to do with intents found at start: void them, for nothing came of them.

An intent without an outcome was interrupted before `finish`: signed or not, its
certificate was never released, because release follows the record. So it is voided,
which gives the enrolment token's use back, and the device's retry is issued anew under
another serial. A serial of a voided intent is never used again: serials are unique in
the registry, voided intents included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from provisioning.registry.records import OpenIntent
    from provisioning.registry.store import Registry


async def recover(
    registry: Registry, now: datetime, *, older_than: datetime | None = None
) -> list[OpenIntent]:
    """Void every unresolved intent; returns them, for the log.

    older_than: only those begun before; None for all, right when no other gateway
    works on this registry.
    """
    dead = await registry.unresolved_intents(older_than)
    for intent in dead:
        await registry.void(intent.id, "found unresolved at start", now)
    return dead
