"""Certification requests: parsed and checked, or refused (RFC 2986)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import (
    AttributeOID,
    ExtensionOID,
    NameOID,
    SignatureAlgorithmOID,
)

from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    CSR_MALFORMED,
    CSR_SIGNATURE,
    KEY_NOT_ALLOWED,
    NAME_NOT_ALLOWED,
)
from provisioning.x509 import structures

if TYPE_CHECKING:
    from collections.abc import Collection

    from provisioning.model.ids import DeviceId

MAX_CSR = 8192
"""Octets of DER: an RSA-4096 request with many names has 2,000."""

IpAddress = IPv4Address | IPv6Address
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_EXTENSION_REQUEST = x509.ObjectIdentifier("1.2.840.113549.1.9.14")
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}
_STRONG = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_SIGNATURES = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
    }
)
# FIPS 186-5, 5.4: 2^16 < e < 2^256. A small exponent is a sign of a broken maker, a
# large one makes each verification as dear as a signature.
_EXPONENTS = range(65537, 1 << 256, 2)


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Which keys a profile takes.

    curves: "P-256", "P-384". rsa_min_bits: None where no RSA key is taken.
    """

    curves: frozenset[str]
    rsa_min_bits: int | None
    rsa_max_bits: int = 4096


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the request asks for beside the key; the profile decides, nothing is copied.

    other_subject, other_names: there were subject attributes, or alternative names, of
    kinds that no profile has. challenge_password: as sent (RFC 7030, 3.5).
    """

    serial_numbers: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()
    other_subject: bool = False
    uris: tuple[str, ...] = ()
    dns_names: tuple[str, ...] = ()
    ip_addresses: tuple[IpAddress, ...] = ()
    other_names: bool = False
    challenge_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class VerifiedCsr:
    """A certification request whose signature fits its key, and whose key is allowed.

    Made by `verify_csr` only; holding one is the proof.
    public_key_der: SubjectPublicKeyInfo in its one canonical form, so that a point
    sent compressed is the same key. fingerprint: SHA-256 of the DER, the key of
    idempotent retries.
    """

    public_key: PublicKey = field(repr=False)
    public_key_der: bytes = field(repr=False)
    spki_sha256: bytes
    wishes: Wishes
    fingerprint: bytes
    # Holds the challengePassword: not in a repr.
    der: bytes = field(repr=False)


def verify_csr(der: bytes, rules: KeyRules) -> VerifiedCsr:
    """Parse and check a PKCS#10 request (RFC 2986).

    der: at most `MAX_CSR` octets, DER, no trailing octets.
    Raises PeerError(csr_malformed | csr_signature | key_not_allowed).
    """
    if len(der) > MAX_CSR:
        raise PeerError(CSR_MALFORMED, f"The request has more than {MAX_CSR} octets.")
    try:
        request = x509.load_der_x509_csr(der)
        info = asn1.decode_der(structures.Request, der).info
        wishes = _wishes(info)
    except (ValueError, x509.InvalidVersion) as error:
        raise PeerError(CSR_MALFORMED) from error
    key = _allowed_key(request, rules)
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if _algorithm(structures.encoded(info.public_key)) != _algorithm(spki):
        # A curve by its parameters is forbidden (RFC 5480, 2.1.1) and has been used to
        # forge; an RSA key for PSS alone would lose that mark in the certificate.
        raise PeerError(
            KEY_NOT_ALLOWED,
            "The request describes its key in an unusual way; name the curve, or use "
            "a plain RSA key.",
        )
    _check_signature(request)
    return VerifiedCsr(
        public_key=key,
        public_key_der=spki,
        spki_sha256=hashlib.sha256(spki).digest(),
        wishes=wishes,
        fingerprint=hashlib.sha256(der).digest(),
        der=der,
    )


def check_names(
    wishes: Wishes,
    device: DeviceId,
    uri: str,
    *,
    dns_names: Collection[str] = (),
    ip_addresses: Collection[IpAddress] = (),
) -> None:
    """Refuse a request that names something else than its device (RFC 7030, 4.2.2).

    Names that it leaves out are filled in by the builder. Compared octet by octet.
    uri: the device's SPIFFE ID. dns_names, ip_addresses: what else it may name.
    Raises PeerError(name_not_allowed).
    """
    allowed = {device.text}
    wrong = None
    if wishes.other_subject:
        wrong = "subject attributes other than serialNumber and commonName"
    elif not allowed.issuperset(wishes.serial_numbers):
        wrong = "a serialNumber that is not the device ID"
    elif not allowed.issuperset(wishes.common_names):
        wrong = "a commonName that is not the device ID"
    elif not {uri}.issuperset(wishes.uris):
        wrong = "a URI that is not the device's SPIFFE ID"
    elif not set(dns_names).issuperset(wishes.dns_names):
        wrong = "DNS names"
    elif not set(ip_addresses).issuperset(wishes.ip_addresses):
        wrong = "IP addresses"
    elif wishes.other_names:
        wrong = "alternative names of a kind that the profile does not have"
    if wrong is not None:
        raise PeerError(
            NAME_NOT_ALLOWED,
            f"The request of {device} has {wrong}; leave them out, or give the "
            "device's own.",
        )


def _algorithm(spki: bytes) -> bytes:
    return structures.encoded(asn1.decode_der(structures.PublicKeyInfo, spki).algorithm)


def _allowed_key(request: x509.CertificateSigningRequest, rules: KeyRules) -> PublicKey:
    try:
        key = request.public_key()
    except UnsupportedAlgorithm as error:
        raise PeerError(KEY_NOT_ALLOWED) from error
    except ValueError as error:
        # Explicit curve parameters and points off the curve end here, too.
        raise PeerError(
            KEY_NOT_ALLOWED, "The request's key cannot be read; make a P-256 key."
        ) from error
    if isinstance(key, ec.EllipticCurvePublicKey):
        if _CURVES.get(key.curve.name) in rules.curves:
            return key
    elif isinstance(key, rsa.RSAPublicKey) and rules.rsa_min_bits is not None:
        numbers = key.public_numbers()
        if (
            rules.rsa_min_bits <= key.key_size <= rules.rsa_max_bits
            and numbers.e in _EXPONENTS
            and numbers.n % 2 == 1
        ):
            return key
    raise PeerError(KEY_NOT_ALLOWED)


def _check_signature(request: x509.CertificateSigningRequest) -> None:
    algorithm = request.signature_algorithm_oid
    try:
        strong = algorithm in _SIGNATURES or (
            algorithm == SignatureAlgorithmOID.RSASSA_PSS and _strong_pss(request)
        )
        if strong and request.is_signature_valid:
            return
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PeerError(CSR_SIGNATURE) from error
    raise PeerError(CSR_SIGNATURE)


def _strong_pss(request: x509.CertificateSigningRequest) -> bool:
    # It names its hashes in parameters, whose default is SHA-1 (RFC 4055, 3.1).
    parameters = request.signature_algorithm_parameters
    return (
        isinstance(parameters, padding.PSS)
        and isinstance(request.signature_hash_algorithm, _STRONG)
        and isinstance(
            parameters.mgf._algorithm,  # noqa: SLF001 - it has no public name
            _STRONG,
        )
    )


def _wishes(info: structures.RequestInfo) -> Wishes:
    names: dict[x509.ObjectIdentifier, list[str]] = {
        NameOID.SERIAL_NUMBER: [],
        NameOID.COMMON_NAME: [],
    }
    other_subject = False
    for relative in info.subject:
        for part in relative.as_list():
            value = structures.text(part.value)
            if value is None or part.oid not in names:
                other_subject = True
            else:
                names[part.oid].append(value)
    single = _single_attributes(info.attributes.as_list())
    password = single.get(AttributeOID.CHALLENGE_PASSWORD)
    requested = single.get(_EXTENSION_REQUEST)
    alternative = _alternative_names(requested) if requested else []
    uris, dns_names, addresses, other_names = _sorted_names(alternative)
    return Wishes(
        serial_numbers=tuple(names[NameOID.SERIAL_NUMBER]),
        common_names=tuple(names[NameOID.COMMON_NAME]),
        other_subject=other_subject,
        uris=uris,
        dns_names=dns_names,
        ip_addresses=addresses,
        other_names=other_names,
        challenge_password=_password(password) if password else None,
    )


def _single_attributes(
    attributes: list[structures.Attribute],
) -> dict[x509.ObjectIdentifier, asn1.TLV]:
    # Each may come once, with one value: a second, which others would read, must not
    # slip past.
    single = {}
    for attribute in attributes:
        if attribute.oid in {AttributeOID.CHALLENGE_PASSWORD, _EXTENSION_REQUEST}:
            values = attribute.values.as_list()
            if len(values) != 1 or attribute.oid in single:
                message = "an attribute that must be single is not"
                raise ValueError(message)
            single[attribute.oid] = values[0]
    return single


def _password(value: asn1.TLV) -> str:
    password = structures.text(value)
    if password is None:
        message = "the challengePassword is of an unknown string type"
        raise ValueError(message)
    return password


def _alternative_names(requested: asn1.TLV) -> list[asn1.TLV]:
    found = [
        extension
        for extension in structures.extensions(structures.encoded(requested))
        if extension.oid == ExtensionOID.SUBJECT_ALTERNATIVE_NAME
    ]
    if len(found) > 1:
        message = "two subjectAltName extensions"
        raise ValueError(message)
    return structures.items(found[0].value) if found else []


def _sorted_names(
    names: list[asn1.TLV],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[IpAddress, ...], bool]:
    """GeneralNames by kind (RFC 5280, 4.2.1.6): the tag says which."""
    uris: list[str] = []
    dns_names: list[str] = []
    addresses: list[IpAddress] = []
    other = False
    for name in names:
        content = bytes(name.data)
        match name.tag_bytes:
            case b"\x86":
                uris.append(content.decode("ascii"))
            case b"\x82":
                dns_names.append(content.decode("ascii"))
            case b"\x87":
                addresses.append(ip_address(content))
            case _:
                other = True
    return tuple(uris), tuple(dns_names), tuple(addresses), other
