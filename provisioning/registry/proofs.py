"""Operations of a credential's life: proven, succeeded, at its end. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, update

from provisioning.model import events
from provisioning.model.credentials import (
    CredentialKind,
    CredentialState,
    DeviceState,
    move_credential,
    move_device,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import Serial
from provisioning.model.refusals import (
    CREDENTIAL_UNKNOWN,
    DEVICE_ID_CASE,
    DEVICE_UNKNOWN,
    STATE_NOT_ALLOWED,
)
from provisioning.registry.enrolments import GONE, supersede
from provisioning.registry.rows import CredentialRow, standing
from provisioning.registry.schema import devices, to_us

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

    from provisioning.model.credentials import Standing
    from provisioning.model.ids import DeviceId
    from provisioning.registry.page import Page, Wants
    from provisioning.registry.records import LastSeen
    from provisioning.registry.rows import DeviceRow

PSK_LINE = "psk"
"""The line that all pre-shared keys of a device stand in."""

_SEEN = (
    update(devices)
    .where(devices.c.id == bindparam("key"))
    .values(
        seen_at=bindparam("at"),
        seen_auth=bindparam("auth"),
        seen_resumed=bindparam("resumed"),
        seen_address=bindparam("address"),
    )
)

_MAY_CONNECT = frozenset({DeviceState.REGISTERED, DeviceState.ENROLLED})


@dataclass(frozen=True, slots=True)
class Connect:
    """A credential was proven on a connection.

    Its first makes it active and gives older ones of its line their grace; its second
    ends them. One that may not connect stays as it is: the caller looks at the answer.
    """

    credential_id: int
    now: datetime
    grace: timedelta

    def want(self, wants: Wants) -> None:
        wants.live_beside.add(self.credential_id)

    def apply(self, page: Page) -> tuple[Standing, int]:
        row = page.known.credentials[self.credential_id]
        if row is None:
            raise PeerError(CREDENTIAL_UNKNOWN)
        device = page.device_of(row)
        at = page.saw(self.now)
        end(page, row, device, at)
        if (
            row.state in {CredentialState.PENDING, CredentialState.ACTIVE}
            and device.state in _MAY_CONNECT
        ):
            if row.connections == 0:
                self._first(page, row, device, at)
            elif row.connections == 1:
                row.connections = 2
                page.credential_changed(row)
                for older in _older(page, row, device):
                    if older.state is CredentialState.ACTIVE:
                        supersede(page, older, device, "second connection", at)
        page.work.learnt[row.id] = row
        return standing(row, device), device.id

    def _first(
        self, page: Page, row: CredentialRow, device: DeviceRow, at: int
    ) -> None:
        row.connections = 1
        row.first_seen = at
        row.state = move_credential(row.state, CredentialState.ACTIVE)
        page.credential_changed(row)
        until = to_us(self.now + self.grace)
        olders = _older(page, row, device)
        for older in olders:
            if older.state is CredentialState.ACTIVE and (
                older.ends_at is None or older.ends_at > until
            ):
                older.ends_at = until
                page.credential_changed(older)
        if device.state is DeviceState.REGISTERED:
            device.state = move_device(device.state, DeviceState.ENROLLED)
            page.device_changed(device)
        if olders:
            # It takes the place of another. What a device connects with for the first
            # time, and had before it was asked, is what it was asked to replace.
            rotation_done(page, device, at)


@dataclass(frozen=True, slots=True)
class Rotated:
    """The device says that it holds and uses this credential: older ones end."""

    device: DeviceId
    named: Serial | int
    now: datetime

    def want(self, wants: Wants) -> None:
        wants.live.add(self.device.folded)
        if isinstance(self.named, Serial):
            wants.serials.add(self.named)

    def apply(self, page: Page) -> None:
        device = registered(page, self.device)
        row = self._row(page, device)
        if row is None:
            raise PeerError(CREDENTIAL_UNKNOWN)
        if row.state is not CredentialState.ACTIVE:
            raise PeerError(
                STATE_NOT_ALLOWED,
                f"A {row.state} credential cannot take another's place; "
                "connect with it first.",
            )
        at = page.saw(self.now)
        for older in _older(page, row, device):
            supersede(page, older, device, "rotated", at)
        rotation_done(page, device, at)

    def _row(self, page: Page, device: DeviceRow) -> CredentialRow | None:
        if isinstance(self.named, Serial):
            row = page.known.serials[self.named]
            return row if row is not None and row.device == device.id else None
        for row in page.live(device):
            if row.generation == self.named:
                return row
        return None


@dataclass(frozen=True, slots=True)
class EndIfDue:
    """What time alone does: grace over, or past notAfter. Gives whether it was due."""

    credential_id: int
    now: datetime

    def want(self, wants: Wants) -> None:
        wants.credentials.add(self.credential_id)

    def apply(self, page: Page) -> bool:
        row = page.known.credentials[self.credential_id]
        if row is None:
            return False
        return end(page, row, page.device_of(row), page.saw(self.now))


@dataclass(frozen=True, slots=True)
class NextPsk:
    """The generation that a device is to be given: the unproven one, or a new one.

    by: how the device proved itself, or "operator"; then it is registered if needed.
    """

    device: DeviceId
    by: str
    actor: str
    now: datetime

    def want(self, wants: Wants) -> None:
        wants.live.add(self.device.folded)
        wants.generations.add(self.device.folded)

    def apply(self, page: Page) -> int:
        known = page.device(self.device)
        if known is None and self.by == "operator":
            device = page.register(self.device, page.saw(self.now))
        else:
            device = registered(page, self.device)
        refuse_gone(device)
        for row in page.live(device):
            if (
                row.kind is CredentialKind.PSK
                and row.state is CredentialState.PENDING
                and row.generation is not None
            ):
                return row.generation
        at = page.saw(self.now)
        generation = page.known.generations[device.id] + 1
        page.add_credential(_psk_row(page, device, generation, at))
        page.record(
            events.PSK_ISSUED,
            {"device": device.device.text, "generation": generation, "auth": self.by},
            at,
            self.actor,
        )
        return generation


@dataclass(frozen=True, slots=True)
class Seen:
    """When devices were last seen, by their rows' numbers; gathered over a second."""

    seen: Mapping[int, LastSeen]

    def want(self, wants: Wants) -> None:
        del wants  # written blindly: whoever was seen is registered

    def apply(self, page: Page) -> None:
        for number, last in self.seen.items():
            page.also(
                _SEEN,
                {
                    "key": number,
                    "at": page.saw(last.at),
                    "auth": str(last.auth),
                    "resumed": last.resumed,
                    "address": last.address[:64],
                },
            )


def registered(page: Page, device: DeviceId) -> DeviceRow:
    """The device's row; raises PeerError(device_unknown | device_id_case)."""
    row = page.device(device)
    if row is None:
        raise PeerError(DEVICE_UNKNOWN)
    if row.device != device:
        raise PeerError(DEVICE_ID_CASE)
    return row


def refuse_gone(device: DeviceRow) -> None:
    """Raise PeerError(device_revoked | device_retired): nothing new for those."""
    if device.state in GONE:
        raise PeerError(GONE[device.state])


def rotation_done(page: Page, device: DeviceRow, at: int) -> None:
    """Nobody need ask this device to rotate any more."""
    if device.rotate_by is not None:
        device.rotate_by = None
        page.device_changed(device)
        page.tell("rotate", device.device, {"by": None}, at)


def end(page: Page, row: CredentialRow, device: DeviceRow, at: int) -> bool:
    """Put a credential into the state that time has put it in, if it has."""
    ended = row.ended(at)
    if ended is CredentialState.SUPERSEDED:
        supersede(page, row, device, "grace", at)
    elif ended is CredentialState.EXPIRED:
        row.state = move_credential(row.state, CredentialState.EXPIRED)
        page.credential_changed(row)
        page.tell(
            "credential",
            device.device,
            {
                "id": row.id,
                "serial": None if row.serial is None else row.serial.hex,
                "generation": row.generation,
                "state": row.state,
            },
            at,
        )
    return ended is not None


def _older(page: Page, row: CredentialRow, device: DeviceRow) -> list[CredentialRow]:
    return [
        other
        for other in page.live(device)
        if other.line == row.line and other.id < row.id
    ]


def _psk_row(page: Page, device: DeviceRow, generation: int, at: int) -> CredentialRow:
    return CredentialRow(
        id=page.next_number("row"),
        device=device.id,
        kind=CredentialKind.PSK,
        line=PSK_LINE,
        state=CredentialState.PENDING,
        serial=None,
        generation=generation,
        issuer=None,
        not_before=at,
        not_after=None,
        spki_sha256=None,
        request_key=None,
        first_seen=None,
        connections=0,
        ends_at=None,
        revoked_at=None,
        reason=None,
        created_at=at,
    )
