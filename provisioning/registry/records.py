"""What the registry is asked and what it answers: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from provisioning.model.credentials import (
        AuthMethod,
        Credential,
        DeviceState,
        RevocationReason,
        Standing,
    )
    from provisioning.model.ids import DeviceId, PskIdentity, Serial


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a certificate, as far as the registry can look things up by it.

    request_key: what makes two requests the same (operation, proof and CSR), hashed.
    token_hash, credential_id: the proof, one of them. device: None where only the
    credential says who it is. line: what the new certificate would succeed in.
    """

    request_key: bytes
    device: DeviceId | None
    token_hash: bytes | None
    credential_id: int | None
    spki_sha256: bytes
    line: str
    now: datetime


@dataclass(frozen=True, slots=True)
class TokenRow:
    """An enrolment token without its secret. device: None lets any new device in."""

    id: str
    device: DeviceId | None
    uses: int
    used: int
    expires: datetime
    profile: str | None
    revoked_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the same request led to before.

    resolved: False while its certificate is being made; then there is no credential.
    """

    intent_id: int
    resolved: bool
    certificate_der: bytes | None
    credential: Credential | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Facts:
    """What the registry knows about an ask, read and decided upon in one transaction.

    case_twin: a registered ID that differs from the asked one only in case.
    spki_owner: another device that has, had or is being given this key.
    """

    token: TokenRow | None
    standing: Standing | None
    device_state: DeviceState | None
    case_twin: str | None
    spki_owner: DeviceId | None
    earlier: Earlier | None


@dataclass(slots=True)
class NewIntent:
    """A certificate that is about to be signed; recorded before the HSM is asked.

    id: written by `admit`; the certificate's credential will have the same.
    not_after: None, or 9999-12-31T23:59:59Z, where there is no end.
    """

    request_key: bytes
    device: DeviceId
    line: str
    profile: str
    issuer: str
    serial: Serial
    not_before: datetime
    not_after: datetime | None
    spki_sha256: bytes
    csr_der: bytes = field(repr=False)
    token_id: str | None
    auth: AuthMethod
    created_at: datetime
    id: int = 0


@dataclass(frozen=True, slots=True)
class Repeat:
    """The same request was answered before: give the same answer again."""

    credential: Credential
    certificate_der: bytes


Decision = NewIntent | Repeat


@dataclass(frozen=True, slots=True)
class OpenIntent:
    """An intent whose outcome nobody wrote down yet."""

    id: int
    device: DeviceId
    serial: Serial
    issuer: str
    line: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation ended, and the change's number that gateways must reach."""

    device: DeviceId
    serials: tuple[Serial, ...]
    identities: tuple[PskIdentity, ...]
    seq: int


@dataclass(frozen=True, slots=True)
class CertStatus:
    """A certificate as revocation answers need it. id: the cursor of listings."""

    id: int
    serial: Serial
    not_after: datetime | None
    revoked_at: datetime | None
    reason: RevocationReason | None


@dataclass(frozen=True, slots=True)
class LastSeen:
    """The newest connection of a device, exact to about a second."""

    at: datetime
    auth: AuthMethod
    resumed: bool
    address: str


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device as operators see it; credentials from the oldest to the newest."""

    id: DeviceId
    state: DeviceState
    rotate_by: datetime | None
    created_at: datetime
    credentials: tuple[Credential, ...]
    last_seen: LastSeen | None


@dataclass(frozen=True, slots=True)
class DevicePage:
    """Some devices in the order of their IDs. next: the cursor, None at the end."""

    devices: tuple[DeviceView, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """Who did what, when."""

    id: int
    at: datetime
    event: str
    actor: str
    fields: dict[str, object]
