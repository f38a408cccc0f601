"""What relying parties are told: CRLs and OCSP answers, and how soon."""

from __future__ import annotations

import asyncio
import hashlib
import secrets

import pytest
from ca_house import DAY, HOUR, PUMP, House, made_house, make_csr
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provisioning.ca.answers import OcspAnswers, OcspReply
from provisioning.ca.publish import CrlFiles, Publisher, write_newer
from provisioning.ca.renew import renew_own
from provisioning.enrol.admission import TokenProof
from provisioning.model.credentials import RevocationReason
from provisioning.model.errors import Unavailable
from provisioning.model.ids import DeviceId, Serial

SHA1 = hashes.SHA1()  # noqa: S303 - what nearly all clients name issuers by
VALVE = DeviceId.parse("valve-1")
OK = ocsp.OCSPResponseStatus.SUCCESSFUL
TRY_LATER = ocsp.OCSPResponseStatus.TRY_LATER
GOOD, REVOKED, UNKNOWN = (
    ocsp.OCSPCertStatus.GOOD,
    ocsp.OCSPCertStatus.REVOKED,
    ocsp.OCSPCertStatus.UNKNOWN,
)


class Told:
    """Events as the gateway's log gets them; a test waits for one."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self._news = asyncio.Event()

    def __call__(self, name: str, fields) -> None:
        self.events.append((name, dict(fields)))
        self._news.set()

    async def until(self, name: str, **fields) -> dict:
        """The first event of that name and these fields, from now or before."""
        while True:
            for found, known in self.events:
                if found == name and fields.items() <= known.items():
                    return known
            self._news.clear()
            await self._news.wait()


@pytest.fixture
async def house(tmp_path):
    async with made_house(tmp_path) as made:
        yield made


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def answers(house, told):
    return OcspAnswers(
        registry=house.registry,
        token=house.token,
        hierarchy=house.hierarchy,
        own=house.own,
        settings=house.config.ca,
        clock=house.clock,
        on_event=told,
    )


@pytest.fixture
def publisher(house, told):
    return Publisher(
        registry=house.registry,
        token=house.token,
        hierarchy=house.hierarchy,
        own=house.own,
        settings=house.config.ca,
        clock=house.clock,
        on_event=told,
    )


@pytest.fixture
def crls(house, told):
    return CrlFiles(
        registry=house.registry,
        token=house.token,
        hierarchy=house.hierarchy,
        settings=house.config.ca,
        clock=house.clock,
        on_event=told,
    )


async def enrolled(house: House, device: DeviceId = PUMP) -> x509.Certificate:
    secret = await house.new_token(device)
    der = await house.enrolment().simple_enroll(
        make_csr(), TokenProof(secret.hash, device)
    )
    return x509.load_der_x509_certificate(der)


async def revoke(house: House, device: DeviceId = PUMP) -> list:
    """Revoke, and the changes that a gateway then follows."""
    seq = await house.registry.latest_seq()
    await house.registry.revoke_device(
        device, RevocationReason.KEY_COMPROMISE, house.clock(), "op"
    )
    return await house.registry.changes_after(seq)


def question(
    house: House, serial: int, issuer: str = "issuing", algorithm=None, nonce=None
) -> bytes:
    """An OCSP request as openssl makes it."""
    certificate = house.hierarchy.issuers[issuer].certificate
    builder = ocsp.OCSPRequestBuilder().add_certificate_by_hash(
        *_hashes(certificate, algorithm or SHA1),
        serial,
        algorithm or SHA1,
    )
    if nonce:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return builder.build().public_bytes(Encoding.DER)


def _hashes(issuer: x509.Certificate, algorithm) -> tuple[bytes, bytes]:
    """Of the issuer's name and of its key (RFC 6960, 4.1.1)."""
    name = issuer.subject.public_bytes()
    key = issuer.public_key().public_bytes(
        Encoding.X962, PublicFormat.UncompressedPoint
    )
    return (
        hashlib.new(algorithm.name, name).digest(),
        hashlib.new(algorithm.name, key).digest(),
    )


def read(reply: OcspReply) -> ocsp.OCSPResponse:
    return ocsp.load_der_ocsp_response(reply.der)


def verified(house: House, reply: OcspReply, issuer: str = "issuing"):
    """The response, its signature checked up to the CA it speaks for."""
    response = read(reply)
    assert response.response_status is OK
    (responder,) = response.certificates
    responder.verify_directly_issued_by(house.hierarchy.issuers[issuer].certificate)
    responder.public_key().verify(
        response.signature, response.tbs_response_bytes, ec.ECDSA(hashes.SHA256())
    )
    return response


def listed(house: House, name: str = "issuing") -> x509.CertificateRevocationList:
    found = x509.load_der_x509_crl(house.config.ca.crl_path(name).read_bytes())
    assert found.is_signature_valid(house.hierarchy.issuers[name].public_key)
    return found


def number(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


# CRLs ---------------------------------------------------------------------------


async def test_every_ca_has_a_list_and_numbers_only_grow(house, crls):
    await crls.refresh()
    first = {name: number(listed(house, name)) for name in house.hierarchy.issuers}
    await crls.refresh()
    for name, before in first.items():
        crl = listed(house, name)
        assert number(crl) > before
        assert crl.next_update_utc == house.clock() + 7 * DAY
        path = house.config.ca.crl_path(name)
        assert path.stat().st_mode & 0o777 == 0o644


async def test_a_revoked_certificate_is_listed_with_its_reason(house, crls):
    certificate = await enrolled(house)
    other = await enrolled(house, VALVE)
    await revoke(house)
    await crls.refresh()
    entry = listed(house).get_revoked_certificate_by_serial_number(
        certificate.serial_number
    )
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is (
        x509.ReasonFlags.key_compromise
    )
    assert (
        listed(house).get_revoked_certificate_by_serial_number(other.serial_number)
        is None
    )


async def test_an_older_list_never_replaces_a_newer_one(house, crls):
    """`birthmark ca crl` was faster, although this process drew its number first."""
    await crls.refresh()
    path = house.config.ca.crl_path("issuing")
    older = path.read_bytes()
    await crls.refresh()
    newer = path.read_bytes()
    assert write_newer(path, older, number(x509.load_der_x509_crl(older))) is False
    assert path.read_bytes() == newer
    path.write_bytes(b"broken")
    assert write_newer(path, older, 1) is True


async def test_a_registry_from_a_backup_does_not_set_numbers_back(house, crls):
    for _ in range(5):
        await crls.refresh()
    before = number(listed(house))
    numbers = iter(range(2, 100))

    async def forgetful(name: str) -> int:
        return next(numbers)

    house.registry.next_crl_number = forgetful
    await crls.refresh()
    assert number(listed(house)) > before


async def test_a_revocation_that_waits_for_the_token_is_not_forgotten(house, crls):
    certificate = await enrolled(house)
    await crls.refresh()
    before = listed(house)
    await revoke(house)
    crls.changed()
    house.token.away = True
    with pytest.raises(Unavailable):
        await crls.refresh()
    assert listed(house) == before, "the list that stands goes on"
    house.token.away = False
    async with asyncio.timeout(5):
        await crls.wait(DAY)
    await crls.refresh()
    assert listed(house).get_revoked_certificate_by_serial_number(
        certificate.serial_number
    )


async def test_a_list_whose_signature_was_lost_is_made_again(house, crls):
    await crls.refresh()
    before = number(listed(house))
    house.token.lose["use"] = ["", "", "after"]
    with pytest.raises(Unavailable):
        await crls.refresh()
    await crls.refresh()
    assert number(listed(house)) > before


# OCSP ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [SHA1, hashes.SHA256()], ids=["sha1", "sha256"])
async def test_good_revoked_and_unknown(house, answers, algorithm):
    certificate = await enrolled(house)
    ask = question(house, certificate.serial_number, algorithm=algorithm)
    good = verified(house, await answers.answer(ask))
    assert good.certificate_status is GOOD
    assert good.serial_number == certificate.serial_number
    assert good.this_update_utc <= house.clock() < good.next_update_utc
    await revoke(house)
    answers.withdraw(Serial(certificate.serial_number))
    revoked = verified(house, await answers.answer(ask))
    assert revoked.certificate_status is REVOKED
    assert revoked.revocation_reason is x509.ReasonFlags.key_compromise
    never = question(house, 12345, algorithm=algorithm)
    assert verified(house, await answers.answer(never)).certificate_status is UNKNOWN


async def test_cas_and_the_server_are_good_though_no_device_has_them(house, answers):
    server = house.own.server_certificate.serial_number
    reply = await answers.answer(question(house, server))
    assert verified(house, reply).certificate_status is GOOD
    issuing = house.hierarchy.issuers["issuing"].certificate.serial_number
    reply = await answers.answer(question(house, issuing, "root"))
    assert verified(house, reply, "root").certificate_status is GOOD
    reply = await answers.answer(question(house, issuing, "issuing"))
    assert verified(house, reply).certificate_status is UNKNOWN


async def test_answers_from_store_need_no_signature_and_echo_no_nonce(house, answers):
    certificate = await enrolled(house)
    first = await answers.answer(question(house, certificate.serial_number))
    signatures = house.token.calls.count("use")
    for _ in range(3):
        asked = question(
            house, certificate.serial_number, nonce=secrets.token_bytes(16)
        )
        assert await answers.answer(asked) == first
    assert house.token.calls.count("use") == signatures


async def test_what_was_never_issued_fills_no_store(house, answers):
    await answers.answer(question(house, 99))
    signatures = house.token.calls.count("use")
    await answers.answer(question(house, 99))
    assert house.token.calls.count("use") == signatures + 1


async def test_somebody_elses_certificates_are_not_ours_to_answer(house, answers):
    stranger = ocsp.OCSPRequestBuilder().add_certificate_by_hash(
        b"n" * 20, b"k" * 20, 5, SHA1
    )
    reply = await answers.answer(stranger.build().public_bytes(Encoding.DER))
    assert read(reply).response_status is ocsp.OCSPResponseStatus.UNAUTHORIZED
    assert reply.next_update is None, "errors are not to be cached"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(garbage=st.binary(max_size=200))
async def test_nonsense_is_answered_as_malformed(answers, garbage):
    reply = await answers.answer(garbage)
    assert read(reply).response_status is ocsp.OCSPResponseStatus.MALFORMED_REQUEST


async def test_an_outage_of_the_token_is_not_noticed_but_by_the_revoked(house, answers):
    certificate, other = await enrolled(house), await enrolled(house, VALVE)
    await answers.sign_all()
    house.token.away = True
    asks = [question(house, one.serial_number) for one in (certificate, other)]
    for ask in asks:
        assert verified(house, await answers.answer(ask)).certificate_status is GOOD
    await revoke(house)
    answers.withdraw(Serial(certificate.serial_number))
    assert read(await answers.answer(asks[0])).response_status is TRY_LATER
    assert verified(house, await answers.answer(asks[1])).certificate_status is GOOD
    house.token.away = False
    back = verified(house, await answers.answer(asks[0]))
    assert back.certificate_status is REVOKED


async def test_good_that_is_withdrawn_while_it_is_signed_is_not_given(house, answers):
    """The status was read, then the device was revoked, then the token signed."""
    certificate = await enrolled(house)
    house.token.held["use"] = asyncio.Event()
    house.token.reached.clear()
    asked = asyncio.create_task(
        answers.answer(question(house, certificate.serial_number))
    )
    await house.token.reached.wait()
    await revoke(house)
    answers.withdraw(Serial(certificate.serial_number))
    house.token.held.pop("use").set()
    assert verified(house, await asked).certificate_status is REVOKED


async def test_good_that_is_withdrawn_while_signed_ahead_is_not_kept(house, answers):
    certificate = await enrolled(house)
    await answers.sign_own()
    house.token.held["use"] = asyncio.Event()
    house.token.reached.clear()
    ahead = asyncio.create_task(answers.sign_all())
    await house.token.reached.wait()
    await revoke(house)
    answers.withdraw(Serial(certificate.serial_number))
    house.token.held.pop("use").set()
    await ahead
    ask = question(house, certificate.serial_number)
    assert verified(house, await answers.answer(ask)).certificate_status is REVOKED


async def test_answers_are_signed_ahead_for_all_and_then_for_the_new(house, answers):
    certificates = [
        await enrolled(house, DeviceId.parse(f"pump-{n}")) for n in range(40)
    ]
    await answers.sign_all()
    late = await enrolled(house)
    assert await answers.sign_new() == 1
    assert await answers.sign_new() == 0
    house.token.away = True
    for one in (*certificates, late):
        reply = await answers.answer(question(house, one.serial_number))
        assert verified(house, reply).certificate_status is GOOD


async def test_answers_are_renewed_before_their_half_is_over(house, answers):
    certificate = await enrolled(house)
    await answers.sign_all()
    ask = question(house, certificate.serial_number)
    first = await answers.answer(ask)
    house.clock.now += 11 * HOUR
    assert await answers.sign_all() == 0
    house.clock.now += 2 * HOUR
    assert await answers.sign_all() > 0
    second = await answers.answer(ask)
    assert second.next_update > first.next_update
    house.clock.now += 25 * HOUR
    house.token.away = True
    assert read(await answers.answer(ask)).response_status is TRY_LATER, "stale"


async def test_no_answer_outlives_its_responder(house, answers):
    house.clock.now += 30 * DAY - HOUR
    certificate = await enrolled(house)
    reply = await answers.answer(question(house, certificate.serial_number))
    (responder,) = read(reply).certificates
    assert reply.next_update <= responder.not_valid_after_utc
    own = await renew_own(
        house.token,
        house.config.ca,
        house.hierarchy,
        house.clock(),
        secrets.token_bytes,
    )
    answers.use(own)
    answers.withdraw(Serial(certificate.serial_number))
    reply = await answers.answer(question(house, certificate.serial_number))
    assert reply.next_update == house.clock() + DAY


async def test_a_flood_of_questions_is_told_to_try_later(house, answers):
    house.token.held["use"] = asyncio.Event()
    flood = [
        asyncio.create_task(answers.answer(question(house, serial)))
        for serial in range(1, 301)
    ]
    done, waiting = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
    assert all(read(one.result()).response_status is TRY_LATER for one in done)
    house.token.held.pop("use").set()
    replies = await asyncio.gather(*waiting)
    assert any(read(one).response_status is OK for one in replies)


async def test_several_questions_in_one_are_answered_in_one(house, answers):
    """Cryptography reads one answer only, so this asks by the structures."""
    one, other = await enrolled(house), await enrolled(house, VALVE)
    requests = [question(house, each.serial_number) for each in (one, other)]
    # SEQUENCE { SEQUENCE { SEQUENCE OF item } }: both lists joined.
    items = b"".join(_content(_content(_content(request))) for request in requests)
    both = _sequence(_sequence(_sequence(items)))
    reply = await answers.answer(both)
    assert reply.der.count(one.serial_number.to_bytes(16)) == 1
    assert reply.der.count(other.serial_number.to_bytes(16)) == 1


def _content(der: bytes) -> bytes:
    header = 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)
    return der[header:]


def _sequence(content: bytes) -> bytes:
    size = len(content)
    octets = size.to_bytes(1 if size < 0x100 else 2)
    long = bytes([0x80 + len(octets)]) + octets
    return b"\x30" + (bytes([size]) if size < 0x80 else long) + content


# Staple -------------------------------------------------------------------------


async def test_the_staple_is_there_before_anybody_connects(house, publisher):
    assert publisher.staple() is None
    await publisher.start()
    response = ocsp.load_der_ocsp_response(publisher.staple())
    assert response.certificate_status is GOOD
    server = house.own.server_certificate
    assert response.serial_number == server.serial_number
    house.clock.now += 25 * HOUR
    assert publisher.staple() is None, "a stale one would end handshakes"


async def test_a_token_that_is_away_at_start_is_no_reason_not_to_start(
    house, publisher, told
):
    house.token.away = True
    await publisher.start()
    assert publisher.staple() is None
    assert "HSM" in publisher.trouble
    running = asyncio.create_task(publisher.run())
    house.token.away = False
    await told.until("ocsp_signed", issuer="issuing")
    await told.until("crl_published", issuer="issuing")
    assert publisher.staple() is not None
    await stop(running)
    assert publisher.trouble is None


async def test_a_revocation_is_published_by_itself(house, publisher, told):
    certificate = await enrolled(house)
    running = asyncio.create_task(publisher.run())
    await told.until("crl_published", issuer="issuing", entries=0)
    for change in await revoke(house):
        publisher.changed(change)
    await told.until("crl_published", issuer="issuing", entries=1)
    assert listed(house).get_revoked_certificate_by_serial_number(
        certificate.serial_number
    )
    reply = await publisher.answer(question(house, certificate.serial_number))
    assert verified(house, reply).certificate_status is REVOKED
    await stop(running)


async def test_what_is_not_a_revocation_publishes_nothing(house, publisher, told):
    """A second connection supersedes a certificate: that is no news to a CRL."""
    running = asyncio.create_task(publisher.run())
    before = await told.until("crl_published", issuer="issuing")
    seq = await house.registry.latest_seq()
    first = await enrolled(house)
    await house.connect(first.public_bytes(Encoding.DER))
    second = await enrolled(house)
    await house.connect(second.public_bytes(Encoding.DER), times=2)
    changes = await house.registry.changes_after(seq)
    assert any(change.detail.get("state") == "superseded" for change in changes)
    for change in changes:
        publisher.changed(change)
    # The next list is the one that a revocation brings, and none was in between.
    for change in await revoke(house):
        publisher.changed(change)
    after = await told.until("crl_published", issuer="issuing", entries=2)
    assert after["number"] == before["number"] + 1
    await stop(running)


async def stop(running: asyncio.Task) -> None:
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_the_verification_of_these_tests_can_fail(house, answers):
    """The twin: an answer of another CA's responder does not pass `verified`."""
    server = house.own.server_certificate.serial_number
    reply = await answers.answer(question(house, server))
    assert verified(house, reply, "issuing")
    with pytest.raises((InvalidSignature, ValueError)):
        verified(house, reply, "factory")
