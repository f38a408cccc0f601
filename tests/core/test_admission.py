"""Who may have what: each proof with its twin that is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from provisioning.enrol.admission import (
    AskedBefore,
    DeadIntentError,
    Operation,
    Request,
    StandingProof,
    TokenProof,
    admit,
    standing_refusal,
)
from provisioning.enrol.answer import request_key
from provisioning.enrol.policy import EnrolmentPolicy
from provisioning.model.admitted import Admitted
from provisioning.model.credentials import (
    AuthMethod,
    Credential,
    CredentialKind,
    CredentialState,
    DeviceState,
    Standing,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, Serial, TrustDomain
from provisioning.registry.records import Earlier, Facts, TokenRow
from provisioning.x509.csr import verify_csr
from provisioning.x509.profiles import DEFAULTS

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PUMP, VALVE = DeviceId.parse("pump-7"), DeviceId.parse("valve-1")
POLICY = EnrolmentPolicy(TrustDomain.parse("acme.test"), DEFAULTS)
HASH = b"h" * 32
DAY = timedelta(days=1)


def csr(*names: x509.NameAttribute, uri: str | None = None):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if uri:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]),
            critical=False,
        )
    key = ec.generate_private_key(ec.SECP256R1())
    der = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    return verify_csr(der, DEFAULTS["ldevid"].keys)


CSR = csr()


def asked(
    profile: str | None = None, operation: Operation = Operation.SIMPLE_ENROLL, of=CSR
) -> Request:
    return Request(operation, of, profile)


def token(**changes) -> TokenRow:
    row = TokenRow("t1", PUMP, 1, 0, NOW + DAY, None, None, NOW - DAY)
    return replace(row, **changes)


def credential(**changes) -> Credential:
    made = Credential(
        id=5,
        device=PUMP,
        kind=CredentialKind.CERTIFICATE,
        line="ldevid",
        state=CredentialState.ACTIVE,
        serial=Serial(77),
        generation=None,
        not_before=NOW - DAY,
        not_after=NOW + DAY,
        first_seen=NOW - DAY,
    )
    return replace(made, **changes)


def psk(**changes) -> Credential:
    return credential(
        kind=CredentialKind.PSK,
        line="psk",
        serial=None,
        generation=3,
        not_after=None,
        **changes,
    )


def standing(of: Credential | None = None, state=DeviceState.ENROLLED) -> Standing:
    return Standing(of or credential(), state, None)


def facts(**changes) -> Facts:
    return replace(Facts(None, None, None, None, None, None), **changes)


def earlier(**changes) -> Earlier:
    given = Earlier(9, True, b"der", credential(state=CredentialState.PENDING), NOW)
    return replace(given, **changes)


def by_token(known: Facts, request: Request | None = None, device=PUMP, **more):
    return admit(
        request or asked(), TokenProof(HASH, device), known, POLICY, NOW, **more
    )


def by_standing(held: Standing, request: Request | None = None, **known):
    return admit(
        request or asked(),
        StandingProof(held),
        facts(standing=held, device_state=held.device_state, **known),
        POLICY,
        NOW,
    )


def refusal(call) -> str:
    with pytest.raises(PeerError) as caught:
        call()
    return caught.value.refusal.code


# Tokens -------------------------------------------------------------------------


def test_a_token_admits_its_device():
    assert by_token(facts(token=token())) == Admitted(
        PUMP, "ldevid", AuthMethod.TOKEN, HASH
    )


def test_a_token_for_nobody_admits_a_new_device():
    found = by_token(facts(token=token(device=None)), device=VALVE)
    assert isinstance(found, Admitted)
    assert found.device == VALVE


def test_a_token_for_nobody_does_not_take_over_an_enrolled_device():
    known = facts(token=token(device=None), device_state=DeviceState.ENROLLED)
    assert refusal(lambda: by_token(known)) == "token_refused"
    bound = facts(token=token(), device_state=DeviceState.ENROLLED)
    assert isinstance(by_token(bound), Admitted), "its own token does"


@pytest.mark.parametrize(
    "row",
    [
        None,
        token(device=VALVE),
        token(used=1),
        token(expires=NOW),
        token(revoked_at=NOW - DAY),
    ],
    ids=["unknown", "another's", "used up", "expired", "revoked"],
)
def test_a_token_that_is_no_good_is_refused_in_one_word(row: TokenRow | None):
    """Whatever is known of the device: a stranger learns nothing of it."""
    for state in (None, *DeviceState):
        known = facts(token=row, device_state=state, spki_owner=VALVE)
        assert refusal(lambda known=known: by_token(known)) == "token_refused"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (DeviceState.REVOKED, "device_revoked"),
        (DeviceState.SUSPENDED, "device_suspended"),
        (DeviceState.RETIRED, "device_retired"),
    ],
)
def test_a_good_token_does_not_admit_a_device_that_is_out(state, code: str):
    known = facts(token=token(), device_state=state)
    assert refusal(lambda: by_token(known)) == code
    again = facts(token=token(used=1), device_state=state, earlier=earlier())
    assert refusal(lambda: by_token(again)) == code, "nor repeats what it got before"


def test_a_device_that_differs_only_in_case_is_refused():
    known = facts(token=token(), case_twin="PUMP-7")
    assert refusal(lambda: by_token(known)) == "device_id_case"


def test_a_token_admits_to_the_profile_it_was_made_for():
    made_for = facts(token=token(profile="idevid"))
    for label in (None, "idevid"):
        found = by_token(made_for, asked(label))
        assert isinstance(found, Admitted)
        assert found.profile == "idevid"
    assert refusal(lambda: by_token(made_for, asked("ldevid"))) == "profile_not_allowed"
    plain = facts(token=token())
    assert refusal(lambda: by_token(plain, asked("idevid"))) == "profile_not_allowed"
    assert refusal(lambda: by_token(plain, asked("server"))) == "profile_not_allowed"
    assert refusal(lambda: by_token(plain, asked("none"))) == "profile_unknown"


def test_a_key_of_another_device_is_refused():
    known = facts(token=token(), spki_owner=VALVE)
    assert refusal(lambda: by_token(known)) == "key_in_use"
    assert by_token(facts(token=token(), spki_owner=PUMP)), "its own may stay"


# Names --------------------------------------------------------------------------

_SERIAL = x509.NameOID.SERIAL_NUMBER
_COMMON = x509.NameOID.COMMON_NAME


def test_the_devices_own_names_may_be_given_or_left_out():
    for request in (
        CSR,
        csr(x509.NameAttribute(_COMMON, "pump-7")),
        csr(
            x509.NameAttribute(_SERIAL, "pump-7"),
            x509.NameAttribute(_COMMON, "pump-7"),
            uri="spiffe://acme.test/device/pump-7",
        ),
    ):
        assert by_token(facts(token=token()), asked(of=request))


@pytest.mark.parametrize(
    "request_",
    [
        csr(x509.NameAttribute(_SERIAL, "valve-1")),
        csr(x509.NameAttribute(_COMMON, "valve-1")),
        csr(x509.NameAttribute(_COMMON, "PUMP-7")),
        csr(uri="spiffe://acme.test/device/valve-1"),
        csr(uri="spiffe://other.test/device/pump-7"),
    ],
    ids=["serialNumber", "CN", "case", "URI", "domain"],
)
def test_another_devices_names_are_refused(request_):
    known = facts(token=token())
    wish = asked(of=request_)
    assert refusal(lambda: by_token(known, wish)) == "name_not_allowed"
    assert refusal(lambda: by_standing(standing(), wish)) == "name_not_allowed"


# Certificates and PSKs ----------------------------------------------------------


def test_a_factory_certificate_gets_an_operational_one():
    held = standing(credential(line="idevid", not_after=None))
    found = by_standing(held)
    assert isinstance(found, Admitted)
    assert (found.profile, found.auth) == ("ldevid", AuthMethod.CERTIFICATE)


def test_a_factory_certificate_is_not_renewed_by_itself():
    held = standing(credential(line="idevid", not_after=None))
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert refusal(lambda: by_standing(held, renew)) == "profile_not_allowed"


@pytest.mark.parametrize("operation", Operation)
def test_an_operational_certificate_gets_its_successor(operation: Operation):
    found = by_standing(standing(), asked(operation=operation))
    assert isinstance(found, Admitted)
    assert (found.device, found.profile) == (PUMP, "ldevid")


def test_no_certificate_gets_a_profile_that_it_does_not_lead_to():
    for label, code in (
        ("idevid", "profile_not_allowed"),
        ("server", "profile_not_allowed"),
        ("operator", "profile_not_allowed"),
        ("none", "profile_unknown"),
    ):
        for operation in Operation:
            wish = asked(label, operation)
            assert refusal(lambda wish=wish: by_standing(standing(), wish)) == code


def test_a_psk_is_traded_for_a_certificate_but_not_renewed_as_one():
    held = standing(psk())
    found = by_standing(held)
    assert isinstance(found, Admitted)
    assert (found.profile, found.auth) == ("ldevid", AuthMethod.PSK)
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert refusal(lambda: by_standing(held, renew)) == "profile_not_allowed"


def test_what_the_registry_says_now_counts_and_not_what_the_connection_saw():
    seen = standing()
    now_revoked = facts(standing=standing(state=DeviceState.REVOKED))

    def ask():
        return admit(asked(), StandingProof(seen), now_revoked, POLICY, NOW)

    assert refusal(ask) == "device_revoked"
    gone = facts()
    assert (
        refusal(lambda: admit(asked(), StandingProof(seen), gone, POLICY, NOW))
        == "credential_unknown"
    )


@pytest.mark.parametrize(
    ("held", "code"),
    [
        (None, "credential_unknown"),
        (standing(), None),
        (standing(psk()), None),
        (standing(credential(state=CredentialState.PENDING)), None),
        (standing(state=DeviceState.REGISTERED), None),
        (standing(state=DeviceState.REVOKED), "device_revoked"),
        (standing(state=DeviceState.SUSPENDED), "device_suspended"),
        (standing(state=DeviceState.RETIRED), "device_retired"),
        (standing(credential(state=CredentialState.REVOKED)), "credential_revoked"),
        (
            standing(credential(state=CredentialState.SUPERSEDED)),
            "credential_superseded",
        ),
        (standing(credential(not_after=NOW - DAY)), "credential_expired"),
        (
            standing(credential(state=CredentialState.EXPIRED, not_after=NOW - DAY)),
            "credential_expired",
        ),
        (standing(credential(not_before=NOW + DAY)), "credential_not_yet_valid"),
        (
            standing(psk(state=CredentialState.SUPERSEDED)),
            "credential_superseded",
        ),
    ],
)
def test_what_a_credential_may_do(held: Standing | None, code: str | None):
    found = standing_refusal(held, NOW)
    assert (found.code if found else None) == code


# The way back -------------------------------------------------------------------


def test_an_expired_certificate_may_re_enrol_and_nothing_else():
    slept = standing(
        credential(state=CredentialState.EXPIRED, not_after=NOW - 300 * DAY)
    )
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert isinstance(by_standing(slept, renew), Admitted)
    assert refusal(lambda: by_standing(slept)) == "credential_expired"


def test_the_way_back_ends_with_the_grace_of_its_profile():
    too_long = standing(credential(not_after=NOW - 366 * DAY))
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert refusal(lambda: by_standing(too_long, renew)) == "credential_expired"


@pytest.mark.parametrize("state", [CredentialState.REVOKED, CredentialState.SUPERSEDED])
def test_there_is_no_way_back_for_what_was_ended(state: CredentialState):
    ended = standing(credential(state=state, not_after=NOW - DAY))
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert refusal(lambda: by_standing(ended, renew)).startswith("credential_")


@pytest.mark.parametrize("state", [DeviceState.REVOKED, DeviceState.SUSPENDED])
def test_there_is_no_way_back_for_a_device_that_is_out(state: DeviceState):
    out = standing(credential(not_after=NOW - DAY), state)
    renew = asked(operation=Operation.SIMPLE_REENROLL)
    assert refusal(lambda: by_standing(out, renew)) == f"device_{state}"


# The same request again -----------------------------------------------------------


def test_an_unproven_answer_is_repeated_though_the_token_is_spent_and_over():
    known = facts(token=token(used=1, expires=NOW - DAY), earlier=earlier())
    found = by_token(known)
    assert isinstance(found, AskedBefore)
    assert found.certificate_der == b"der"


def test_after_the_proof_the_token_is_used_up():
    proven = earlier(credential=credential(state=CredentialState.ACTIVE))
    known = facts(token=token(used=1), earlier=proven)
    assert refusal(lambda: by_token(known)) == "token_refused"


def test_after_the_proof_a_certificate_gets_another_one():
    proven = earlier(credential=credential(state=CredentialState.ACTIVE))
    assert isinstance(by_standing(standing(), earlier=proven), Admitted)


@pytest.mark.parametrize(
    "state",
    [CredentialState.SUPERSEDED, CredentialState.REVOKED, CredentialState.EXPIRED],
)
def test_what_was_ended_is_not_repeated(state: CredentialState):
    ended = earlier(credential=credential(state=state))
    assert isinstance(by_standing(standing(), earlier=ended), Admitted)


def test_what_expired_unproven_is_not_repeated():
    over = earlier(credential=credential(state=CredentialState.PENDING, not_after=NOW))
    assert isinstance(by_standing(standing(), earlier=over), Admitted)


def test_a_revoked_token_repeats_nothing():
    known = facts(token=token(used=1, revoked_at=NOW), earlier=earlier())
    assert refusal(lambda: by_token(known)) == "token_refused"


def test_a_request_that_another_gateway_works_on_is_told_to_wait():
    open_ = earlier(resolved=False, credential=None, certificate_der=None)
    known = facts(token=token(used=1), earlier=open_)
    assert refusal(lambda: by_token(known)) == "in_progress"


def test_a_dead_attempt_is_found_dead_by_its_age_or_by_who_gave_it_up():
    open_ = earlier(resolved=False, credential=None, certificate_der=None)
    old = replace(open_, at=NOW - POLICY.intent_stale - timedelta(seconds=1))
    with pytest.raises(DeadIntentError):
        by_token(facts(token=token(used=1), earlier=old))
    with pytest.raises(DeadIntentError) as caught:
        by_token(facts(token=token(used=1), earlier=open_), abandoned={9})
    assert caught.value.intent_id == 9


_PROOFS = st.one_of(
    st.builds(
        TokenProof,
        st.binary(min_size=32, max_size=32),
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.\-]{0,63}", fullmatch=True).map(
            DeviceId.parse
        ),
    ),
    st.integers(1, 2**60).map(
        lambda number: StandingProof(standing(credential(id=number)))
    ),
)
_REQUESTS = st.tuples(
    st.sampled_from(Operation),
    st.sampled_from(["ldevid", "idevid", "pump"]),
    _PROOFS,
    st.binary(min_size=32, max_size=32),
)


@given(_REQUESTS, _REQUESTS)
def test_two_requests_are_the_same_only_if_every_part_is(one, other):
    assert (request_key(*one) == request_key(*other)) == (one == other)
