"""Devices, credentials, how a peer proved itself, and the legal moves of states."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from provisioning.model.errors import PeerError
from provisioning.model.refusals import STATE_NOT_ALLOWED

if TYPE_CHECKING:
    from datetime import datetime

    from provisioning.model.ids import DeviceId, PskIdentity, Serial


class DeviceState(StrEnum):
    """Where a device is in its life."""

    REGISTERED = "registered"
    ENROLLED = "enrolled"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    RETIRED = "retired"


class CredentialState(StrEnum):
    """Where a credential is in its life; `pending` until proven on a connection."""

    PENDING = "pending"
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    REVOKED = "revoked"
    EXPIRED = "expired"


class CredentialKind(StrEnum):
    """What a device holds."""

    CERTIFICATE = "certificate"
    PSK = "psk"


class AuthMethod(StrEnum):
    """How a peer proved itself on this connection or request."""

    CERTIFICATE = "certificate"
    PSK = "psk"
    TOKEN = "token"  # noqa: S105 - the word, not a token


class RevocationReason(StrEnum):
    """CRLReason as operators write it (RFC 5280, 5.3.1)."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "keyCompromise"
    AFFILIATION_CHANGED = "affiliationChanged"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessationOfOperation"
    CERTIFICATE_HOLD = "certificateHold"
    PRIVILEGE_WITHDRAWN = "privilegeWithdrawn"


DEVICE_MOVES: dict[DeviceState, frozenset[DeviceState]] = {
    DeviceState.REGISTERED: frozenset(
        {DeviceState.ENROLLED, DeviceState.REVOKED, DeviceState.RETIRED}
    ),
    DeviceState.ENROLLED: frozenset(
        {DeviceState.SUSPENDED, DeviceState.REVOKED, DeviceState.RETIRED}
    ),
    DeviceState.SUSPENDED: frozenset(
        {DeviceState.ENROLLED, DeviceState.REVOKED, DeviceState.RETIRED}
    ),
    # Back only by `devices readmit`.
    DeviceState.REVOKED: frozenset({DeviceState.REGISTERED, DeviceState.RETIRED}),
    DeviceState.RETIRED: frozenset(),
}

CREDENTIAL_MOVES: dict[CredentialState, frozenset[CredentialState]] = {
    CredentialState.PENDING: frozenset(
        {
            CredentialState.ACTIVE,
            CredentialState.SUPERSEDED,
            CredentialState.REVOKED,
            CredentialState.EXPIRED,
        }
    ),
    CredentialState.ACTIVE: frozenset(
        {
            CredentialState.SUPERSEDED,
            CredentialState.REVOKED,
            CredentialState.EXPIRED,
        }
    ),
    # A stolen old key is revoked although a newer one took its place.
    CredentialState.SUPERSEDED: frozenset({CredentialState.REVOKED}),
    CredentialState.REVOKED: frozenset(),
    CredentialState.EXPIRED: frozenset({CredentialState.REVOKED}),
}


def move_device(now: DeviceState, to: DeviceState) -> DeviceState:
    """Raise PeerError(state_not_allowed) for a move that the design does not have."""
    if to not in DEVICE_MOVES[now]:
        raise PeerError(STATE_NOT_ALLOWED, f"A {now} device cannot become {to}.")
    return to


def move_credential(now: CredentialState, to: CredentialState) -> CredentialState:
    """Raise PeerError(state_not_allowed) for a move that the design does not have."""
    if to not in CREDENTIAL_MOVES[now]:
        raise PeerError(STATE_NOT_ALLOWED, f"A {now} credential cannot become {to}.")
    return to


@dataclass(frozen=True, slots=True)
class CertificateProof:
    """TLS showed possession of this certificate's key; the chain was verified.

    der: the leaf. Whether it is expired, revoked or known is not judged by TLS.
    """

    der: bytes


@dataclass(frozen=True, slots=True)
class PskProof:
    """TLS showed possession of the key of this identity."""

    identity: PskIdentity


Proof = CertificateProof | PskProof


@dataclass(frozen=True, slots=True)
class Credential:
    """One credential as the registry knows it.

    id: the registry's row. serial for certificates, generation for PSKs.
    not_after: None where there is no end. first_seen: its first connection.
    line: what it succeeds and is succeeded in; the profile's name, or "psk".
    """

    id: int
    device: DeviceId
    kind: CredentialKind
    line: str
    state: CredentialState
    serial: Serial | None
    generation: int | None
    not_before: datetime
    not_after: datetime | None
    first_seen: datetime | None


@dataclass(frozen=True, slots=True)
class Standing:
    """A credential beside its device's state: what admission looks at.

    rotate_by: until when an operator asked the device to rotate, None if nobody did.
    """

    credential: Credential
    device_state: DeviceState
    rotate_by: datetime | None
