"""What a group changed, written in few statements: one list of rows for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, insert, update

from provisioning.registry.schema import (
    audit,
    changes,
    counters,
    credentials,
    devices,
    intents,
    tokens,
)
from provisioning.registry.sql import write

if TYPE_CHECKING:
    from sqlalchemy.sql.dml import UpdateBase

    from provisioning.registry.engine import Statements
    from provisioning.registry.page import Page, Parameters, Work
    from provisioning.registry.rows import (
        CredentialRow,
        DeviceRow,
        IntentRow,
        TokenState,
    )

_NEW_DEVICES = insert(devices)
_DEVICES = (
    update(devices)
    .where(devices.c.id == bindparam("key"))
    .values(state=bindparam("new_state"), rotate_by=bindparam("new_rotate_by"))
)
_NEW_CREDENTIALS = insert(credentials)
_CREDENTIALS = (
    update(credentials)
    .where(credentials.c.id == bindparam("key"))
    .values(
        state=bindparam("new_state"),
        first_seen=bindparam("new_first_seen"),
        connections=bindparam("new_connections"),
        ends_at=bindparam("new_ends_at"),
        revoked_at=bindparam("new_revoked_at"),
        reason=bindparam("new_reason"),
    )
)
_NEW_INTENTS = insert(intents)
_INTENTS = (
    update(intents)
    .where(intents.c.id == bindparam("key"))
    .values(
        resolved=bindparam("new_resolved"),
        resolved_at=bindparam("new_resolved_at"),
        why=bindparam("new_why"),
        # What was asked is of no use any more.
        csr=bindparam("new_csr"),
    )
)
_NEW_TOKENS = insert(tokens)
_TOKENS = (
    update(tokens)
    .where(tokens.c.id == bindparam("key"))
    .values(used=bindparam("new_used"), revoked_at=bindparam("new_revoked_at"))
)
_CHANGES = insert(changes)
_AUDIT = insert(audit)
_COUNTERS = (
    update(counters)
    .where(counters.c.name == bindparam("key"))
    .values(value=bindparam("new_value"))
)
_NEW_COUNTERS = insert(counters)


def flush(statements: Statements, page: Page) -> None:
    """Write the page's work; rows that others refer to come first."""
    work = page.work
    if work.nothing():
        return
    page.next_number("group")
    for statement, rows in (
        (_NEW_DEVICES, [_new_device(row) for row in work.new_devices.values()]),
        (_DEVICES, [_device(row) for row in work.devices.values()]),
        (_NEW_TOKENS, [_new_token(row) for row in work.new_tokens.values()]),
        (_TOKENS, [_token(row) for row in work.tokens.values()]),
        (_NEW_INTENTS, [_new_intent(row) for row in work.new_intents.values()]),
        (_INTENTS, [_intent(row) for row in work.intents.values()]),
        (
            _NEW_CREDENTIALS,
            [_new_credential(row) for row in work.new_credentials.values()],
        ),
        (_CREDENTIALS, [_credential(row) for row in work.credentials.values()]),
        (_CHANGES, work.changes),
        (_AUDIT, work.audit),
        *work.others.items(),
        *_counters(page, work),
    ):
        write(statements, statement, rows)


def _counters(
    page: Page, work: Work
) -> tuple[tuple[UpdateBase, list[Parameters]], ...]:
    old: list[Parameters] = []
    new: list[Parameters] = []
    for name in sorted(work.counters):
        value = page.counters[name]
        if name in page.stored_counters:
            old.append({"key": name, "new_value": value})
        else:
            new.append({"name": name, "value": value})
    return (_NEW_COUNTERS, new), (_COUNTERS, old)


def _new_device(row: DeviceRow) -> Parameters:
    return {
        "id": row.id,
        "device_id": row.device.text,
        "folded": row.device.folded,
        "state": row.state.value,
        "rotate_by": row.rotate_by,
        "created_at": row.created_at,
    }


def _device(row: DeviceRow) -> Parameters:
    return {
        "key": row.id,
        "new_state": row.state.value,
        "new_rotate_by": row.rotate_by,
    }


def _new_credential(row: CredentialRow) -> Parameters:
    return {
        "id": row.id,
        "device": row.device,
        "kind": row.kind.value,
        "line": row.line,
        "state": row.state.value,
        "serial": None if row.serial is None else row.serial.hex,
        "generation": row.generation,
        "issuer": row.issuer,
        "not_before": row.not_before,
        "not_after": row.not_after,
        "spki_sha256": row.spki_sha256,
        "request_key": row.request_key,
        "certificate": row.certificate,
        "first_seen": row.first_seen,
        "connections": row.connections,
        "ends_at": row.ends_at,
        "revoked_at": row.revoked_at,
        "reason": None if row.reason is None else row.reason.value,
        "created_at": row.created_at,
    }


def _credential(row: CredentialRow) -> Parameters:
    return {
        "key": row.id,
        "new_state": row.state.value,
        "new_first_seen": row.first_seen,
        "new_connections": row.connections,
        "new_ends_at": row.ends_at,
        "new_revoked_at": row.revoked_at,
        "new_reason": None if row.reason is None else row.reason.value,
    }


def _new_intent(row: IntentRow) -> Parameters:
    return {
        "id": row.id,
        "request_key": row.request_key,
        "device": row.device,
        "line": row.line,
        "profile": row.profile,
        "issuer": row.issuer,
        "serial": row.serial.hex,
        "not_before": row.not_before,
        "not_after": row.not_after,
        "spki_sha256": row.spki_sha256,
        "csr": row.csr,
        "token": row.token,
        "auth": row.auth,
        "created_at": row.created_at,
        "resolved": row.resolved,
        "resolved_at": row.resolved_at,
        "why": row.why,
    }


def _intent(row: IntentRow) -> Parameters:
    return {
        "key": row.id,
        "new_resolved": row.resolved,
        "new_resolved_at": row.resolved_at,
        "new_why": row.why,
        "new_csr": row.csr,
    }


def _new_token(row: TokenState) -> Parameters:
    return {
        "id": row.id,
        "hash": row.hash,
        "device": row.device,
        "uses": row.uses,
        "used": row.used,
        "expires_at": row.expires_at,
        "profile": row.profile,
        "revoked_at": row.revoked_at,
        "created_at": row.created_at,
    }


def _token(row: TokenState) -> Parameters:
    return {
        "key": row.id,
        "new_used": row.used,
        "new_revoked_at": row.revoked_at,
    }
