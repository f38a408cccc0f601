"""OCSP: questions from anybody, answers signed by a delegated responder (RFC 6960)."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provisioning.model.credentials import RevocationReason
from provisioning.model.errors import PeerError
from provisioning.model.ids import Serial
from provisioning.model.refusals import REQUEST_MALFORMED
from provisioning.x509 import structures
from provisioning.x509.build import ECDSA_SHA256, SIGNATURE_PART, encoded_extension

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric import ec

REQUEST_TYPE = "application/ocsp-request"
RESPONSE_TYPE = "application/ocsp-response"

MAX_OCSP_REQUEST = 4096
"""Octets of a request: some fifty certificates."""
MAX_NONCE = 128
"""Octets of a nonce (RFC 9654, 2.1)."""

_HASHES = {
    x509.ObjectIdentifier("1.3.14.3.2.26"): "sha1",
    x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1"): "sha256",
}
_NAMES = {name: oid for oid, name in _HASHES.items()}
_NONCE = x509.OCSPNonce.oid
_BASIC = x509.ObjectIdentifier("1.3.6.1.5.5.7.48.1.1")
_SUCCESSFUL = structures.tlv(b"\x0a\x01\x00")
# CRLReason (RFC 5280, 5.3.1); `unspecified` is said by saying nothing.
_REASONS = {
    RevocationReason.KEY_COMPROMISE: 1,
    RevocationReason.AFFILIATION_CHANGED: 3,
    RevocationReason.SUPERSEDED: 4,
    RevocationReason.CESSATION_OF_OPERATION: 5,
    RevocationReason.CERTIFICATE_HOLD: 6,
    RevocationReason.PRIVILEGE_WITHDRAWN: 9,
}


@dataclass(frozen=True, slots=True)
class IssuerId:
    """An issuer as requests name it: a key for finding it.

    hash_name: "sha1", "sha256", or the dotted OID of another, which matches nobody.
    """

    hash_name: str
    name_hash: bytes
    key_hash: bytes


@dataclass(frozen=True, slots=True)
class CertId:
    """A certificate as requests name it (RFC 6960, 4.1.1)."""

    issuer: IssuerId
    serial: Serial


@dataclass(frozen=True, slots=True)
class OcspQuestion:
    """What was asked: at least one item. nonce: 1 to `MAX_NONCE` octets, or None."""

    items: tuple[CertId, ...]
    nonce: bytes | None


@dataclass(frozen=True, slots=True)
class OcspStatus:
    """Good, revoked or unknown. known: whether the issuer ever issued that serial."""

    known: bool
    revoked_at: datetime | None = None
    reason: RevocationReason = RevocationReason.UNSPECIFIED


GOOD = OcspStatus(known=True)
UNKNOWN = OcspStatus(known=False)


class Responder:
    """A delegated responder, with what its answers share encoded once."""

    def __init__(self, certificate_der: bytes) -> None:
        self.certificate = x509.load_der_x509_certificate(certificate_der)
        self.certificate_part = structures.tlv(certificate_der)
        self.key_hash = _hash("sha1", _key_bits(self.certificate))


def parse_request(der: bytes) -> OcspQuestion:
    """A request as sent by anybody (RFC 6960, 4.1; RFC 9654).

    der: at most `MAX_OCSP_REQUEST` octets. A signature on it is not looked at.
    Raises PeerError(request_malformed): answer with `malformed()`.
    """
    if len(der) > MAX_OCSP_REQUEST:
        raise PeerError(REQUEST_MALFORMED, "The OCSP request is too large.")
    try:
        content = asn1.decode_der(structures.OcspRequest, der).content
        nonce = _nonce(content.extensions or [])
        items = tuple(_item(item) for item in content.items)
    except ValueError as error:
        raise PeerError(REQUEST_MALFORMED, "The OCSP request is malformed.") from error
    if content.version != 0 or not items:
        raise PeerError(REQUEST_MALFORMED, "The OCSP request asks for nothing.")
    return OcspQuestion(items, nonce)


def request_from_path(text: str) -> bytes:
    """The DER in the path of a GET, after `/ocsp/` (RFC 6960, A.1; RFC 5019, 5).

    text: URL-encoded base64, or already decoded by a proxy, padding or none.
    Raises PeerError(request_malformed).
    """
    # `+` comes as a space where somebody took the path for a form.
    compact = unquote_to_bytes(text).replace(b" ", b"+").rstrip(b"=")
    try:
        return b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except ValueError as error:
        raise PeerError(
            REQUEST_MALFORMED, "The path is no base64 of an OCSP request."
        ) from error


def issuer_ids(issuer: x509.Certificate) -> tuple[IssuerId, ...]:
    """How requests name this issuer: by SHA-1 and by SHA-256, for a look-up."""
    name, key = issuer.subject.public_bytes(), _key_bits(issuer)
    return tuple(
        IssuerId(hash_name, _hash(hash_name, name), _hash(hash_name, key))
        for hash_name in ("sha1", "sha256")
    )


def answer(  # noqa: PLR0913 - the parts of a response
    items: Sequence[tuple[CertId, OcspStatus]],
    responder: Responder,
    this_update: datetime,
    next_update: datetime,
    key: ec.EllipticCurvePrivateKey,
    *,
    nonce: bytes | None = None,
) -> bytes:
    """DER of a signed response to all items of a question (RFC 6960, 4.2).

    items: with the hash names that `issuer_ids` has. this_update: when the status was
    looked up and the response made; next_update: until when it may be repeated.
    key: the responder's; may call the token. Cryptography's builder makes responses
    to one item only, so the structure is written directly.
    """
    at = structures.generalized_time(this_update)
    until = structures.generalized_time(next_update)
    content = asn1.encode_der(
        structures.ResponseData(
            responder_key_hash=responder.key_hash,
            produced_at=at,
            responses=[
                structures.SingleResponse(
                    cert_id=_identifier(item),
                    status=_status(status),
                    this_update=at,
                    next_update=until,
                )
                for item, status in items
            ],
            extensions=[encoded_extension(x509.OCSPNonce(nonce), critical=False)]
            if nonce
            else None,
        )
    )
    basic = structures.BasicOcspResponse(
        content=structures.tlv(content),
        algorithm=SIGNATURE_PART,
        signature=asn1.BitString(key.sign(content, ECDSA_SHA256), 0),
        certificates=[responder.certificate_part],
    )
    return asn1.encode_der(
        structures.OcspResponse(
            status=_SUCCESSFUL,
            response_bytes=structures.ResponseBytes(
                response_type=_BASIC, response=asn1.encode_der(basic)
            ),
        )
    )


def malformed() -> bytes:
    """DER of `malformedRequest`; unsigned like all errors (RFC 6960, 2.3)."""
    return _error(1)


def internal() -> bytes:
    """DER of `internalError`: the responder is in an inconsistent state."""
    return _error(2)


def try_later() -> bytes:
    """DER of `tryLater`: the token is away and nothing is in store."""
    return _error(3)


def unauthorized() -> bytes:
    """DER of `unauthorized`: no issuer of ours, or not signed yet (RFC 5019, 2.2.3)."""
    return _error(6)


def _error(status: int) -> bytes:
    return bytes([0x30, 0x03, 0x0A, 0x01, status])


def _hash(name: str, octets: bytes) -> bytes:
    # It names things here and protects nothing: SHA-1 must be understood.
    return hashlib.new(name, octets, usedforsecurity=False).digest()


def _key_bits(certificate: x509.Certificate) -> bytes:
    return structures.key_bits(
        certificate.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
    )


def _item(item: structures.OcspItem) -> CertId:
    _refuse_critical(item.extensions or [])
    seen = item.cert_id
    oid = seen.hash_algorithm.oid
    serial = seen.serial
    if not 0 < serial < 1 << 160:
        message = "the serial number is none of RFC 5280"
        raise ValueError(message)
    issuer = IssuerId(
        _HASHES.get(oid, oid.dotted_string), seen.issuer_name_hash, seen.issuer_key_hash
    )
    return CertId(issuer, Serial(serial))


def _nonce(extensions: list[structures.Extension]) -> bytes | None:
    found = [e.value for e in extensions if e.oid == _NONCE]
    _refuse_critical([e for e in extensions if e.oid != _NONCE])
    if not found:
        return None
    nonce = asn1.decode_der(bytes, found[0])
    if len(found) > 1 or not 1 <= len(nonce) <= MAX_NONCE:
        message = "the nonce has not 1 to 128 octets"
        raise ValueError(message)
    return nonce


def _refuse_critical(extensions: list[structures.Extension]) -> None:
    """What is critical must be understood, and nothing else is (RFC 6960, 4.4)."""
    if any(e.critical for e in extensions):
        message = "an unknown extension is critical"
        raise ValueError(message)


def _identifier(item: CertId) -> structures.CertIdentifier:
    return structures.CertIdentifier(
        hash_algorithm=structures.Algorithm(
            oid=_NAMES[item.issuer.hash_name], parameters=asn1.Null()
        ),
        issuer_name_hash=item.issuer.name_hash,
        issuer_key_hash=item.issuer.key_hash,
        serial=item.serial.number,
    )


def _status(status: OcspStatus) -> asn1.TLV:
    """CertStatus: good [0], revoked [1], unknown [2], each implicitly tagged."""
    if status.revoked_at is not None:
        number = _REASONS.get(status.reason)
        revoked = structures.RevokedInfo(
            revoked_at=structures.generalized_time(status.revoked_at),
            reason=None
            if number is None
            else [structures.tlv(bytes([0x0A, 0x01, number]))],
        )
        return structures.tlv(b"\xa1" + asn1.encode_der(revoked)[1:])
    return structures.tlv(b"\x80\x00" if status.known else b"\x82\x00")
