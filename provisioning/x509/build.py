"""Certificates: built from an intention and signed with a key that may be a token's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509.oid import (
    AuthorityInformationAccessOID,
    ExtendedKeyUsageOID,
    NameOID,
    SignatureAlgorithmOID,
)

from provisioning.x509 import structures
from provisioning.x509.profiles import NO_END

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from provisioning.model.ids import DeviceId, Serial, TrustDomain
    from provisioning.x509.profiles import Profile

ALGORITHM = structures.Algorithm(
    oid=SignatureAlgorithmOID.ECDSA_WITH_SHA256, parameters=None
)
SIGNATURE_PART = structures.tlv(asn1.encode_der(ALGORITHM))
ECDSA_SHA256 = ec.ECDSA(hashes.SHA256())
# Every SubjectPublicKeyInfo of an RSA key begins its algorithm with this (RFC 3279).
_RSA = bytes.fromhex("300d06092a864886f70d010101")


@dataclass(frozen=True, slots=True)
class Urls:
    """Where what one issuer publishes is found, by `http:` (RFC 5280, 4.2.2.1)."""

    ocsp: str
    crl: str
    issuer: str


@dataclass(frozen=True, slots=True)
class Intention:
    """A device certificate as it is to be: recorded before anybody signs.

    public_key_der: SubjectPublicKeyInfo, as `VerifiedCsr` has it.
    """

    device: DeviceId
    domain: TrustDomain
    serial: Serial
    profile: Profile
    not_before: datetime
    not_after: datetime
    public_key_der: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Term:
    """Serial number and validity of a certificate that no `Intention` describes.

    Whole seconds; not_after: `NO_END` for none.
    """

    serial: Serial
    not_before: datetime
    not_after: datetime = NO_END


class Issuer:
    """A CA that signs, with everything encoded once that its certificates share.

    Raises ValueError for a certificate without a subject key identifier.
    """

    def __init__(self, name: str, certificate: x509.Certificate, urls: Urls) -> None:
        self.name = name
        self.certificate = certificate
        self.urls = urls
        self.subject = certificate.subject
        self.name_der = certificate.subject.public_bytes()
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            message = f"the CA {name} has no EC key"
            raise TypeError(message)
        self.public_key = key
        self.not_after = certificate.not_valid_after_utc
        self.key_id = _subject_key_id(certificate)
        self.authority_key_id = x509.AuthorityKeyIdentifier(self.key_id, None, None)
        self.links: tuple[x509.ExtensionType, ...] = (
            self.authority_key_id,
            x509.AuthorityInformationAccess(
                [
                    _access(AuthorityInformationAccessOID.OCSP, urls.ocsp),
                    _access(AuthorityInformationAccessOID.CA_ISSUERS, urls.issuer),
                ]
            ),
            x509.CRLDistributionPoints(
                [
                    x509.DistributionPoint(
                        [x509.UniformResourceIdentifier(urls.crl)], None, None, None
                    )
                ]
            ),
        )
        self.name_part = structures.tlv(self.name_der)
        self._constant: dict[tuple[bool, bool, bool], list[structures.Extension]] = {}

    def constant_extensions(
        self, profile: Profile, *, rsa: bool
    ) -> list[structures.Extension]:
        """What all leaves of one use and kind of key share, ready-made."""
        kind = (profile.client_auth, profile.server_auth, rsa)
        if kind not in self._constant:
            self._constant[kind] = [
                encoded_extension(value, critical=critical)
                for value, critical in (
                    (x509.BasicConstraints(ca=False, path_length=None), True),
                    (leaf_key_usage(rsa=rsa), True),
                    (x509.ExtendedKeyUsage(uses(profile)), False),
                    *((value, False) for value in self.links),
                )
            ]
        return self._constant[kind]


def device_certificate(
    intention: Intention, issuer: Issuer, key: ec.EllipticCurvePrivateKey
) -> bytes:
    """DER of a device's certificate (RFC 5280, IEEE 802.1AR, SPIFFE X.509-SVID).

    key: of the issuer; its `sign` may call the token, so run this on the token's
    thread. The hot path: the constant parts are spliced in as DER, which costs 35 µs
    where cryptography's builder takes 100. `inspect` reads the result with another
    parser before anybody gets it.
    """
    spki = intention.public_key_der
    content = asn1.encode_der(
        structures.TbsCertificate(
            version=2,
            serial=intention.serial.number,
            signature=ALGORITHM,
            issuer=issuer.name_part,
            validity=structures.Validity(
                not_before=structures.encode_time(intention.not_before),
                not_after=structures.encode_time(intention.not_after),
            ),
            subject=_device_subject(intention.device.text),
            public_key=structures.tlv(spki),
            extensions=issuer.constant_extensions(intention.profile, rsa=is_rsa(spki))
            + own_extensions(intention),
        )
    )
    return signed(content, key)


def own_extensions(intention: Intention) -> list[structures.Extension]:
    """What is this certificate's alone: its key's identifier and its SPIFFE ID."""
    uri = intention.domain.device(intention.device)
    return [
        encoded_extension(value, critical=False)
        for value in (
            x509.SubjectKeyIdentifier(key_identifier(intention.public_key_der)),
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]),
        )
    ]


def signed(content: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """DER of a signed structure of RFC 5280: content, ecdsa-with-SHA256, signature.

    key: P-256; the builders of cryptography are used for all that is not hot.
    """
    return asn1.encode_der(
        structures.Signed(
            content=structures.tlv(content),
            algorithm=SIGNATURE_PART,
            signature=asn1.BitString(key.sign(content, ECDSA_SHA256), 0),
        )
    )


def encoded_extension(
    value: x509.ExtensionType, *, critical: bool
) -> structures.Extension:
    """An extension as DER inside."""
    return structures.Extension(
        oid=value.oid, critical=critical, value=value.public_bytes()
    )


def root_certificate(
    name: x509.Name, key: ec.EllipticCurvePrivateKey, term: Term
) -> bytes:
    """DER of a self-signed trust anchor (RFC 5280, 3.2). key: its own."""
    public_key = key.public_key()
    extensions = _ca_extensions(public_key, path_length=None)
    return _sign(_builder(name, public_key, term), name, extensions, key)


def ca_certificate(  # noqa: PLR0913 - who, by whom, for how long
    name: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    term: Term,
    issuer: Issuer,
    key: ec.EllipticCurvePrivateKey,
    *,
    path_length: int = 0,
) -> bytes:
    """DER of a CA below `issuer`, whose key is given.

    path_length: how many CAs may follow below it (RFC 5280, 4.2.1.9).
    """
    extensions = [
        *_ca_extensions(public_key, path_length=path_length),
        *((value, False) for value in issuer.links),
    ]
    return _sign(_builder(name, public_key, term), issuer.subject, extensions, key)


def server_certificate(
    hosts: Sequence[str],
    public_key_der: bytes,
    term: Term,
    issuer: Issuer,
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """DER of a TLS server's certificate; its names only in the SAN (RFC 9525).

    hosts: DNS names (international ones as A-labels) and IP addresses, at least one.
    Raises ValueError for a name that a certificate cannot carry.
    """
    public_key = _public_key(public_key_der)
    extensions = [
        *_leaf_extensions(public_key_der, ExtendedKeyUsageOID.SERVER_AUTH),
        *((value, False) for value in issuer.links),
        # Critical since the subject is empty (RFC 5280, 4.2.1.6).
        (x509.SubjectAlternativeName([host_name(host) for host in hosts]), True),
    ]
    nobody = x509.Name([])
    return _sign(_builder(nobody, public_key, term), issuer.subject, extensions, key)


def responder_certificate(
    name: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    term: Term,
    issuer: Issuer,
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """DER of a delegated OCSP responder's certificate (RFC 6960, 4.2.2.2).

    Short-lived: `ocsp-nocheck` says that nobody asks whether it is revoked, so it
    names no place to ask.
    """
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    extensions = [
        *_leaf_extensions(spki, ExtendedKeyUsageOID.OCSP_SIGNING),
        (issuer.authority_key_id, False),
        (x509.OCSPNoCheck(), False),
    ]
    return _sign(_builder(name, public_key, term), issuer.subject, extensions, key)


def ca_name(common_name: str, organization: str | None = None) -> x509.Name:
    """O, then CN. Raises ValueError for what is empty or over 64 octets."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization:
        attributes.insert(
            0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)
        )
    return x509.Name(attributes)


def host_name(host: str) -> x509.GeneralName:
    """An IP address as `iPAddress`, anything else as `dNSName` (RFC 9525, 6.2)."""
    try:
        return x509.IPAddress(ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def key_identifier(spki: bytes) -> bytes:
    """Leftmost 160 bits of the key's SHA-256 (RFC 7093, 2): no SHA-1 of ours."""
    return hashlib.sha256(structures.key_bits(spki)).digest()[:20]


def is_rsa(spki: bytes) -> bool:
    """Whether a SubjectPublicKeyInfo is of an RSA key."""
    return _RSA in spki[:32]


def leaf_key_usage(*, rsa: bool) -> x509.KeyUsage:
    """digitalSignature; keyEncipherment too where RSA key transport may be met."""
    return _key_usage(digital_signature=True, key_encipherment=rsa)


def uses(profile: Profile) -> list[x509.ObjectIdentifier]:
    """The extended key usages of a profile."""
    client = [ExtendedKeyUsageOID.CLIENT_AUTH] if profile.client_auth else []
    server = [ExtendedKeyUsageOID.SERVER_AUTH] if profile.server_auth else []
    return client + server


def _device_subject(text: str) -> structures.DeviceSubject:
    return structures.DeviceSubject(
        serial_number=asn1.SetOf(
            [
                structures.PrintableAttribute(
                    oid=NameOID.SERIAL_NUMBER, value=asn1.PrintableString(text)
                )
            ]
        ),
        common_name=asn1.SetOf(
            [structures.Utf8Attribute(oid=NameOID.COMMON_NAME, value=text)]
        ),
    )


def _subject_key_id(certificate: x509.Certificate) -> bytes:
    try:
        found = certificate.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        )
    except x509.ExtensionNotFound as error:
        message = "a CA certificate needs a subject key identifier"
        raise ValueError(message) from error
    return found.value.digest


def _access(method: x509.ObjectIdentifier, url: str) -> x509.AccessDescription:
    return x509.AccessDescription(method, x509.UniformResourceIdentifier(url))


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    signs_certificates: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _ca_extensions(
    public_key: ec.EllipticCurvePublicKey, path_length: int | None
) -> list[tuple[x509.ExtensionType, bool]]:
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return [
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (_key_usage(signs_certificates=True), True),
        (x509.SubjectKeyIdentifier(key_identifier(spki)), False),
    ]


def _leaf_extensions(
    spki: bytes, use: x509.ObjectIdentifier
) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (leaf_key_usage(rsa=is_rsa(spki)), True),
        (x509.ExtendedKeyUsage([use]), False),
        (x509.SubjectKeyIdentifier(key_identifier(spki)), False),
    ]


def _public_key(der: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    key = load_der_public_key(der)
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        message = "a server's key is EC or RSA"
        raise TypeError(message)
    return key


def _builder(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    term: Term,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(term.serial.number)
        .not_valid_before(term.not_before)
        .not_valid_after(term.not_after)
    )


def _sign(
    builder: x509.CertificateBuilder,
    issuer: x509.Name,
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    builder = builder.issuer_name(issuer)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
