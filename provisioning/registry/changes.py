"""The sequence of changes that running gateways follow, and who follows it.

Every write that another process must know of leaves a change in its own transaction.
Numbers are given out under the writers' lock, so they appear in order. Kinds:

- `device`: `state`. What it may do has changed; cut its connections if it may nothing.
- `credential`: `id`, `serial` or `generation`, `state`. Cut connections that used it.
- `rotate`: `by`, RFC 3339, or None when nobody asks any more.
- `issued`: `id`, `serial`, `issuer`. There is a new certificate to sign answers for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import (
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from provisioning.model.ids import DeviceId
from provisioning.registry.schema import changes, from_us, gateways, to_us

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from provisioning.registry.page import Page, Wants

_h, _g = changes.c, gateways.c

_AFTER = (
    select(_h.seq, _h.kind, _h.device, _h.detail, _h.at)
    .where(_h.seq > bindparam("after"))
    .order_by(_h.seq)
    .limit(bindparam("most"))
)
_LATEST = select(func.max(_h.seq))
_BEHIND = (
    select(_g.name)
    .where(_g.applied_seq < bindparam("seq"), _g.beat_at >= bindparam("alive_since"))
    .order_by(_g.name)
)
_LONG_GONE = delete(gateways).where(
    or_(_g.name == bindparam("name"), _g.beat_at < bindparam("since"))
)
_LEAVE = delete(gateways).where(_g.id == bindparam("key"))
_FORGOTTEN = timedelta(days=1)
_JOIN = insert(gateways)
_BEAT = (
    update(gateways)
    .where(_g.id == bindparam("key"))
    .values(applied_seq=bindparam("applied"), beat_at=bindparam("at"))
)


@dataclass(frozen=True, slots=True)
class Change:
    """One change. device: None where it is about none."""

    seq: int
    kind: str
    device: DeviceId | None
    detail: Mapping[str, object]
    at: datetime


async def read_after(connection: AsyncConnection, seq: int, limit: int) -> list[Change]:
    """The next changes after a number, at most so many."""
    rows = await connection.execute(_AFTER, {"after": seq, "most": limit})
    return [
        Change(
            seq=number,
            kind=kind,
            device=None if device is None else DeviceId.parse(device),
            detail=json.loads(detail),
            at=from_us(at),
        )
        for number, kind, device, detail, at in rows
    ]


async def read_latest(connection: AsyncConnection) -> int:
    """The newest change's number, 0 before the first."""
    return await connection.scalar(_LATEST) or 0


async def read_behind(
    connection: AsyncConnection, seq: int, now: datetime, alive_within: timedelta
) -> list[str]:
    """The names of gateways that are alive and have not applied a change."""
    parameters = {"seq": seq, "alive_since": to_us(now - alive_within)}
    return list(await connection.scalars(_BEHIND, parameters))


@dataclass(frozen=True, slots=True)
class Join:
    """A gateway starts to follow. An earlier bearer of its name is gone."""

    name: str
    pid: int
    now: datetime

    def want(self, wants: Wants) -> None:
        del wants

    def apply(self, page: Page) -> int:
        at = page.saw(self.now)
        number = page.next_number("row")
        page.also(
            _LONG_GONE,
            {"name": self.name, "since": to_us(self.now - _FORGOTTEN)},
        )
        page.also(
            _JOIN,
            {
                "id": number,
                "name": self.name,
                "pid": self.pid,
                # It knows nothing yet, so nothing that it knows is out of date.
                "applied_seq": page.counters.get("change", 0),
                "joined_at": at,
                "beat_at": at,
            },
        )
        return number


@dataclass(frozen=True, slots=True)
class Beat:
    """A gateway is alive, and has applied the changes up to a number."""

    gateway_id: int
    applied_seq: int
    now: datetime

    def want(self, wants: Wants) -> None:
        del wants

    def apply(self, page: Page) -> None:
        page.also(
            _BEAT,
            {
                "key": self.gateway_id,
                "applied": self.applied_seq,
                "at": page.saw(self.now),
            },
        )


@dataclass(frozen=True, slots=True)
class Leave:
    """A gateway ends."""

    gateway_id: int

    def want(self, wants: Wants) -> None:
        del wants

    def apply(self, page: Page) -> None:
        page.also(_LEAVE, {"key": self.gateway_id})
