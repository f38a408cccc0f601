"""Rows as a transaction holds and changes them, and what they are outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provisioning.model.credentials import (
    Credential,
    CredentialKind,
    CredentialState,
    Standing,
)
from provisioning.model.ids import PskIdentity
from provisioning.registry.records import Earlier, TokenRow
from provisioning.registry.schema import from_us, maybe_from_us

if TYPE_CHECKING:
    from provisioning.model.credentials import DeviceState, RevocationReason
    from provisioning.model.ids import DeviceId, Serial

LIVE = frozenset({CredentialState.PENDING, CredentialState.ACTIVE})
"""States in which a credential admits its device."""


@dataclass(slots=True)
class DeviceRow:
    """A device, but for when it was last seen, which is written past this."""

    id: int
    device: DeviceId
    state: DeviceState
    rotate_by: int | None
    created_at: int


@dataclass(slots=True)
class CredentialRow:
    """A credential. device: the row's number. certificate: None until asked for."""

    id: int
    device: int
    kind: CredentialKind
    line: str
    state: CredentialState
    serial: Serial | None
    generation: int | None
    issuer: str | None
    not_before: int
    not_after: int | None
    spki_sha256: bytes | None
    request_key: bytes | None
    first_seen: int | None
    connections: int
    ends_at: int | None
    revoked_at: int | None
    reason: RevocationReason | None
    created_at: int
    certificate: bytes | None = field(default=None, repr=False)
    # The last answer of `seen_as`, until the row changes.
    seen: Credential | None = field(default=None, repr=False, compare=False)

    def seen_as(self, device: DeviceId) -> Credential:
        """The credential as the rest of the house knows it."""
        if self.seen is None:
            self.seen = self._seen_as(device)
        return self.seen

    def _seen_as(self, device: DeviceId) -> Credential:
        return Credential(
            id=self.id,
            device=device,
            kind=self.kind,
            line=self.line,
            state=self.state,
            serial=self.serial,
            generation=self.generation,
            not_before=from_us(self.not_before),
            not_after=maybe_from_us(self.not_after),
            first_seen=maybe_from_us(self.first_seen),
        )

    def ended(self, now: int) -> CredentialState | None:
        """The state that time alone has put this one in, None where it has not."""
        if self.state not in LIVE:
            return None
        if self.not_after is not None and self.not_after < now:
            return CredentialState.EXPIRED
        if self.ends_at is not None and self.ends_at <= now:
            return CredentialState.SUPERSEDED
        return None


@dataclass(slots=True)
class TokenState:
    """An enrolment token. device: the row's number."""

    id: str
    hash: bytes
    device: int | None
    uses: int
    used: int
    expires_at: int
    profile: str | None
    revoked_at: int | None
    created_at: int

    def seen_as(self, device: DeviceId | None) -> TokenRow:
        """The token as the rest of the house knows it."""
        return TokenRow(
            id=self.id,
            device=device,
            uses=self.uses,
            used=self.used,
            expires=from_us(self.expires_at),
            profile=self.profile,
            revoked_at=maybe_from_us(self.revoked_at),
            created_at=from_us(self.created_at),
        )


@dataclass(slots=True)
class IntentRow:
    """An intent. device: the row's number. resolved: None, "issued" or "void"."""

    id: int
    request_key: bytes
    device: int
    line: str
    profile: str
    issuer: str
    serial: Serial
    not_before: int
    not_after: int | None
    spki_sha256: bytes
    token: str | None
    auth: str
    created_at: int
    resolved: str | None = None
    resolved_at: int | None = None
    why: str | None = None
    csr: bytes | None = field(default=None, repr=False)

    def earlier(self) -> Earlier:
        """An open intent as the answer to "was this asked before?"."""
        return Earlier(
            intent_id=self.id,
            resolved=False,
            certificate_der=None,
            credential=None,
            at=from_us(self.created_at),
        )


def standing(row: CredentialRow, device: DeviceRow) -> Standing:
    """A credential beside its device."""
    return Standing(
        credential=row.seen_as(device.device),
        device_state=device.state,
        rotate_by=maybe_from_us(device.rotate_by),
    )


def identity(row: CredentialRow, device: DeviceRow) -> PskIdentity:
    """The name of a PSK on the wire; only for rows that have a generation."""
    return PskIdentity(device.device, row.generation or 0)
