"""A device asks for its certificate: what it gets, once and again."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

import pytest
from ca_house import DAY, HOUR, PUMP, House, made_house, make_csr, serial_of
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from provisioning.enrol.admission import StandingProof, TokenProof
from provisioning.enrol.tokens import TokenWish, create_enrolment_token, token_proof
from provisioning.model.credentials import AuthMethod, CredentialState, RevocationReason
from provisioning.model.errors import PeerError, Unavailable
from provisioning.model.ids import DeviceId, PskIdentity
from provisioning.psk.derive import derive

VALVE = DeviceId.parse("valve-1")


@pytest.fixture
async def house(tmp_path):
    async with made_house(tmp_path) as made:
        yield made


async def refusal(work) -> str:
    with pytest.raises(PeerError) as caught:
        await work
    return caught.value.refusal.code


async def enrolled(house: House, device: DeviceId = PUMP, profile=None) -> bytes:
    secret = await house.new_token(device, profile)
    proof = TokenProof(secret.hash, device)
    return await house.enrolment().simple_enroll(make_csr(), proof, profile)


async def test_a_token_gives_a_certificate_of_the_profile(house: House):
    der = await enrolled(house)
    certificate = x509.load_der_x509_certificate(der)
    certificate.verify_directly_issued_by(
        house.hierarchy.issuers["issuing"].certificate
    )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://test.example/device/pump-7"
    ]
    assert certificate.not_valid_after_utc == house.clock() + 30 * DAY
    (known,) = await house.certificates()
    assert known.serial == serial_of(der)
    assert known.state is CredentialState.PENDING
    assert house.named("issued")[0]["serial"] == serial_of(der).hex


async def test_a_factory_certificate_has_no_end(house: House):
    der = await enrolled(house, profile="idevid")
    certificate = x509.load_der_x509_certificate(der)
    assert certificate.not_valid_after_utc.year == 9999
    certificate.verify_directly_issued_by(
        house.hierarchy.issuers["factory"].certificate
    )
    standing = await house.connect(der)
    second = await house.enrolment().simple_enroll(make_csr(), StandingProof(standing))
    line = (await house.certificates())[-1].line
    assert (serial_of(second) != serial_of(der), line) == (True, "ldevid")


async def test_the_same_request_gets_the_same_certificate(house: House):
    secret, csr = await house.new_token(), make_csr()
    proof = TokenProof(secret.hash, PUMP)
    first = await house.enrolment().simple_enroll(csr, proof)
    # Another process, later, the token over: the answer was lost on its way.
    house.clock.now += 2 * HOUR
    assert await house.enrolment().simple_enroll(csr, proof) == first
    assert len(await house.certificates()) == 1
    assert house.named("repeated")[0]["serial"] == serial_of(first).hex


async def test_a_token_serves_once(house: House):
    secret, csr = await house.new_token(), make_csr()
    proof = TokenProof(secret.hash, PUMP)
    enrolment = house.enrolment()
    der = await enrolment.simple_enroll(csr, proof)
    other = enrolment.simple_enroll(make_csr(), proof)
    assert await refusal(other) == "token_refused"
    await house.connect(der)
    again = enrolment.simple_enroll(csr, proof)
    assert await refusal(again) == "token_refused", "proven: the token is used up"


async def test_a_refusal_uses_nothing_up(house: House):
    secret = await house.new_token()
    enrolment = house.enrolment()
    proof = TokenProof(secret.hash, PUMP)
    for csr, wanted in ((b"", "csr_malformed"), (b"0" * 9000, "csr_malformed")):
        assert await refusal(enrolment.simple_enroll(csr, proof)) == wanted
    label = enrolment.simple_enroll(make_csr(), proof, "server")
    assert await refusal(label) == "profile_not_allowed"
    thief = enrolment.simple_enroll(make_csr(), TokenProof(secret.hash, VALVE))
    assert await refusal(thief) == "token_refused"
    assert await enrolment.simple_enroll(make_csr(), proof)


async def test_requests_that_meet_get_one_certificate(house: House):
    secret, csr = await house.new_token(), make_csr()
    proof = TokenProof(secret.hash, PUMP)
    enrolment = house.enrolment()
    found = await asyncio.gather(
        *(enrolment.simple_enroll(csr, proof) for _ in range(5))
    )
    assert len(set(found)) == 1
    assert len(await house.certificates()) == 1


async def test_another_process_at_the_same_request_is_waited_for(house: House):
    secret, csr = await house.new_token(), make_csr()
    proof = TokenProof(secret.hash, PUMP)
    house.token.held["use"] = asyncio.Event()
    first = asyncio.create_task(house.enrolment().simple_enroll(csr, proof))
    await house.token.reached.wait()
    other = house.enrolment()
    assert await refusal(other.simple_enroll(csr, proof)) == "in_progress"
    house.token.held.pop("use").set()
    assert await first == await other.simple_enroll(csr, proof)


async def test_a_device_that_is_cut_off_finds_its_answer_when_it_comes_back(
    house: House,
):
    secret, csr = await house.new_token(), make_csr()
    proof = TokenProof(secret.hash, PUMP)
    enrolment = house.enrolment()
    house.token.held["use"] = asyncio.Event()
    cut_off = asyncio.create_task(enrolment.simple_enroll(csr, proof))
    await house.token.reached.wait()
    cut_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut_off
    back = asyncio.create_task(enrolment.simple_enroll(csr, proof))
    house.token.held.pop("use").set()
    der = await back
    assert [known.serial for known in await house.certificates()] == [serial_of(der)]


async def test_a_gateway_that_stops_tells_its_devices_to_come_back(house: House):
    secret = await house.new_token()
    async with asyncio.TaskGroup() as tasks:
        enrolment = house.enrolment(tasks)
    with pytest.raises(Unavailable):
        await enrolment.simple_enroll(make_csr(), TokenProof(secret.hash, PUMP))


async def test_re_enrolment_gives_a_new_serial_and_keeps_the_old_until_it_is_proven(
    house: House,
):
    old = await enrolled(house)
    standing = await house.connect(old)
    csr = make_csr()
    new = await house.enrolment().simple_reenroll(csr, standing)
    assert serial_of(new) != serial_of(old)
    states = {known.serial: known.state for known in await house.certificates()}
    assert states[serial_of(old)] is CredentialState.ACTIVE
    assert await house.enrolment().simple_reenroll(csr, standing) == new
    await house.connect(new, times=2)
    late = house.enrolment().simple_reenroll(csr, standing)
    assert await refusal(late) == "credential_superseded"


async def test_a_device_that_slept_past_its_expiry_has_a_way_back(house: House):
    old = await enrolled(house)
    standing = await house.connect(old)
    house.clock.now += 200 * DAY
    enrolment = house.enrolment()
    other_way = enrolment.simple_enroll(make_csr(), StandingProof(standing))
    assert await refusal(other_way) == "credential_expired"
    new = await enrolment.simple_reenroll(make_csr(), standing)
    assert await house.connect(new)


async def test_a_revoked_device_gets_nothing_by_what_its_connection_remembers(
    house: House,
):
    old = await enrolled(house)
    standing = await house.connect(old)
    await house.registry.revoke_device(
        PUMP, RevocationReason.KEY_COMPROMISE, house.clock(), "op"
    )
    enrolment = house.enrolment()
    for work in (
        enrolment.simple_reenroll(make_csr(), standing),
        enrolment.simple_enroll(make_csr(), StandingProof(standing)),
    ):
        assert await refusal(work) == "device_revoked"


async def test_a_device_revoked_while_the_token_signs_receives_nothing(house: House):
    standing = await house.connect(await enrolled(house))
    house.token.held["use"] = asyncio.Event()
    work = asyncio.create_task(house.enrolment().simple_reenroll(make_csr(), standing))
    await house.token.reached.wait()
    await house.registry.revoke_device(
        PUMP, RevocationReason.KEY_COMPROMISE, house.clock(), "op"
    )
    house.token.held.pop("use").set()
    assert await refusal(work) == "device_revoked"
    assert len(await house.certificates()) == 1


async def test_a_key_of_another_device_is_refused(house: House):
    key = ec.generate_private_key(ec.SECP256R1())
    first = await house.new_token(PUMP)
    second = await house.new_token(VALVE)
    enrolment = house.enrolment()
    await enrolment.simple_enroll(make_csr(key), TokenProof(first.hash, PUMP))
    thief = enrolment.simple_enroll(make_csr(key), TokenProof(second.hash, VALVE))
    assert await refusal(thief) == "key_in_use"


async def test_a_channel_binding_must_be_right_when_it_is_there(house: House):
    secret = await house.new_token()
    proof = TokenProof(secret.hash, PUMP)
    right = base64.b64encode(b"e" * 32)
    csr = make_csr(password=right)
    enrolment = house.enrolment()
    for bindings in (None, lambda: (), lambda: ("d3Jvbmc=",)):
        wrong = enrolment.simple_enroll(csr, proof, bindings=bindings)
        assert await refusal(wrong) == "channel_binding_wrong"
    known = ("other", right.decode())
    assert await enrolment.simple_enroll(csr, proof, bindings=lambda: known)


# PSKs ---------------------------------------------------------------------------


async def test_the_next_generation_is_the_same_until_it_is_proven(house: House):
    await house.registry.create_psk(PUMP, house.clock(), "op")
    first = await psk_connects(house, 1)
    enrolment = house.enrolment()
    identity, key = await enrolment.next_psk(first, AuthMethod.PSK)
    assert str(identity) == "pump-7#2"
    assert (identity, key) == await enrolment.next_psk(first, AuthMethod.PSK)
    assert key == await derive(house.token, identity)
    second = await psk_connects(house, 2)
    third, _ = await enrolment.next_psk(second, AuthMethod.PSK)
    assert third.generation == 3


async def psk_connects(house: House, generation: int):
    identity = PskIdentity(PUMP, generation)
    standing = await house.registry.standing_of_psk(identity)
    return await house.registry.connected(
        standing.credential.id,
        auth=AuthMethod.PSK,
        resumed=False,
        address="192.0.2.7",
        now=house.clock(),
        grace=HOUR,
    )


async def test_a_psk_is_traded_for_a_certificate(house: House):
    await house.registry.create_psk(PUMP, house.clock(), "op")
    standing = await psk_connects(house, 1)
    der = await house.enrolment().simple_enroll(make_csr(), StandingProof(standing))
    assert x509.load_der_x509_certificate(der)
    assert house.named("issued")[-1]["auth"] == "psk"


async def test_a_suspended_device_gets_no_next_key(house: House):
    await house.registry.create_psk(PUMP, house.clock(), "op")
    await psk_connects(house, 1)
    await house.registry.suspend(PUMP, house.clock(), "op")
    standing = await house.registry.standing_of_psk(PskIdentity(PUMP, 1))
    work = house.enrolment().next_psk(standing, AuthMethod.PSK)
    assert await refusal(work) == "device_suspended"


async def test_a_key_whose_record_was_lost_is_given_when_asked_again(house: House):
    await house.registry.create_psk(PUMP, house.clock(), "op")
    standing = await psk_connects(house, 1)
    house.registry.lose["next_psk"] = ["before", "after"]
    enrolment = house.enrolment()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await enrolment.next_psk(standing, AuthMethod.PSK)
    identity, _ = await enrolment.next_psk(standing, AuthMethod.PSK)
    assert identity.generation == 2


# Tokens -------------------------------------------------------------------------


async def test_a_token_is_kept_as_a_hash_and_shown_by_no_repr(house: House):
    secret = await house.new_token()
    assert len(base64.urlsafe_b64decode(secret.text + "=")) == 32
    assert secret.text not in repr(secret)
    assert secret.text not in str(house.events)
    for path in house.config.folder.rglob("*"):
        if path.is_file():
            assert secret.text.encode() not in path.read_bytes(), path
    assert token_proof("pump-7", secret.text) == TokenProof(secret.hash, PUMP)


@pytest.mark.parametrize("profile", ["server", "operator", "none"])
async def test_no_token_is_made_for_what_tokens_do_not_admit_to(house, profile):
    wish = TokenWish(PUMP, 1, HOUR, profile)
    work = create_enrolment_token(
        house.registry,
        house.config.enrolment,
        wish,
        now=house.clock(),
        actor="op",
        random_bytes=bytes,
    )
    assert (await refusal(work)).startswith("profile_")
    right = replace(wish, profile="idevid")
    assert await create_enrolment_token(
        house.registry,
        house.config.enrolment,
        right,
        now=house.clock(),
        actor="op",
        random_bytes=bytes,
    )


async def test_a_token_for_a_device_that_is_malformed_proves_nothing():
    with pytest.raises(PeerError):
        token_proof("a_b", "secret")
    assert token_proof("a", "\udcff").token_hash
