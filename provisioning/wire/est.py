"""EST bodies, both directions, without HTTP or CoAP (RFC 7030, 8951, 9908, 9148)."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from provisioning.model.errors import PeerError
from provisioning.model.refusals import CSR_MALFORMED, REQUEST_MALFORMED

if TYPE_CHECKING:
    from collections.abc import Sequence

PKCS10_TYPE = "application/pkcs10"
CERTS_ONLY_TYPE = "application/pkcs7-mime; smime-type=certs-only"
CSRATTRS_TYPE = "application/csrattrs"
CERTIFICATE_TYPE = "application/pkix-cert"

# Content formats of CoAP (RFC 9148, 4.3): the same messages, binary.
COAP_PKCS10 = 286
COAP_CERTS_ONLY = 281
COAP_CERTIFICATE = 287
COAP_CSRATTRS = 285

CSRATTRS = bytes.fromhex(
    "3021"
    # id-ecPublicKey with the one value prime256v1
    "301506072a8648ce3d0201310a06082a8648ce3d030107"
    # ecdsa-with-SHA256
    "06082a8648ce3d040302"
)
"""DER of CsrAttrs: a P-256 key, signed with SHA-256 (RFC 7030, 4.5.2; RFC 9908)."""

MAX_CERTS_ONLY = 65_536
"""Octets of a certs-only answer that the agent reads: some hundred certificates."""
MAX_CERTIFICATES = 32

_WHITE_SPACE = b" \t\r\n\v\f"
_SEQUENCE = 0x30


_Oid = x509.ObjectIdentifier
_SIGNED_DATA = _Oid("1.2.840.113549.1.7.2")


@asn1.sequence
class _SignedData:
    """SignedData without signers (RFC 5652, 5.1)."""

    version: int
    digest_algorithms: asn1.TLV
    content: asn1.TLV
    # A SET OF, read as a list: others do not sort theirs.
    certificates: Annotated[list[asn1.TLV] | None, asn1.Implicit(0)]
    crls: Annotated[list[asn1.TLV] | None, asn1.Implicit(1)]
    signers: asn1.TLV


@asn1.sequence
class _ContentInfo:
    content_type: _Oid
    content: Annotated[_SignedData, asn1.Explicit(0)]


@dataclass(frozen=True, slots=True)
class DecodedBody:
    """A request's DER; was_base64: False for clients that err (and are served)."""

    der: bytes
    was_base64: bool


def decode_body(body: bytes) -> DecodedBody:
    """The DER in a request's body.

    Always base64 by RFC 8951, line breaks and white space allowed; many clients send
    raw DER, told by its first octet, which no base64 of DER has ("M" begins it).
    Linear in the size, which the caller limits. Raises PeerError(csr_malformed).
    """
    if body[:1] == bytes([_SEQUENCE]):
        return DecodedBody(body, was_base64=False)
    if body.lstrip(_WHITE_SPACE).startswith(b"-----BEGIN"):
        raise PeerError(
            CSR_MALFORMED,
            "The body is PEM; send its base64 without the BEGIN and END lines.",
        )
    return DecodedBody(_from_base64(body, CSR_MALFORMED.sentence), was_base64=True)


def encode_body(der: bytes) -> bytes:
    """Base64 without line breaks: strongSwan cannot read them (FACTS)."""
    return b64encode(der)


def decode_answer(body: bytes) -> bytes:
    """The DER in a server's answer, read by the same tolerant rules.

    Raises PeerError(request_malformed).
    """
    if body[:1] == bytes([_SEQUENCE]):
        return body
    try:
        return _from_base64(body, "")
    except PeerError as error:
        raise PeerError(
            REQUEST_MALFORMED, "The answer is neither base64 nor DER."
        ) from error


def certs_only(certificates: Sequence[bytes]) -> bytes:
    """DER of a degenerate PKCS#7 SignedData (RFC 5652, 5; RFC 7030, 4.1.3).

    certificates: DER, at least one, which are ours: ValueError for any other.
    """
    loaded = [x509.load_der_x509_certificate(der) for der in certificates]
    return pkcs7.serialize_certificates(loaded, Encoding.DER)


def read_certs_only(der: bytes) -> list[bytes]:
    """The certificates' DER in a certs-only message, in its order (RFC 7030, 4.2.3).

    der: at most `MAX_CERTS_ONLY` octets with 1 to `MAX_CERTIFICATES` certificates,
    none of which is looked into. Raises PeerError(request_malformed).
    """
    if len(der) > MAX_CERTS_ONLY:
        raise PeerError(REQUEST_MALFORMED, "The message has too many octets.")
    try:
        message = asn1.decode_der(_ContentInfo, der)
    except ValueError as error:
        raise PeerError(
            REQUEST_MALFORMED, "The message is no PKCS#7 of certificates."
        ) from error
    found = message.content.certificates or []
    if message.content_type != _SIGNED_DATA or not (
        1 <= len(found) <= MAX_CERTIFICATES
        and all(one.tag_bytes == bytes([_SEQUENCE]) for one in found)
    ):
        raise PeerError(
            REQUEST_MALFORMED,
            f"The message has not 1 to {MAX_CERTIFICATES} certificates.",
        )
    return [asn1.encode_der(one) for one in found]


def _from_base64(body: bytes, detail: str) -> bytes:
    compact = body.translate(None, delete=_WHITE_SPACE)
    try:
        der = b64decode(compact, validate=True)
    except ValueError as error:
        raise PeerError(CSR_MALFORMED, detail) from error
    if not der:
        raise PeerError(CSR_MALFORMED, "The body is empty.")
    return der
