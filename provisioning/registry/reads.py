"""Questions that change nothing: operators, revocation answers, missed standings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, bindparam, or_, select, union_all

from provisioning.model.credentials import (
    AuthMethod,
    DeviceState,
    RevocationReason,
)
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.registry.lookup import (
    CREDENTIAL_COLUMNS,
    DEVICE_COLUMNS,
    keep_credential,
)
from provisioning.registry.page import Known
from provisioning.registry.records import (
    AuditRow,
    CertStatus,
    DevicePage,
    DeviceView,
    LastSeen,
    OpenIntent,
    TokenRow,
)
from provisioning.registry.rows import DeviceRow, TokenState
from provisioning.registry.schema import (
    ENDING,
    LIVING,
    OPEN,
    REVOKED,
    audit,
    counters,
    credentials,
    devices,
    from_us,
    intents,
    maybe_from_us,
    to_us,
    tokens,
)
from provisioning.registry.standings import Held, held

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime, timedelta

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from provisioning.registry.rows import CredentialRow

    # The driver's values: their types end where a row is made of them.
    Stored = Row[*tuple[Any, ...]]
    from provisioning.registry.standings import Key

_c, _d, _i, _t = credentials.c, devices.c, intents.c, tokens.c

_BESIDE = select(*CREDENTIAL_COLUMNS, *DEVICE_COLUMNS).join_from(
    credentials, devices, _c.device == _d.id
)
# Not OR: SQLite would read the whole table.
_STANDINGS = union_all(
    _BESIDE.where(_c.serial.in_(bindparam("serials", expanding=True))),
    _BESIDE.where(
        _d.folded.in_(bindparam("folded", expanding=True)),
        _c.generation.in_(bindparam("generations", expanding=True)),
    ),
)
_SEEN = (_d.seen_at, _d.seen_auth, _d.seen_resumed, _d.seen_address)
_DEVICES: Select[*tuple[Any, ...]] = select(*DEVICE_COLUMNS, *_SEEN)
_CREDENTIALS = (
    select(*CREDENTIAL_COLUMNS)
    .where(_c.device.in_(bindparam("ids", expanding=True)))
    .order_by(_c.id)
)
_STATUS = select(_c.id, _c.serial, _c.not_after, _c.revoked_at, _c.reason)
_STATUS_OF = _STATUS.where(
    _c.serial == bindparam("serial"), _c.issuer == bindparam("issuer")
)
_REVOKED = _STATUS.where(
    _c.issuer == bindparam("issuer"),
    REVOKED,
    or_(_c.not_after.is_(None), _c.not_after >= bindparam("since")),
).order_by(_c.id)
_UNEXPIRED = (
    _STATUS.where(
        _c.id > bindparam("after"),
        _c.issuer == bindparam("issuer"),
        _c.serial.is_not(None),
        or_(_c.not_after.is_(None), _c.not_after >= bindparam("now")),
    )
    .order_by(_c.id)
    .limit(bindparam("most"))
)
_DUE = union_all(
    select(_c.id).where(ENDING, _c.ends_at <= bindparam("now")),
    select(_c.id).where(LIVING, _c.not_after < bindparam("now")),
).limit(bindparam("most"))
_TOKENS = (
    select(
        _t.id,
        _t.hash,
        _t.device,
        _t.uses,
        _t.used,
        _t.expires_at,
        _t.profile,
        _t.revoked_at,
        _t.created_at,
        _d.device_id,
    )
    .join_from(tokens, devices, _t.device == _d.id, isouter=True)
    .order_by(_t.created_at, _t.id)
)
_OPEN = (
    select(_i.id, _d.device_id, _i.serial, _i.issuer, _i.line, _i.created_at)
    .join_from(intents, devices, _i.device == _d.id)
    .where(OPEN)
    .order_by(_i.created_at)
)
_NEWEST = select(counters.c.value).where(counters.c.name == "newest")
_AUDIT = select(audit.c.id, audit.c.at, audit.c.event, audit.c.actor, audit.c.fields)


async def standings(connection: AsyncConnection, keys: Iterable[Key]) -> list[Held]:
    """What these serials and PSK identities stand for; unknown ones are left out.

    More may be found than was asked: generations are looked up crosswise.
    """
    serials = [key.hex for key in keys if isinstance(key, Serial)]
    identities = [key for key in keys if isinstance(key, PskIdentity)]
    rows = await connection.execute(
        _STANDINGS,
        {
            "serials": serials,
            "folded": list({key.device.folded for key in identities}),
            "generations": list({key.generation for key in identities}),
        },
    )
    known = Known()
    columns = len(CREDENTIAL_COLUMNS)
    return [
        held(keep_credential(known, row[:columns]), _device_row(row[columns:]))
        for row in rows
    ]


async def due(connection: AsyncConnection, now: datetime, limit: int) -> list[int]:
    """Credentials whose grace or lifetime is over and that do not know it yet."""
    return list(await connection.scalars(_DUE, {"now": to_us(now), "most": limit}))


async def device(connection: AsyncConnection, name: DeviceId) -> DeviceView | None:
    """One device, with every credential it ever had."""
    found = await _views(
        connection, _DEVICES.where(_d.folded == name.folded, _d.device_id == name.text)
    )
    return found[0] if found else None


async def list_devices(
    connection: AsyncConnection,
    cursor: str | None,
    limit: int,
    state: DeviceState | None,
    prefix: str | None,
) -> DevicePage:
    """Devices in the order of their folded IDs, those after the cursor."""
    query = _DEVICES.order_by(_d.folded).limit(limit + 1)
    if cursor is not None:
        query = query.where(_d.folded > cursor)
    if state is not None:
        query = query.where(_d.state == state.value)
    if prefix:
        query = query.where(_d.folded.startswith(prefix.lower(), autoescape=True))
    views = await _views(connection, query)
    more = len(views) > limit
    views = views[:limit]
    return DevicePage(tuple(views), views[-1].id.folded if more and views else None)


async def list_tokens(connection: AsyncConnection) -> list[TokenRow]:
    """Every token, oldest first."""
    return [
        TokenState(*row[:-1]).seen_as(None if row[-1] is None else DeviceId(row[-1]))
        for row in await connection.execute(_TOKENS)
    ]


async def unresolved_intents(
    connection: AsyncConnection, older_than: datetime | None
) -> list[OpenIntent]:
    """Intents without an outcome, oldest first."""
    query = _OPEN
    if older_than is not None:
        query = query.where(_i.created_at < to_us(older_than))
    return [
        OpenIntent(
            id=number,
            device=DeviceId.parse(name),
            serial=Serial.parse(serial),
            issuer=issuer,
            line=line,
            created_at=from_us(created_at),
        )
        for number, name, serial, issuer, line, created_at in await connection.execute(
            query
        )
    ]


async def certificate_status(
    connection: AsyncConnection, issuer: str, serial: Serial
) -> CertStatus | None:
    """What to answer about a certificate; None for one that was never issued."""
    parameters = {"issuer": issuer, "serial": serial.hex}
    row = (await connection.execute(_STATUS_OF, parameters)).one_or_none()
    return None if row is None else _status(row)


async def revoked(
    connection: AsyncConnection, issuer: str, now: datetime, keep: timedelta
) -> list[CertStatus]:
    """What a CRL lists: revoked, and not expired for longer than `keep`."""
    parameters = {"issuer": issuer, "since": to_us(now - keep)}
    return [_status(row) for row in await connection.execute(_REVOKED, parameters)]


async def unexpired(
    connection: AsyncConnection, issuer: str, after_id: int, limit: int, now: datetime
) -> list[CertStatus]:
    """Certificates to sign answers for, in the order of their numbers."""
    parameters = {
        "issuer": issuer,
        "after": after_id,
        "most": limit,
        "now": to_us(now),
    }
    return [_status(row) for row in await connection.execute(_UNEXPIRED, parameters)]


async def newest_time(connection: AsyncConnection) -> datetime | None:
    """The newest time that anything written carries."""
    return maybe_from_us(await connection.scalar(_NEWEST))


async def audit_after(
    connection: AsyncConnection, after_id: int, limit: int
) -> list[AuditRow]:
    """Audit events in the order of their numbers."""
    query = _AUDIT.where(audit.c.id > after_id).order_by(audit.c.id).limit(limit)
    return [
        AuditRow(number, from_us(at), event, actor, json.loads(fields))
        for number, at, event, actor, fields in await connection.execute(query)
    ]


def _device_row(row: Sequence[Any]) -> DeviceRow:
    number, name, state, rotate_by, created_at = row[: len(DEVICE_COLUMNS)]
    return DeviceRow(
        id=number,
        device=DeviceId(name),
        state=DeviceState(state),
        rotate_by=rotate_by,
        created_at=created_at,
    )


async def _views(
    connection: AsyncConnection, query: Select[*tuple[Any, ...]]
) -> list[DeviceView]:
    rows = (await connection.execute(query)).all()
    found = await connection.execute(_CREDENTIALS, {"ids": [row[0] for row in rows]})
    known = Known()
    held_by: dict[int, list[CredentialRow]] = {}
    for credential in (keep_credential(known, row) for row in found):
        held_by.setdefault(credential.device, []).append(credential)
    return [_view(row, held_by.get(row[0], [])) for row in rows]


def _view(row: Stored, credentials_: Iterable[CredentialRow]) -> DeviceView:
    one = _device_row(row)
    at, auth, resumed, address = row[len(DEVICE_COLUMNS) :]
    seen = None
    if at is not None:
        seen = LastSeen(from_us(at), AuthMethod(auth), resumed, address)
    return DeviceView(
        id=one.device,
        state=one.state,
        rotate_by=maybe_from_us(one.rotate_by),
        created_at=from_us(one.created_at),
        credentials=tuple(each.seen_as(one.device) for each in credentials_),
        last_seen=seen,
    )


def _status(row: Stored) -> CertStatus:
    number, serial, not_after, revoked_at, reason = row
    return CertStatus(
        id=number,
        serial=Serial.parse(serial),
        not_after=maybe_from_us(not_after),
        revoked_at=maybe_from_us(revoked_at),
        reason=None if reason is None else RevocationReason(reason),
    )
