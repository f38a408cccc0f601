"""ASN.1 of RFC 5280, 2986 and 6960 where cryptography's own types do not fit.

Declared, not parsed by hand: cryptography's DER codec (`hazmat.asn1`) reads and writes
them. It is used where the builders and loaders cannot do what is asked: several items
in one OCSP message, certificates made from parts that are encoded once, and names of
strangers, at which cryptography's `Name` warns (on the console of the process) instead
of refusing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from cryptography import x509
from cryptography.hazmat import asn1

Oid = x509.ObjectIdentifier


@asn1.sequence
class Algorithm:
    """AlgorithmIdentifier whose parameters are absent or NULL."""

    oid: Oid
    parameters: asn1.Null | None


@asn1.sequence
class Extension:
    oid: Oid
    critical: Annotated[bool, asn1.Default(value=False)]
    value: bytes


@asn1.sequence
class NameAttribute:
    """AttributeTypeAndValue with a value of any string type."""

    oid: Oid
    value: asn1.TLV


@asn1.sequence
class PrintableAttribute:
    oid: Oid
    value: asn1.PrintableString


@asn1.sequence
class Utf8Attribute:
    oid: Oid
    value: str


@asn1.sequence
class Validity:
    not_before: asn1.UTCTime | asn1.GeneralizedTime
    not_after: asn1.UTCTime | asn1.GeneralizedTime


@asn1.sequence
class DeviceSubject:
    """serialNumber, then CN, each in a set of its own (DESIGN, names and states)."""

    serial_number: asn1.SetOf[PrintableAttribute]
    common_name: asn1.SetOf[Utf8Attribute]


@asn1.sequence
class TbsCertificate:
    """What is signed, its names and key as ready-made DER (RFC 5280, 4.1)."""

    version: Annotated[int, asn1.Explicit(0)]
    serial: int
    signature: Algorithm
    issuer: asn1.TLV
    validity: Validity
    subject: DeviceSubject
    public_key: asn1.TLV
    extensions: Annotated[list[Extension], asn1.Explicit(3)]


@asn1.sequence
class Signed:
    """Certificate and list alike: what is signed, by what, the signature."""

    content: asn1.TLV
    algorithm: asn1.TLV
    signature: asn1.BitString


@asn1.sequence
class PublicKeyInfo:
    algorithm: asn1.TLV
    key: asn1.BitString


@asn1.sequence
class SeenTbs:
    """A stranger's TBSCertificate, as far as `peer_facts` looks at it."""

    version: Annotated[int, asn1.Explicit(0), asn1.Default(value=0)]
    serial: int
    signature: asn1.TLV
    issuer: asn1.TLV
    validity: Validity
    subject: list[asn1.SetOf[NameAttribute]]
    public_key: asn1.TLV
    issuer_id: Annotated[asn1.BitString | None, asn1.Implicit(1)]
    subject_id: Annotated[asn1.BitString | None, asn1.Implicit(2)]
    extensions: Annotated[list[Extension] | None, asn1.Explicit(3)]


@asn1.sequence
class SeenCertificate:
    content: SeenTbs
    algorithm: asn1.TLV
    signature: asn1.BitString


@asn1.sequence
class Attribute:
    """Attribute of a request (RFC 2986, 4.1)."""

    oid: Oid
    values: asn1.SetOf[asn1.TLV]


@asn1.sequence
class RequestInfo:
    """CertificationRequestInfo (RFC 2986, 4.1)."""

    version: int
    subject: list[asn1.SetOf[NameAttribute]]
    public_key: asn1.TLV
    attributes: Annotated[asn1.SetOf[Attribute], asn1.Implicit(0)]


@asn1.sequence
class Request:
    """CertificationRequest (RFC 2986, 4.2)."""

    info: RequestInfo
    algorithm: asn1.TLV
    signature: asn1.BitString


@asn1.sequence
class RevokedCertificate:
    """An entry of a list (RFC 5280, 5.1)."""

    serial: int
    revoked_at: asn1.UTCTime | asn1.GeneralizedTime
    extensions: list[Extension] | None


@asn1.sequence
class TbsCertList:
    """What is signed of a CRL (RFC 5280, 5.1.2)."""

    version: int
    signature: Algorithm
    issuer: asn1.TLV
    this_update: asn1.UTCTime | asn1.GeneralizedTime
    next_update: asn1.UTCTime | asn1.GeneralizedTime
    revoked: list[RevokedCertificate] | None
    extensions: Annotated[list[Extension], asn1.Explicit(0)]


@asn1.sequence
class CertIdentifier:
    """CertID (RFC 6960, 4.1.1)."""

    hash_algorithm: Algorithm
    issuer_name_hash: bytes
    issuer_key_hash: bytes
    serial: int


@asn1.sequence
class OcspItem:
    """Request, in the RFC's words (RFC 6960, 4.1.1)."""

    cert_id: CertIdentifier
    extensions: Annotated[list[Extension] | None, asn1.Explicit(0)]


@asn1.sequence
class TbsOcspRequest:
    version: Annotated[int, asn1.Explicit(0), asn1.Default(0)]
    # An explicit tag around one value of any type, which nobody here reads: the codec
    # has no optional "any", and these are the same octets.
    requestor: Annotated[list[asn1.TLV] | None, asn1.Implicit(1)]
    items: list[OcspItem]
    extensions: Annotated[list[Extension] | None, asn1.Explicit(2)]


@asn1.sequence
class OcspRequest:
    content: TbsOcspRequest
    signature: Annotated[list[asn1.TLV] | None, asn1.Implicit(0)]


@asn1.sequence
class RevokedInfo:
    revoked_at: asn1.GeneralizedTime
    # An ENUMERATED in an explicit tag, which the codec has not: see `requestor`.
    reason: Annotated[list[asn1.TLV] | None, asn1.Implicit(0)]


@asn1.sequence
class SingleResponse:
    """One certificate's status (RFC 6960, 4.2.1)."""

    cert_id: CertIdentifier
    status: asn1.TLV
    this_update: asn1.GeneralizedTime
    next_update: Annotated[asn1.GeneralizedTime, asn1.Explicit(0)]


@asn1.sequence
class ResponseData:
    """What is signed of an OCSP response; the responder is named by key."""

    responder_key_hash: Annotated[bytes, asn1.Explicit(2)]
    produced_at: asn1.GeneralizedTime
    responses: list[SingleResponse]
    extensions: Annotated[list[Extension] | None, asn1.Explicit(1)]


@asn1.sequence
class BasicOcspResponse:
    content: asn1.TLV
    algorithm: asn1.TLV
    signature: asn1.BitString
    certificates: Annotated[list[asn1.TLV], asn1.Explicit(0)]


@asn1.sequence
class ResponseBytes:
    response_type: Oid
    response: bytes


@asn1.sequence
class OcspResponse:
    status: asn1.TLV
    response_bytes: Annotated[ResponseBytes, asn1.Explicit(0)]


@asn1.sequence
class _Items:
    items: list[asn1.TLV]


@asn1.sequence
class _Extensions:
    items: list[Extension]


@asn1.sequence
class _Holder:
    inner: asn1.TLV


def tlv(der: bytes) -> asn1.TLV:
    """DER that exists already, as a part of something larger. Raises ValueError."""
    return asn1.decode_der(asn1.TLV, der)


def _hold(der: bytes) -> bytes:
    # The codec takes no bare SEQUENCE OF: put it into a sequence as its one member.
    return asn1.encode_der(_Holder(inner=tlv(der)))


def items(der: bytes) -> list[asn1.TLV]:
    """The members of a SEQUENCE OF anything. Raises ValueError."""
    return asn1.decode_der(_Items, _hold(der)).items


def extensions(der: bytes) -> list[Extension]:
    """The members of an Extensions. Raises ValueError."""
    return asn1.decode_der(_Extensions, _hold(der)).items


def encoded(value: asn1.TLV) -> bytes:
    """The whole DER of a part, tag and length included."""
    return asn1.encode_der(value)


def encode_time(at: datetime) -> asn1.UTCTime | asn1.GeneralizedTime:
    """UTCTime up to 2049, GeneralizedTime from 2050, whole seconds (RFC 5280, 4.1.2.5).

    at: aware.
    """
    if at.year < 2050:  # noqa: PLR2004 - the RFC's year
        return asn1.UTCTime(at.astimezone(UTC).replace(microsecond=0))
    return generalized_time(at)


def generalized_time(at: datetime) -> asn1.GeneralizedTime:
    """GeneralizedTime without fractional seconds. at: aware."""
    return asn1.GeneralizedTime(at.astimezone(UTC).replace(microsecond=0))


def decode_time(at: asn1.UTCTime | asn1.GeneralizedTime) -> datetime:
    """An aware time, UTC."""
    return at.as_datetime().astimezone(UTC)


def text(value: asn1.TLV) -> str | None:
    """A name's or attribute's text; None for string types nobody need use.

    UTF8String, PrintableString, IA5String. Raises ValueError for broken text.
    """
    match value.tag_bytes:
        case b"\x0c":
            return bytes(value.data).decode("utf-8")
        case b"\x13" | b"\x16":
            return bytes(value.data).decode("ascii")
        case _:
            return None


def key_bits(spki: bytes) -> bytes:
    """The subjectPublicKey's octets: what key identifiers and OCSP hash.

    Raises ValueError.
    """
    return asn1.decode_der(PublicKeyInfo, spki).key.as_bytes()
