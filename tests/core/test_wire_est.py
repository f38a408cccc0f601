"""EST bodies: what clients send, what the gateway answers, what the agent reads."""

from __future__ import annotations

from base64 import b64decode, b64encode, encodebytes

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from software_ca import make_ca, mutated, openssl

from provisioning.model.errors import PeerError
from provisioning.wire.est import (
    CSRATTRS,
    MAX_CERTIFICATES,
    MAX_CERTS_ONLY,
    certs_only,
    decode_answer,
    decode_body,
    encode_body,
    read_certs_only,
)

CA = make_ca()
LEAF = CA.device()
ISSUING = CA.issuing.certificate.public_bytes(Encoding.DER)
ROOT = CA.root.certificate.public_bytes(Encoding.DER)


# What the messages of EST have in common: DER of a SEQUENCE.
@given(st.binary(max_size=300).map(lambda octets: b"\x30" + octets))
def test_base64_is_read_with_and_without_line_breaks(der):
    assert decode_body(b64encode(der)).der == der
    assert decode_body(encodebytes(der)).der == der
    wrapped = encodebytes(der).replace(b"\n", b"\r\n ")
    assert decode_body(b"\r\n" + wrapped).was_base64
    assert decode_answer(wrapped) == der


def test_raw_der_is_read_and_noticed():
    body = decode_body(LEAF)
    assert body.der == LEAF
    assert not body.was_base64
    assert decode_answer(LEAF) == LEAF


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_an_empty_body_is_refused(body):
    with pytest.raises(PeerError) as caught:
        decode_body(body)
    assert caught.value.refusal.code == "csr_malformed"


@pytest.mark.parametrize("body", [b"MII*", b"MIIBA", b"%PDF-1.7", b"\xff\xfe", b"{}"])
def test_nonsense_is_refused_in_both_directions(body):
    with pytest.raises(PeerError) as caught:
        decode_body(body)
    assert caught.value.refusal.code == "csr_malformed"
    with pytest.raises(PeerError) as caught:
        decode_answer(body)
    assert caught.value.refusal.code == "request_malformed"


def test_pem_is_refused_with_the_reason():
    with pytest.raises(PeerError, match="without the BEGIN and END lines"):
        decode_body(b"\n-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n")


@given(st.binary(max_size=400))
def test_any_body_is_decoded_or_refused(body):
    try:
        assert decode_body(body).der
    except PeerError as error:
        assert error.refusal.code == "csr_malformed"  # noqa: PT017 - either is right


def test_answers_are_base64_without_line_breaks():
    # FACTS: strongSwan cannot read wrapped base64.
    body = encode_body(certs_only([LEAF, ISSUING, ROOT]))
    assert b"\n" not in body
    assert b64decode(body, validate=True) == certs_only([LEAF, ISSUING, ROOT])


def test_openssl_reads_the_certificates(tmp_path):
    (tmp_path / "certs").write_bytes(certs_only([ISSUING, ROOT]))
    ask = ["pkcs7", "-inform", "DER", "-in", "certs", "-print_certs", "-noout"]
    shown = openssl(*ask, cwd=tmp_path)
    assert "Test Issuing CA" in shown
    assert "Test Root" in shown


def test_what_is_written_is_read():
    assert read_certs_only(certs_only([LEAF])) == [LEAF]
    assert set(read_certs_only(certs_only([LEAF, ISSUING, ROOT]))) == {
        LEAF,
        ISSUING,
        ROOT,
    }


def test_what_openssl_writes_is_read(tmp_path):
    CA.write_pem(tmp_path, device=LEAF)
    ask = ["crl2pkcs7", "-nocrl", "-certfile", "device.pem", "-certfile", "issuing.pem"]
    openssl(*ask, "-outform", "DER", "-out", "certs", cwd=tmp_path)
    assert set(read_certs_only((tmp_path / "certs").read_bytes())) == {LEAF, ISSUING}


@pytest.mark.parametrize(
    "der",
    [
        b"",
        LEAF,
        certs_only([LEAF]) + b"\0",
        certs_only([CA.device() for _ in range(MAX_CERTIFICATES + 1)]),
        b"\x30" * (MAX_CERTS_ONLY + 1),
        # SignedData with no certificates at all.
        bytes.fromhex(
            "302306092a864886f70d010702a01630140201013100300b06092a864886f70d0107013100"
        ),
    ],
    ids=["empty", "a certificate", "trailing", "too many", "too large", "none"],
)
def test_other_messages_are_refused(der):
    with pytest.raises(PeerError) as caught:
        read_certs_only(der)
    assert caught.value.refusal.code == "request_malformed"


@given(mutated([certs_only([LEAF, ISSUING])]) | st.binary(max_size=200))
def test_a_strange_message_is_read_or_refused(der):
    try:
        assert 1 <= len(read_certs_only(der)) <= MAX_CERTIFICATES
    except PeerError as error:
        assert error.refusal.code == "request_malformed"  # noqa: PT017 - either is right


def test_csrattrs_ask_for_a_p256_key_and_sha256(tmp_path):
    shown = openssl("asn1parse", "-inform", "DER", cwd=tmp_path, given=CSRATTRS)
    for word in ("id-ecPublicKey", "prime256v1", "ecdsa-with-SHA256"):
        assert word in shown
