"""Operations that operators order: tokens, revocation, rotation, suspension. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, update

from provisioning.model import events
from provisioning.model.credentials import (
    CredentialState,
    DeviceState,
    move_credential,
    move_device,
)
from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    ARGUMENT_MALFORMED,
    CREDENTIAL_UNKNOWN,
    STATE_NOT_ALLOWED,
    TOKEN_UNKNOWN,
)
from provisioning.registry.enrolments import void
from provisioning.registry.proofs import refuse_gone, registered
from provisioning.registry.records import Revoked
from provisioning.registry.rows import CredentialRow, TokenState, identity
from provisioning.registry.schema import to_us, tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from provisioning.model.credentials import RevocationReason
    from provisioning.model.ids import DeviceId, Serial
    from provisioning.registry.page import Page, Wants
    from provisioning.registry.records import TokenRow
    from provisioning.registry.rows import DeviceRow

_REVOKE_TOKENS = (
    update(tokens)
    .where(tokens.c.device == bindparam("key"), tokens.c.revoked_at.is_(None))
    .values(revoked_at=bindparam("at"))
)


@dataclass(frozen=True, slots=True)
class CreateToken:
    """An enrolment token; one for a named device registers that device."""

    token_hash: bytes
    device: DeviceId | None
    uses: int
    expires: datetime
    profile: str | None
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        wants.token_hashes.add(self.token_hash)
        if self.device is not None:
            wants.devices.add(self.device.folded)

    def apply(self, page: Page) -> TokenRow:
        if self.uses < 1 or self.expires <= self.now:
            raise PeerError(
                ARGUMENT_MALFORMED, "A token has one use or more, and time to use it."
            )
        row = None
        if self.device is not None and page.device(self.device) is not None:
            row = registered(page, self.device)
            refuse_gone(row)
        earlier = page.known.tokens[self.token_hash]
        if earlier is not None:
            # The same call again: its answer was lost.
            return earlier.seen_as(self.device)
        at = page.saw(self.now)
        if row is None and self.device is not None:
            row = page.register(self.device, at)
        token = TokenState(
            id=f"t{page.next_number('token')}",
            hash=self.token_hash,
            device=None if row is None else row.id,
            uses=self.uses,
            used=0,
            expires_at=to_us(self.expires),
            profile=self.profile,
            revoked_at=None,
            created_at=at,
        )
        page.add_token(token)
        page.record(
            events.ENROLMENT_TOKEN_CREATED,
            {
                "token_id": token.id,
                "device": None if self.device is None else self.device.text,
                "uses": self.uses,
                "expires": self.expires.isoformat(),
            },
            at,
            self.actor,
        )
        return token.seen_as(self.device)


@dataclass(frozen=True, slots=True)
class RevokeToken:
    """Nobody is let in by this token any more; a second time changes nothing."""

    token_id: str
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        wants.token_ids.add(self.token_id)

    def apply(self, page: Page) -> None:
        token = page.known.token_ids[self.token_id]
        if token is None:
            raise PeerError(TOKEN_UNKNOWN)
        if token.revoked_at is not None:
            return
        token.revoked_at = page.saw(self.now)
        page.token_changed(token)
        page.record(
            events.ENROLMENT_TOKEN_REVOKED,
            {"token_id": token.id},
            token.revoked_at,
            self.actor,
        )


@dataclass(frozen=True, slots=True)
class Revoke:
    """End a device, or one of its certificates, for ever.

    A second time revokes nothing more, and gives the number of the newest change.
    """

    device: DeviceId
    serial: Serial | None
    reason: RevocationReason
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        wants.ended.add(self.device.folded)
        wants.open_intents.add(self.device.folded)
        if self.serial is not None:
            wants.serials.add(self.serial)

    def apply(self, page: Page) -> Revoked:
        device = registered(page, self.device)
        if self.serial is not None:
            return self._one(page, device, self.serial)
        already = device.state is DeviceState.REVOKED
        if not already:
            move_device(device.state, DeviceState.REVOKED)
        at = page.saw(self.now)
        revoked = list(self._credentials(page, device, at))
        if already and not revoked:
            return Revoked(device.device, (), (), page.counters.get("change", 0))
        device.state = DeviceState.REVOKED
        device.rotate_by = None
        page.device_changed(device)
        _end_open_business(page, device, at)
        return self._told(page, device, revoked, at)

    def _one(self, page: Page, device: DeviceRow, serial: Serial) -> Revoked:
        row = page.known.serials[serial]
        if row is None or row.device != device.id:
            raise PeerError(
                CREDENTIAL_UNKNOWN, "The device has no certificate of that serial."
            )
        if row.state is CredentialState.REVOKED:
            return Revoked(device.device, (), (), page.counters.get("change", 0))
        at = page.saw(self.now)
        self._revoke(page, row, at)
        return self._told(page, device, [row], at)

    def _credentials(
        self, page: Page, device: DeviceRow, at: int
    ) -> Iterable[CredentialRow]:
        for row in page.not_revoked(device):
            # A superseded one past its end is of no use to anybody. An expired one
            # is: it could be the way back.
            over = row.not_after is not None and row.not_after < at
            if row.state is CredentialState.SUPERSEDED and over:
                continue
            self._revoke(page, row, at)
            yield row

    def _revoke(self, page: Page, row: CredentialRow, at: int) -> None:
        row.state = move_credential(row.state, CredentialState.REVOKED)
        row.revoked_at, row.reason = at, self.reason
        page.credential_changed(row)

    def _told(
        self, page: Page, device: DeviceRow, rows: list[CredentialRow], at: int
    ) -> Revoked:
        serials = tuple(row.serial for row in rows if row.serial is not None)
        identities = tuple(
            identity(row, device) for row in rows if row.generation is not None
        )
        named: Mapping[str, object] = {
            "serials": [serial.hex for serial in serials],
            "identities": [str(one) for one in identities],
            "reason": self.reason.value,
        }
        for row in rows:
            page.tell(
                "credential",
                device.device,
                {
                    "id": row.id,
                    "serial": None if row.serial is None else row.serial.hex,
                    "generation": row.generation,
                    "issuer": row.issuer,
                    "state": row.state.value,
                },
                at,
            )
        if self.serial is None:
            page.tell("device", device.device, {"state": device.state.value}, at)
        page.record(
            events.REVOKED, {"device": device.device.text, **named}, at, self.actor
        )
        return Revoked(device.device, serials, identities, page.counters["change"])


@dataclass(frozen=True, slots=True)
class MoveDevice:
    """Suspend, resume or readmit: from one state to another, and nothing else.

    A device that is there already stays; gives the number of the newest change.
    """

    device: DeviceId
    source: DeviceState
    target: DeviceState
    event: str
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        wants.devices.add(self.device.folded)

    def apply(self, page: Page) -> int:
        device = registered(page, self.device)
        if device.state is self.target:
            return page.counters.get("change", 0)
        if device.state is not self.source:
            raise PeerError(
                STATE_NOT_ALLOWED,
                f"The device is {device.state}, not {self.source}.",
            )
        at = page.saw(self.now)
        device.state = move_device(device.state, self.target)
        page.device_changed(device)
        page.record(self.event, {"device": device.device.text}, at, self.actor)
        return page.tell("device", device.device, {"state": device.state.value}, at)


@dataclass(frozen=True, slots=True)
class AskRotate:
    """Ask a device for a new credential. by: until when; gives the change's number."""

    device: DeviceId
    by: datetime
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        wants.devices.add(self.device.folded)

    def apply(self, page: Page) -> int:
        device = registered(page, self.device)
        refuse_gone(device)
        at = page.saw(self.now)
        device.rotate_by = to_us(self.by)
        page.device_changed(device)
        by = self.by.isoformat()
        page.record(
            events.ROTATE_ASKED,
            {"device": device.device.text, "by": by},
            at,
            self.actor,
        )
        return page.tell("rotate", device.device, {"by": by}, at)


@dataclass(frozen=True, slots=True)
class AddAudit:
    """An audit event of somebody else's making."""

    event: str
    fields: Mapping[str, object]
    now: datetime
    actor: str

    def want(self, wants: Wants) -> None:
        del wants

    def apply(self, page: Page) -> None:
        page.record(self.event, self.fields, page.saw(self.now), self.actor)


@dataclass(frozen=True, slots=True)
class NextCrlNumber:
    """A number that no earlier CRL of this issuer has (RFC 5280, 5.2.3)."""

    issuer: str

    def want(self, wants: Wants) -> None:
        del wants

    def apply(self, page: Page) -> int:
        return page.next_number(f"crl {self.issuer}")


def _end_open_business(page: Page, device: DeviceRow, at: int) -> None:
    """What a revoked device was about to get, and what would let it in again."""
    for intent in list(page.known.intents.values()):
        if (
            intent is not None
            and intent.device == device.id
            and intent.resolved is None
        ):
            void(page, intent, "device revoked", at)
    page.also(_REVOKE_TOKENS, {"key": device.id, "at": at})
    for token in page.known.token_ids.values():
        if token is not None and token.device == device.id and token.revoked_at is None:
            token.revoked_at = at
            page.token_changed(token)
