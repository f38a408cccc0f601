"""What operators can do, each as one function; the command line and the API call it.

Each returns the document that `--json` prints (DESIGN, Commands).
"""

from __future__ import annotations

import asyncio
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING

from provisioning.enrol.tokens import TokenWish, create_enrolment_token
from provisioning.model.credentials import CredentialKind, DeviceState, RevocationReason
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.model.refusals import ARGUMENT_MALFORMED, DEVICE_UNKNOWN
from provisioning.psk.derive import derive

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.operators.desk import Desk
    from provisioning.model.credentials import Credential
    from provisioning.registry.records import DeviceView, TokenRow

Document = dict[str, object]

APPLIED_WITHIN_S = 1.0
"""How long `devices revoke` and its like wait for the gateways (DESIGN, Commands)."""

BEAT = timedelta(seconds=5)
"""Longer than two beats of a gateway are apart."""

ROTATE_WITHIN = timedelta(hours=24)
"""By when a device is asked to have rotated."""

MAX_PAGE = 1_000


# Tokens
async def create_token(
    desk: Desk,
    *,
    device: str | None,
    uses: int,
    ttl: timedelta,
    profile: str | None,
) -> Document:
    """Make an enrolment token; its secret is in this document and nowhere else."""
    wish = TokenWish(
        None if device is None else DeviceId.parse(device), uses, ttl, profile
    )
    secret, row = await create_enrolment_token(
        desk.registry,
        desk.config.enrolment,
        wish,
        now=desk.now,
        actor=desk.actor,
        random_bytes=secrets.token_bytes,
    )
    return {"token": secret.text, **_token(row)}


async def list_tokens(desk: Desk) -> Document:
    """Every enrolment token, without secrets."""
    return {"tokens": [_token(row) for row in await desk.registry.list_tokens()]}


async def revoke_token(desk: Desk, token_id: str) -> Document:
    """End a token; devices that it admitted are not touched."""
    await desk.registry.revoke_token(token_id, desk.now, desk.actor)
    return {"id": token_id, "revoked": True}


def _token(row: TokenRow) -> Document:
    return {
        "id": row.id,
        "device": None if row.device is None else row.device.text,
        "uses": row.uses,
        "used": row.used,
        "expires": stamp(row.expires),
        "profile": row.profile,
        "revoked": row.revoked_at is not None,
    }


# Pre-shared keys
async def create_psk(desk: Desk, device: str) -> Document:
    """Register a device for PSK; its key is in this document and nowhere else."""
    name = DeviceId.parse(device)
    token = await desk.token()
    generation = await desk.registry.create_psk(name, desk.now, desk.actor)
    identity = PskIdentity(name, generation)
    key = await derive(token, identity)
    return {"identity": str(identity), "key": key.hex}


# Devices
async def list_devices(
    desk: Desk,
    *,
    cursor: str | None,
    limit: int,
    state: str | None,
    prefix: str | None,
) -> Document:
    """A page of devices in the order of their IDs."""
    if not 0 < limit <= MAX_PAGE:
        raise PeerError(ARGUMENT_MALFORMED, f"A page has 1 to {MAX_PAGE} devices.")
    page = await desk.registry.list_devices(
        cursor=cursor, limit=limit, state=_state(state), prefix=prefix
    )
    return {
        "devices": [
            {
                "id": view.id.text,
                "state": view.state.value,
                "credentials": len(view.credentials),
                "not_after": _latest_end(view, desk.now),
                "rotate": view.rotate_by is not None,
                "last_seen": None
                if view.last_seen is None
                else stamp(view.last_seen.at),
            }
            for view in page.devices
        ],
        "next": page.next,
    }


async def show_device(desk: Desk, device: str) -> Document:
    """One device with its credentials."""
    view = await _view(desk, device)
    seen = view.last_seen
    return {
        "id": view.id.text,
        "state": view.state.value,
        "rotate_by": stamp(view.rotate_by),
        "credentials": [_credential(one) for one in view.credentials],
        "last_seen": None
        if seen is None
        else {
            "at": stamp(seen.at),
            "auth": seen.auth.value,
            "resumed": seen.resumed,
            "address": seen.address,
        },
    }


async def revoke_device(
    desk: Desk, device: str, *, serial: str | None, reason: str
) -> Document:
    """Revoke a device, or one credential of it, and wait until it bites."""
    name = DeviceId.parse(device)
    why = _reason(reason)
    if serial is None:
        done = await desk.registry.revoke_device(name, why, desk.now, desk.actor)
    else:
        done = await desk.registry.revoke_credential(
            name, Serial.parse(serial), why, desk.now, desk.actor
        )
    return {
        "device": name.text,
        "revoked": [
            *(one.hex for one in done.serials),
            *(str(one) for one in done.identities),
        ],
        "not_applied": await _applied(desk, done.seq),
    }


async def suspend_device(desk: Desk, device: str) -> Document:
    """Keep a device out until it is resumed."""
    seq = await desk.registry.suspend(DeviceId.parse(device), desk.now, desk.actor)
    return await _changed(desk, device, seq)


async def resume_device(desk: Desk, device: str) -> Document:
    """Let a suspended device in again."""
    seq = await desk.registry.resume(DeviceId.parse(device), desk.now, desk.actor)
    return await _changed(desk, device, seq)


async def readmit_device(desk: Desk, device: str) -> Document:
    """Let a revoked device enrol anew; its old credentials stay revoked."""
    seq = await desk.registry.readmit(DeviceId.parse(device), desk.now, desk.actor)
    return await _changed(desk, device, seq)


async def rotate_device(desk: Desk, device: str, *, within: timedelta) -> Document:
    """Ask a device to rotate its credential."""
    name = DeviceId.parse(device)
    by = desk.now + within
    seq = await desk.registry.ask_rotate(name, by, desk.now, desk.actor)
    return {**await _changed(desk, device, seq), "by": stamp(by)}


async def _changed(desk: Desk, device: str, seq: int) -> Document:
    missing = await _applied(desk, seq)
    view = await _view(desk, device)
    return {"device": device, "state": view.state.value, "not_applied": missing}


async def _view(desk: Desk, device: str) -> DeviceView:
    view = await desk.registry.device(DeviceId.parse(device))
    if view is None:
        raise PeerError(DEVICE_UNKNOWN, f"No device {device} is registered here.")
    return view


async def _applied(desk: Desk, seq: int) -> list[str]:
    """Wait until every live gateway has applied a change; those that have not."""
    loop = asyncio.get_running_loop()
    end = loop.time() + APPLIED_WITHIN_S
    while True:
        # One that lost the registry serves on for that long, and cannot beat.
        alive_within = desk.config.outages.registry_grace + BEAT
        behind = await desk.registry.behind(seq, desk.now, alive_within)
        if not behind or loop.time() >= end:
            return behind
        await asyncio.sleep(0.02)


def _state(text: str | None) -> DeviceState | None:
    try:
        return None if text is None else DeviceState(text)
    except ValueError:
        known = ", ".join(state.value for state in DeviceState)
        raise PeerError(
            ARGUMENT_MALFORMED, f"A state is one of {known}; not {text!r}."
        ) from None


def _reason(text: str) -> RevocationReason:
    try:
        return RevocationReason(text)
    except ValueError:
        known = ", ".join(reason.value for reason in RevocationReason)
        raise PeerError(
            ARGUMENT_MALFORMED, f"A reason is one of {known}; not {text!r}."
        ) from None


def _credential(one: Credential) -> Document:
    return {
        "kind": one.kind.value,
        "profile": one.line if one.kind is CredentialKind.CERTIFICATE else None,
        "serial": None if one.serial is None else one.serial.hex,
        "generation": one.generation,
        "state": one.state.value,
        "not_before": stamp(one.not_before),
        "not_after": stamp(one.not_after),
        "first_seen": stamp(one.first_seen),
    }


def _latest_end(view: DeviceView, now: datetime) -> str | None:
    ends = [c.not_after for c in view.credentials if c.not_after and c.not_after > now]
    return stamp(max(ends)) if ends else None


def stamp(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC, whole seconds; None stays None."""
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
