"""What a group wants to know, read in few statements, whatever the group's size.

Every statement is a constant, so that each is compiled once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import bindparam, func, or_, select, union_all

from provisioning.model.credentials import (
    CredentialKind,
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.ids import DeviceId, Serial
from provisioning.registry.rows import (
    LIVE,
    CredentialRow,
    DeviceRow,
    IntentRow,
    TokenState,
)
from provisioning.registry.schema import (
    OPEN,
    UNPROVEN,
    counters,
    credentials,
    devices,
    intents,
    tokens,
)
from provisioning.registry.sql import fetch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from sqlalchemy import ColumnElement

    from provisioning.registry.engine import Statements, Stored
    from provisioning.registry.page import Known, Page, Wants

K = TypeVar("K")

_c, _d, _i, _t = credentials.c, devices.c, intents.c, tokens.c


def _among(column: ColumnElement[object], name: str) -> ColumnElement[bool]:
    return column.in_(bindparam(name, expanding=True))


# PostgreSQL locks these rows until the commit, which makes one writer at a time of
# all processes, as BEGIN IMMEDIATE does in SQLite (where FOR UPDATE compiles to
# nothing): what an operation read is still true when it writes.
_COUNTERS = select(counters.c.name, counters.c.value).with_for_update()

DEVICE_COLUMNS = (_d.id, _d.device_id, _d.state, _d.rotate_by, _d.created_at)
_DEVICES = select(*DEVICE_COLUMNS).where(
    or_(_among(_d.folded, "folded"), _among(_d.id, "ids"))
)

CREDENTIAL_COLUMNS = (
    _c.id,
    _c.device,
    _c.kind,
    _c.line,
    _c.state,
    _c.serial,
    _c.generation,
    _c.issuer,
    _c.not_before,
    _c.not_after,
    _c.spki_sha256,
    _c.request_key,
    _c.first_seen,
    _c.connections,
    _c.ends_at,
    _c.revoked_at,
    _c.reason,
    _c.created_at,
)
_CREDENTIALS = select(*CREDENTIAL_COLUMNS).order_by(_c.id)
# A proven certificate's request is not answered again, so that it need not be found.
# Not OR: SQLite would pass the partial index by and read the whole table.
_BY_KEY = union_all(
    select(*CREDENTIAL_COLUMNS).where(
        or_(
            _among(_c.id, "ids"),
            _among(_c.serial, "serials"),
            _among(_c.spki_sha256, "spkis"),
        )
    ),
    select(*CREDENTIAL_COLUMNS).where(UNPROVEN, _among(_c.request_key, "requests")),
)
_OF_DEVICES = _CREDENTIALS.where(_among(_c.device, "ids"), _among(_c.state, "states"))
_CERTIFICATES = select(_c.id, _c.certificate).where(_among(_c.id, "ids"))
_GENERATIONS = (
    select(_c.device, func.max(_c.generation))
    .where(_among(_c.device, "ids"))
    .group_by(_c.device)
)

_INTENT_COLUMNS = (
    _i.id,
    _i.request_key,
    _i.device,
    _i.line,
    _i.profile,
    _i.issuer,
    _i.serial,
    _i.not_before,
    _i.not_after,
    _i.spki_sha256,
    _i.token,
    _i.auth,
    _i.created_at,
    _i.resolved,
    _i.resolved_at,
    _i.why,
)
_INTENTS = select(*_INTENT_COLUMNS).order_by(_i.id)
_INTENTS_BY_ID = _INTENTS.where(_among(_i.id, "ids"))
# Not OR: SQLite would pass the partial indexes by and read the whole table.
_OPEN_INTENTS = union_all(
    select(*_INTENT_COLUMNS).where(OPEN, _among(_i.request_key, "requests")),
    select(*_INTENT_COLUMNS).where(OPEN, _among(_i.spki_sha256, "spkis")),
)
_OPEN_INTENTS_OF = _INTENTS.where(OPEN, _among(_i.device, "ids"))

_TOKENS = select(
    _t.id,
    _t.hash,
    _t.device,
    _t.uses,
    _t.used,
    _t.expires_at,
    _t.profile,
    _t.revoked_at,
    _t.created_at,
).where(or_(_among(_t.hash, "hashes"), _among(_t.id, "ids")))

_ENDED = (CredentialState.SUPERSEDED, CredentialState.EXPIRED)


def begin(statements: Statements, page: Page) -> None:
    """Lock out other writers, and forget what they may have changed."""
    before = page.counters.get("group")
    page.counters = {row[0]: row[1] for row in fetch(statements, _COUNTERS)}
    page.stored_counters = frozenset(page.counters)
    if page.counters.get("group") != before:
        page.forget()


def look_up(statements: Statements, page: Page, wants: Wants) -> None:
    """Read what is wanted and not yet known."""
    known = page.known
    _tokens(statements, known, wants)
    _intents_by_id(statements, known, wants)
    _open_intents(statements, known, wants)
    _credentials(statements, known, wants)
    _devices(statements, known, wants)
    _of_devices(statements, known, wants)


def _tokens(statements: Statements, known: Known, wants: Wants) -> None:
    hashes = _unknown(wants.token_hashes, known.tokens)
    ids = _unknown(wants.token_ids, known.token_ids)
    if not hashes and not ids:
        return
    known.tokens.update(dict.fromkeys(hashes))
    known.token_ids.update(dict.fromkeys(ids))
    for row in fetch(statements, _TOKENS, {"hashes": hashes, "ids": ids}):
        token = known.token_ids.get(row[0]) or TokenState(*row)
        known.tokens[token.hash] = token
        known.token_ids[token.id] = token


def _intents_by_id(statements: Statements, known: Known, wants: Wants) -> None:
    ids = _unknown(wants.intents | wants.finished, known.intents)
    if ids:
        known.intents.update(dict.fromkeys(ids))
        for row in fetch(statements, _INTENTS_BY_ID, {"ids": ids}):
            _keep_intent(known, row)
    for intent in map(known.intents.get, wants.finished):
        if intent is not None and intent.resolved == "issued":
            wants.credentials.add(intent.id)


def _open_intents(statements: Statements, known: Known, wants: Wants) -> None:
    requests = _unknown(wants.requests, known.open_requests)
    spkis = _unknown(wants.spkis, known.open_keys)
    if not requests and not spkis:
        return
    known.open_requests.update(dict.fromkeys(requests))
    known.open_keys.update({key: [] for key in spkis})
    parameters = {"requests": requests, "spkis": spkis}
    for row in fetch(statements, _OPEN_INTENTS, parameters):
        intent = _keep_intent(known, row)
        if intent.request_key in requests:
            other = known.open_requests[intent.request_key]
            if other is None or other.id < intent.id:
                known.open_requests[intent.request_key] = intent
        if intent.spki_sha256 in spkis:
            rivals = known.open_keys[intent.spki_sha256]
            # Both halves of the union may have it.
            if all(rival is not intent for rival in rivals):
                rivals.append(intent)


def _keep_intent(known: Known, row: Stored) -> IntentRow:
    held = known.intents.get(row[0])
    if held is None:
        held = IntentRow(*row)
        held.serial = Serial.parse(row[6])
        known.intents[held.id] = held
    return held


def _credentials(statements: Statements, known: Known, wants: Wants) -> None:
    ids = _unknown(wants.credentials | wants.live_beside, known.credentials)
    serials = _unknown(wants.serials, known.serials)
    spkis = _unknown(wants.spkis, known.owners)
    requests = _unknown(wants.requests, known.requests)
    if ids or serials or spkis or requests:
        known.credentials.update(dict.fromkeys(ids))
        known.serials.update(dict.fromkeys(serials))
        known.owners.update({key: set() for key in spkis})
        known.requests.update(dict.fromkeys(requests))
        parameters: dict[str, Collection[object]] = {
            "ids": ids,
            "serials": [serial.hex for serial in serials],
            "spkis": spkis,
            "requests": requests,
        }
        for row in fetch(statements, _BY_KEY, parameters):
            held = keep_credential(known, row)
            if held.spki_sha256 in spkis:
                known.owners[held.spki_sha256].add(held.device)
            if (
                held.request_key in requests
                and held.state is CredentialState.PENDING
                and _newer(held, known.requests[held.request_key])
            ):
                known.requests[held.request_key] = held
    _certificates(statements, known, wants)


def _certificates(statements: Statements, known: Known, wants: Wants) -> None:
    """The certificates of requests that may have to be answered again."""
    rows = [known.requests.get(key) for key in wants.requests]
    rows += [known.credentials.get(number) for number in wants.finished]
    repeated = {
        row.id: row for row in rows if row is not None and row.certificate is None
    }
    if repeated:
        for number, certificate in fetch(statements, _CERTIFICATES, {"ids": repeated}):
            repeated[number].certificate = certificate


def keep_credential(known: Known, row: Stored | Sequence[Any]) -> CredentialRow:
    """The held row of this number, or a new one made from what was read."""
    held = known.credentials.get(row[0])
    if held is None:
        held = CredentialRow(*row)
        held.kind = CredentialKind(held.kind)
        held.state = CredentialState(held.state)
        if row[5] is not None:
            held.serial = Serial.parse(row[5])
            known.serials[held.serial] = held
        if row[16] is not None:
            held.reason = RevocationReason(row[16])
        known.credentials[held.id] = held
    return held


def _devices(statements: Statements, known: Known, wants: Wants) -> None:
    folded = _unknown(
        wants.devices.union(
            wants.live, wants.ended, wants.open_intents, wants.generations
        ),
        known.devices,
    )
    ids = _unknown(_device_numbers(known, wants), known.device_rows)
    if not folded and not ids:
        return
    known.devices.update(dict.fromkeys(folded))
    for row in fetch(statements, _DEVICES, {"folded": folded, "ids": ids}):
        if row[0] not in known.device_rows:
            device = DeviceRow(*row)
            # What is stored was parsed when it came in.
            device.device = DeviceId(row[1])
            device.state = DeviceState(row[2])
            known.device_rows[device.id] = device
        device = known.device_rows[row[0]]
        known.devices[device.device.folded] = device


def _device_numbers(known: Known, wants: Wants) -> set[int]:
    """The devices that the wanted tokens, intents and credentials belong to."""
    numbers: set[int] = set()
    rows: list[CredentialRow | IntentRow | TokenState | None] = []
    rows += map(known.tokens.get, wants.token_hashes)
    rows += map(known.token_ids.get, wants.token_ids)
    rows += map(known.intents.get, wants.intents | wants.finished)
    rows += map(known.credentials.get, wants.credentials | wants.live_beside)
    rows += map(known.serials.get, wants.serials)
    rows += map(known.requests.get, wants.requests)
    for row in rows:
        if row is not None and row.device is not None:
            numbers.add(row.device)
    for key in wants.spkis:
        numbers |= known.owners[key]
        numbers.update(row.device for row in known.open_keys[key])
    return numbers


def _of_devices(statements: Statements, known: Known, wants: Wants) -> None:
    live = _numbers(known, wants.live | wants.ended)
    for beside in map(known.credentials.get, wants.live_beside):
        if beside is not None:
            live.add(beside.device)
    _family(statements, known, known.live, live, LIVE)
    _family(statements, known, known.ended, _numbers(known, wants.ended), _ENDED)
    generations = _unknown(_numbers(known, wants.generations), known.generations)
    if generations:
        known.generations.update(dict.fromkeys(generations, 0))
        for number, newest in fetch(statements, _GENERATIONS, {"ids": generations}):
            known.generations[number] = newest or 0
    # Rare, and open intents come and go: read each time, never from memory.
    if open_of := _numbers(known, wants.open_intents):
        for row in fetch(statements, _OPEN_INTENTS_OF, {"ids": open_of}):
            _keep_intent(known, row)


def _family(
    statements: Statements,
    known: Known,
    families: dict[int, list[CredentialRow]],
    wanted: set[int],
    states: Collection[CredentialState],
) -> None:
    """The credentials of devices that are in one of these states."""
    numbers = _unknown(wanted, families)
    if numbers:
        families.update({number: [] for number in numbers})
        parameters: dict[str, Collection[object]] = {
            "ids": numbers,
            "states": [state.value for state in states],
        }
        for row in fetch(statements, _OF_DEVICES, parameters):
            held = keep_credential(known, row)
            families[held.device].append(held)


def _newer(row: CredentialRow, than: CredentialRow | None) -> bool:
    return than is None or than.id < row.id


def _unknown(wanted: set[K], known: Mapping[K, object]) -> set[K]:
    # `wanted - known.keys()` would walk through all that is known.
    return {key for key in wanted if key not in known}


def _numbers(known: Known, folded: Iterable[str]) -> set[int]:
    return {row.id for row in map(known.devices.get, folded) if row is not None}
