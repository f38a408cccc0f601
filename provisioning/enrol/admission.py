"""Who may have what: the one place where a proof becomes `Admitted`.

Pure: what the registry knows comes in as facts, the clock as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from provisioning.enrol.policy import DEFAULT_PROFILE
from provisioning.model.admitted import Admitted
from provisioning.model.credentials import (
    AuthMethod,
    CredentialKind,
    CredentialState,
    DeviceState,
)
from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    CREDENTIAL_EXPIRED,
    CREDENTIAL_NOT_YET_VALID,
    CREDENTIAL_REVOKED,
    CREDENTIAL_SUPERSEDED,
    CREDENTIAL_UNKNOWN,
    DEVICE_ID_CASE,
    DEVICE_RETIRED,
    DEVICE_REVOKED,
    DEVICE_SUSPENDED,
    IN_PROGRESS,
    KEY_IN_USE,
    PROFILE_NOT_ALLOWED,
    PROFILE_UNKNOWN,
    TOKEN_REFUSED,
    Refusal,
)
from provisioning.x509.csr import check_names

if TYPE_CHECKING:
    from collections.abc import Container
    from datetime import datetime

    from provisioning.enrol.policy import EnrolmentPolicy
    from provisioning.model.credentials import Credential, Standing
    from provisioning.model.ids import DeviceId
    from provisioning.registry.records import Facts, TokenRow
    from provisioning.x509.csr import VerifiedCsr
    from provisioning.x509.profiles import Profile


@dataclass(frozen=True, slots=True)
class TokenProof:
    """Somebody holds the enrolment token of this SHA-256 and says it is this device."""

    token_hash: bytes
    device: DeviceId


@dataclass(frozen=True, slots=True)
class StandingProof:
    """TLS showed the key of this credential, certificate or PSK."""

    standing: Standing

    @property
    def device(self) -> DeviceId:
        """Whose credential it is."""
        return self.standing.credential.device


EnrolmentProof = TokenProof | StandingProof


class Operation(StrEnum):
    """What EST calls it; part of what makes two requests the same."""

    SIMPLE_ENROLL = "simpleenroll"
    SIMPLE_REENROLL = "simplereenroll"


@dataclass(frozen=True, slots=True)
class Request:
    """A device asks for a certificate. profile: the path's label, None without one."""

    operation: Operation
    csr: VerifiedCsr
    profile: str | None


@dataclass(frozen=True, slots=True)
class AskedBefore:
    """The same request was answered, and what it got is not proven yet: repeat it."""

    credential: Credential
    certificate_der: bytes


class DeadIntentError(PeerError):
    """The same request was begun and its end never recorded; nobody works on it."""

    def __init__(self, intent_id: int) -> None:
        super().__init__(IN_PROGRESS)
        self.intent_id = intent_id


_DEVICE_REFUSALS = {
    DeviceState.REVOKED: DEVICE_REVOKED,
    DeviceState.SUSPENDED: DEVICE_SUSPENDED,
    DeviceState.RETIRED: DEVICE_RETIRED,
}
_CREDENTIAL_REFUSALS = {
    CredentialState.REVOKED: CREDENTIAL_REVOKED,
    CredentialState.SUPERSEDED: CREDENTIAL_SUPERSEDED,
}
_NO_GRACE = timedelta()


def standing_refusal(
    standing: Standing | None, now: datetime, *, expired_grace: timedelta = _NO_GRACE
) -> Refusal | None:
    """Why a credential that TLS has shown may do nothing here; None if it may.

    standing: None for a credential that the registry does not know.
    expired_grace: how long after its end it still counts (for re-enrolment only).
    """
    if standing is None:
        return CREDENTIAL_UNKNOWN
    refusal = _DEVICE_REFUSALS.get(standing.device_state)
    if refusal is not None:
        return refusal
    credential = standing.credential
    refusal = _CREDENTIAL_REFUSALS.get(credential.state)
    if refusal is not None:
        return refusal
    if now < credential.not_before:
        return CREDENTIAL_NOT_YET_VALID
    if credential.not_after is None:
        return None
    # The time decides, whether or not a sweep has written the state down already.
    return None if now <= credential.not_after + expired_grace else CREDENTIAL_EXPIRED


def admit(  # noqa: PLR0913 - all that a judgement rests on, and nothing hidden
    request: Request,
    proof: EnrolmentProof,
    facts: Facts,
    policy: EnrolmentPolicy,
    now: datetime,
    *,
    abandoned: Container[int] = (),
) -> Admitted | AskedBefore:
    """Judge a request by its proof and by what the registry knows.

    abandoned: intents that nobody works on any more.
    Raises PeerError with the reason; DeadIntentError (a PeerError) when an earlier,
    dead attempt at the same request has to be voided first.
    """
    match proof:
        case TokenProof():
            _check_token(proof, facts.token)
            before = _asked_before(facts, policy, now, abandoned)
            return before or _by_token(request, proof, facts, policy, now)
        case StandingProof():
            _check_standing(request, facts.standing, policy, now)
            before = _asked_before(facts, policy, now, abandoned)
            return before or _by_credential(request, facts, policy)


def _check_token(proof: TokenProof, token: TokenRow | None) -> None:
    # Everything about the token comes first: a stranger learns nothing of devices.
    if (
        token is None
        or token.revoked_at is not None
        or (token.device is not None and token.device != proof.device)
    ):
        raise PeerError(TOKEN_REFUSED)


def _by_token(
    request: Request,
    proof: TokenProof,
    facts: Facts,
    policy: EnrolmentPolicy,
    now: datetime,
) -> Admitted:
    token = facts.token
    # Judged only now: the answer to a spent token's own request may have been lost.
    if token is None or token.used >= token.uses or token.expires <= now:
        raise PeerError(TOKEN_REFUSED)
    _check_device(facts.device_state)
    if token.device is None and facts.device_state is DeviceState.ENROLLED:
        # Else one token of a batch could take over every device of the fleet.
        raise PeerError(
            TOKEN_REFUSED,
            "A token that names no device does not admit one that is enrolled "
            "already; ask the fleet operator for a token made for this device.",
        )
    if facts.case_twin is not None:
        raise PeerError(DEVICE_ID_CASE)
    profile = token_profile(request, token, policy)
    _check_request(request, proof.device, facts, policy)
    return Admitted(proof.device, profile.name, AuthMethod.TOKEN, proof.token_hash)


def token_profile(
    request: Request, token: TokenRow, policy: EnrolmentPolicy
) -> Profile:
    """The profile that this token admits to; PeerError if another one is asked for."""
    made_for = token.profile or DEFAULT_PROFILE
    profile = named_profile(request.profile or made_for, policy)
    if not profile.token or profile.name != made_for:
        raise PeerError(PROFILE_NOT_ALLOWED)
    return profile


def _check_standing(
    request: Request, standing: Standing | None, policy: EnrolmentPolicy, now: datetime
) -> None:
    again = request.operation is Operation.SIMPLE_REENROLL
    grace = _grace(standing, policy) if again else _NO_GRACE
    refusal = standing_refusal(standing, now, expired_grace=grace)
    if refusal is not None:
        raise PeerError(refusal)


def _by_credential(request: Request, facts: Facts, policy: EnrolmentPolicy) -> Admitted:
    standing = facts.standing
    if standing is None:
        raise PeerError(CREDENTIAL_UNKNOWN)
    credential = standing.credential
    profile = _profile_by_credential(request, standing, policy)
    _check_request(request, credential.device, facts, policy)
    auth = AuthMethod(credential.kind.value)
    return Admitted(credential.device, profile.name, auth, credential.id.to_bytes(8))


def _profile_by_credential(
    request: Request, standing: Standing, policy: EnrolmentPolicy
) -> Profile:
    credential = standing.credential
    if credential.kind is CredentialKind.PSK:
        if request.operation is Operation.SIMPLE_REENROLL:
            raise PeerError(
                PROFILE_NOT_ALLOWED,
                "Re-enrolment renews the certificate of the connection, and a PSK "
                "has none; use simpleenroll, or POST /device/v1/psk for a new key.",
            )
        profile = named_profile(request.profile or DEFAULT_PROFILE, policy)
        allowed = profile.psk
    elif request.operation is Operation.SIMPLE_REENROLL:
        profile = named_profile(request.profile or credential.line, policy)
        allowed = (
            profile.name == credential.line and credential.line in profile.from_profiles
        )
    else:
        profile = named_profile(request.profile or DEFAULT_PROFILE, policy)
        allowed = credential.line in profile.from_profiles
    if not allowed:
        raise PeerError(PROFILE_NOT_ALLOWED)
    return profile


def named_profile(name: str, policy: EnrolmentPolicy) -> Profile:
    """The profile of that name; PeerError(profile_unknown)."""
    profile = policy.profiles.get(name)
    if profile is None:
        raise PeerError(PROFILE_UNKNOWN)
    return profile


def _grace(standing: Standing | None, policy: EnrolmentPolicy) -> timedelta:
    """How long after its end this credential may re-enrol: its own profile says."""
    if standing is None:
        return _NO_GRACE
    profile = policy.profiles.get(standing.credential.line)
    return _NO_GRACE if profile is None else profile.expired_grace


def _check_device(state: DeviceState | None) -> None:
    refusal = None if state is None else _DEVICE_REFUSALS.get(state)
    if refusal is not None:
        raise PeerError(refusal)


def _asked_before(
    facts: Facts,
    policy: EnrolmentPolicy,
    now: datetime,
    abandoned: Container[int],
) -> AskedBefore | None:
    """The answer to the same request, where it is to be repeated."""
    earlier = facts.earlier
    if earlier is None:
        return None
    if not earlier.resolved:
        if earlier.intent_id in abandoned or now - earlier.at > policy.intent_stale:
            raise DeadIntentError(earlier.intent_id)
        raise PeerError(IN_PROGRESS)
    credential, certificate_der = earlier.credential, earlier.certificate_der
    # Proven, it has served: what comes now is a new request in the old one's words.
    if (
        credential is None
        or certificate_der is None
        or credential.state is not CredentialState.PENDING
        or (credential.not_after is not None and credential.not_after <= now)
    ):
        return None
    _check_device(facts.device_state)
    return AskedBefore(credential, certificate_der)


def _check_request(
    request: Request, device: DeviceId, facts: Facts, policy: EnrolmentPolicy
) -> None:
    """Names and key of the request fit the device that proved itself."""
    if facts.spki_owner is not None and facts.spki_owner != device:
        raise PeerError(KEY_IN_USE)
    check_names(request.csr.wishes, device, policy.domain.device(device))
