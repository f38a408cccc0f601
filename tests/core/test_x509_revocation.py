"""CRL and OCSP: what relying parties read, and what they may send."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from datetime import timedelta
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509 import ocsp as library
from hypothesis import given
from hypothesis import strategies as st
from software_ca import NOW, make_ca, mutated, next_serial, openssl

from provisioning.model.credentials import RevocationReason
from provisioning.model.errors import PeerError
from provisioning.model.ids import Serial
from provisioning.x509.crl import CrlEntry, crl
from provisioning.x509.ocsp import (
    GOOD,
    MAX_OCSP_REQUEST,
    UNKNOWN,
    CertId,
    OcspStatus,
    Responder,
    answer,
    internal,
    issuer_ids,
    malformed,
    parse_request,
    request_from_path,
    try_later,
    unauthorized,
)

CA = make_ca()
DEVICE = x509.load_der_x509_certificate(CA.device())
RESPONDER = Responder(CA.responder_der)
NEXT = NOW + timedelta(days=1)
SHA1 = hashes.SHA1()  # noqa: S303 - names an issuer, protects nothing
SHA256 = hashes.SHA256()


# Lists --------------------------------------------------------------------------
def make_crl(*entries: CrlEntry, number: int = 7) -> bytes:
    return crl(CA.issuing, number, NOW, NOW + timedelta(days=7), entries, CA.key)


def test_a_list_is_what_openssl_and_the_library_read(tmp_path):
    entries = [
        CrlEntry(next_serial(), NOW - timedelta(hours=1, microseconds=5), reason)
        for reason in RevocationReason
    ]
    der = make_crl(*entries)
    CA.write_pem(tmp_path)
    ask = ["crl", "-inform", "DER", "-noout", "-text", "-CAfile", "issuing.pem"]
    assert "verify OK" in openssl(*ask, cwd=tmp_path, given=der)
    seen = x509.load_der_x509_crl(der)
    assert seen.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 7
    authority = seen.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert authority.value.key_identifier == CA.issuing.key_id
    assert seen.next_update_utc == NOW + timedelta(days=7)
    for entry, listed in zip(entries, seen, strict=True):
        assert listed.serial_number == entry.serial.number
        said = [e.value.reason.value for e in listed.extensions]
        unspecified = entry.reason is RevocationReason.UNSPECIFIED
        assert said == ([] if unspecified else [entry.reason.value])


def test_an_empty_list_has_no_list_of_revoked_certificates(tmp_path):
    der = make_crl()
    shown = openssl("crl", "-inform", "DER", "-text", cwd=tmp_path, given=der)
    assert "No Revoked Certificates" in shown
    assert len(x509.load_der_x509_crl(der)) == 0


def test_a_listed_certificate_fails_and_its_twin_does_not(tmp_path):
    twin = x509.load_der_x509_certificate(CA.device())
    reason = RevocationReason.KEY_COMPROMISE
    der = make_crl(CrlEntry(Serial(twin.serial_number), NOW, reason))
    CA.write_pem(
        tmp_path,
        good=DEVICE.public_bytes(Encoding.DER),
        bad=twin.public_bytes(Encoding.DER),
    )
    (tmp_path / "issuing.crl").write_bytes(
        x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)
    )
    ask = ["verify", "-x509_strict", "-crl_check", "-CRLfile", "issuing.crl"]
    ask += ["-CAfile", "root.pem", "-untrusted", "issuing.pem"]
    assert "OK" in openssl(*ask, "good.pem", cwd=tmp_path)
    with pytest.raises(AssertionError, match="certificate revoked"):
        openssl(*ask, "bad.pem", cwd=tmp_path)


# OCSP requests ------------------------------------------------------------------
def question(
    certificate=DEVICE, algorithm=SHA1, nonce: bytes | None = None, critical=False
) -> bytes:
    builder = library.OCSPRequestBuilder().add_certificate(
        certificate, CA.issuing.certificate, algorithm
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical)
    return builder.build().public_bytes(Encoding.DER)


def refusal(der: bytes) -> str:
    with pytest.raises(PeerError) as caught:
        parse_request(der)
    return caught.value.refusal.code


@pytest.mark.parametrize("algorithm", [SHA1, SHA256], ids=lambda a: a.name)
def test_a_request_finds_its_issuer_by_either_hash(algorithm):
    asked = parse_request(question(algorithm=algorithm))
    issuers = dict.fromkeys(issuer_ids(CA.issuing.certificate), "issuing")
    issuers |= dict.fromkeys(issuer_ids(CA.root.certificate), "root")
    (item,) = asked.items
    assert issuers[item.issuer] == "issuing"
    assert item.serial.number == DEVICE.serial_number
    assert asked.nonce is None


def test_another_hash_is_understood_and_matches_nobody():
    asked = parse_request(question(algorithm=hashes.SHA512()))
    assert asked.items[0].issuer not in issuer_ids(CA.issuing.certificate)


@pytest.mark.parametrize("size", [1, 32, 128])
def test_a_nonce_of_the_rfc_is_read(size):
    assert parse_request(question(nonce=b"n" * size)).nonce == b"n" * size
    critical = question(nonce=b"n" * size, critical=True)
    assert parse_request(critical).nonce == b"n" * size


@pytest.mark.parametrize("size", [0, 129, 2000])
def test_a_nonce_of_another_length_is_malformed(size):
    assert refusal(question(nonce=b"n" * size)) == "request_malformed"


def test_a_critical_extension_that_nobody_knows_is_refused():
    def extended(*, critical: bool) -> bytes:
        return (
            library.OCSPRequestBuilder()
            .add_certificate(DEVICE, CA.issuing.certificate, SHA1)
            .add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0"),
                critical,
            )
            .build()
            .public_bytes(Encoding.DER)
        )

    assert refusal(extended(critical=True)) == "request_malformed"
    assert len(parse_request(extended(critical=False)).items) == 1


def test_size_and_trailing_octets_are_refused():
    assert refusal(question() + b"\0") == "request_malformed"
    assert refusal(b"") == "request_malformed"
    assert refusal(b"\x30" * (MAX_OCSP_REQUEST + 1)) == "request_malformed"
    # No items, and no item at all.
    assert refusal(bytes.fromhex("300430023000")) == "request_malformed"


def openssl_question(folder, *options: str) -> bytes:
    CA.write_pem(folder, device=DEVICE.public_bytes(Encoding.DER))
    ask = ["ocsp", "-issuer", "issuing.pem", "-cert", "device.pem", *options]
    openssl(*ask, "-reqout", "request", cwd=folder)
    return (folder / "request").read_bytes()


def test_a_signed_request_of_several_items_is_read(tmp_path):
    key = CA.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(key)
    signed = ["-signer", "issuing.pem", "-signkey", "key.pem"]
    several = ["-serial", "0x11", "-sha256", "-serial", "0x12"]
    der = openssl_question(tmp_path, *several, *signed)
    asked = parse_request(der)
    assert [i.serial.number for i in asked.items] == [DEVICE.serial_number, 0x11, 0x12]
    assert [i.issuer.hash_name for i in asked.items] == ["sha1", "sha1", "sha256"]
    assert asked.nonce is not None


SEEDS = [question(), question(algorithm=SHA256, nonce=b"n" * 32)]


@given(mutated(SEEDS) | st.binary(max_size=200))
def test_a_strange_request_ends_in_a_refusal_and_nothing_else(der):
    try:
        asked = parse_request(der)
    except PeerError as error:
        assert error.refusal.code == "request_malformed"  # noqa: PT017 - either is right
    else:
        assert asked.items
        assert all(0 < item.serial.number < 1 << 160 for item in asked.items)


def test_a_request_in_a_path_is_read_however_proxies_leave_it():
    # Octets that are plus signs and slashes wherever the groups of three begin.
    telling = b"\xfb\xef\xbe" * 3 + b"\0"
    der = question(nonce=telling * 3 + b"\xff" * 9)
    encoded = b64encode(der).decode()
    assert "/" in encoded
    assert "+" in encoded
    forms = [
        quote(encoded, safe=""),  # as the RFC has it
        quote(encoded, safe="/"),  # slashes decoded
        encoded,
        encoded.replace("+", " "),
        encoded.rstrip("="),
    ]
    assert {request_from_path(form) for form in forms} == {der}


@given(st.text(max_size=100))
def test_a_strange_path_ends_in_a_refusal_and_nothing_else(text):
    with suppress(PeerError):
        assert isinstance(request_from_path(text), bytes)


# OCSP answers -------------------------------------------------------------------
def ask_openssl(folder, response: bytes, *more: str, digest: str = "sha1") -> str:
    CA.write_pem(folder, device=DEVICE.public_bytes(Encoding.DER))
    (folder / "response").write_bytes(response)
    # The digest stands before the certificates that it is for.
    ask = ["ocsp", "-no_nonce", f"-{digest}", "-issuer", "issuing.pem"]
    trust = ["-CAfile", "root.pem", "-verify_other", "issuing.pem"]
    given = ["-cert", "device.pem", *more, "-respin", "response"]
    return openssl(*ask, *trust, *given, cwd=folder)


REVOKED = OcspStatus(
    known=True, revoked_at=NOW, reason=RevocationReason.CERTIFICATE_HOLD
)


@pytest.mark.parametrize("algorithm", [SHA1, SHA256], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (GOOD, ["device.pem: good"]),
        (UNKNOWN, ["device.pem: unknown"]),
        (REVOKED, ["device.pem: revoked", "Reason: certificateHold"]),
        (OcspStatus(known=True, revoked_at=NOW), ["device.pem: revoked"]),
    ],
    ids=["good", "unknown", "held", "revoked"],
)
def test_openssl_believes_the_answer(tmp_path, algorithm, status, words):
    (item,) = parse_request(question(algorithm=algorithm)).items
    der = answer([(item, status)], RESPONDER, NOW, NEXT, CA.responder_key)
    shown = ask_openssl(tmp_path, der, digest=algorithm.name)
    assert "Response verify OK" in shown
    assert all(word in shown for word in words)


def test_every_item_of_a_question_is_answered_in_one_response(tmp_path):
    several = ["-serial", "0x11", "-serial", "0x12"]
    items = parse_request(openssl_question(tmp_path, *several)).items
    statuses = [GOOD, REVOKED, UNKNOWN]
    der = answer(
        list(zip(items, statuses, strict=True)), RESPONDER, NOW, NEXT, CA.responder_key
    )
    shown = ask_openssl(tmp_path, der, *several)
    assert "Response verify OK" in shown
    for word in ("device.pem: good", "0x11: revoked", "0x12: unknown"):
        assert word in shown


def test_a_nonce_is_echoed_when_it_is_given():
    asked = parse_request(question(nonce=b"n" * 16))
    items = [(item, GOOD) for item in asked.items]
    with_nonce, without = (
        library.load_der_ocsp_response(
            answer(items, RESPONDER, NOW, NEXT, CA.responder_key, nonce=nonce)
        )
        for nonce in (asked.nonce, None)
    )
    seen = with_nonce.extensions.get_extension_for_class(x509.OCSPNonce)
    assert seen.value.nonce == b"n" * 16
    assert not list(without.extensions)


def test_the_library_reads_the_answer_as_it_was_meant():
    (item,) = parse_request(question()).items
    der = answer([(item, REVOKED)], RESPONDER, NOW, NEXT, CA.responder_key)
    seen = library.load_der_ocsp_response(der)
    assert seen.response_status is library.OCSPResponseStatus.SUCCESSFUL
    assert seen.certificate_status is library.OCSPCertStatus.REVOKED
    assert seen.revocation_reason is x509.ReasonFlags.certificate_hold
    assert seen.revocation_time_utc == NOW
    assert (seen.this_update_utc, seen.next_update_utc) == (NOW, NEXT)
    assert seen.serial_number == DEVICE.serial_number
    assert seen.certificates == [RESPONDER.certificate]
    assert seen.responder_key_hash == RESPONDER.key_hash


def test_an_answer_signed_by_another_key_is_not_believed(tmp_path):
    items = [(CertId(issuer_ids(CA.issuing.certificate)[0], next_serial()), GOOD)]
    der = answer(items, RESPONDER, NOW, NEXT, CA.key)
    with pytest.raises(AssertionError, match="Response Verify Failure"):
        ask_openssl(tmp_path, der)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (malformed(), library.OCSPResponseStatus.MALFORMED_REQUEST),
        (internal(), library.OCSPResponseStatus.INTERNAL_ERROR),
        (try_later(), library.OCSPResponseStatus.TRY_LATER),
        (unauthorized(), library.OCSPResponseStatus.UNAUTHORIZED),
    ],
    ids=lambda v: getattr(v, "name", "der"),
)
def test_errors_are_unsigned_and_read_by_the_library(error, status):
    assert library.load_der_ocsp_response(error).response_status is status


def test_a_responder_is_not_asked_about_and_signs_answers_only(tmp_path):
    extensions = RESPONDER.certificate.extensions
    assert extensions.get_extension_for_class(x509.OCSPNoCheck)
    use = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [u.dotted_string for u in use] == ["1.3.6.1.5.5.7.3.9"]
    CA.write_pem(tmp_path, responder=CA.responder_der)
    chain = ["-x509_strict", "-CAfile", "root.pem", "-untrusted", "issuing.pem"]
    purpose = ["-purpose", "ocsphelper"]
    shown = openssl("verify", *purpose, *chain, "responder.pem", cwd=tmp_path)
    assert "OK" in shown
