"""A signed certificate compared with its intention, and the facts in a peer's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.x509.oid import NameOID

from provisioning.model.errors import PeerError, Unusable
from provisioning.model.ids import DeviceId, Serial
from provisioning.model.refusals import CREDENTIAL_UNKNOWN
from provisioning.x509 import structures
from provisioning.x509.build import (
    ECDSA_SHA256,
    SIGNATURE_PART,
    is_rsa,
    own_extensions,
)

if TYPE_CHECKING:
    from datetime import datetime

    from provisioning.x509.build import Intention, Issuer

_SIGNATURE = structures.encoded(SIGNATURE_PART)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What a device certificate says; that its chain is ours TLS has verified.

    issuer_dn_der: the issuer's name, as `Issuer.name_der` has it.
    """

    device: DeviceId
    serial: Serial
    not_before: datetime
    not_after: datetime
    spki_sha256: bytes
    issuer_dn_der: bytes


def inspect(der: bytes, intention: Intention, issuer: Issuer) -> None:
    """Nothing leaves that is not what was intended, whatever the token signed.

    Compared octet by octet, which costs half of comparing objects, then read once
    more by cryptography's certificate parser, which must like all of it.
    Raises Unusable: the token or the build is broken, and the operator must look.
    """
    try:
        seen = asn1.decode_der(structures.SeenCertificate, der)
        wrong = _difference(seen, intention, issuer)
        if wrong is None:
            certificate = x509.load_der_x509_certificate(der)
            extensions = len(certificate.extensions)
            wrong = (
                "extensions"
                if extensions != len(seen.content.extensions or [])
                else None
            )
            issuer.public_key.verify(
                certificate.signature, certificate.tbs_certificate_bytes, ECDSA_SHA256
            )
    except InvalidSignature as error:
        raise Unusable(
            f"the key of the {issuer.name} CA",
            "its signature does not verify with the CA certificate; "
            "does the token hold another key under this label?",
        ) from error
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        raise Unusable(_what(intention), f"it cannot be read: {error}") from error
    if wrong is not None:
        raise Unusable(_what(intention), f"its {wrong} differs from what was intended")


def peer_facts(der: bytes) -> PeerFacts:
    """The facts in a device certificate of ours.

    Whether it is expired, revoked or known is for others to judge.
    Raises PeerError(credential_unknown) for one that names no device.
    """
    try:
        seen = asn1.decode_der(structures.SeenCertificate, der).content
        device, uri = _device(seen.subject), _uri(seen.extensions or [])
    except (ValueError, PeerError) as error:
        raise PeerError(CREDENTIAL_UNKNOWN) from error
    # Stations, operators and servers of the same issuer are not devices.
    path = f"/device/{device}"
    if (
        not 0 < seen.serial < 1 << 160
        or not uri.startswith("spiffe://")
        or not uri.endswith(path)
    ):
        raise PeerError(CREDENTIAL_UNKNOWN)
    not_before, not_after = _validity(seen)
    return PeerFacts(
        device=device,
        serial=Serial(seen.serial),
        not_before=not_before,
        not_after=not_after,
        spki_sha256=hashlib.sha256(structures.encoded(seen.public_key)).digest(),
        issuer_dn_der=structures.encoded(seen.issuer),
    )


def _what(intention: Intention) -> str:
    return f"certificate {intention.serial} of {intention.device}"


def _difference(
    certificate: structures.SeenCertificate, intention: Intention, issuer: Issuer
) -> str | None:
    """What differs first, in the words of RFC 5280; None if nothing does."""
    seen = certificate.content
    text = intention.device.text
    not_before, not_after = _validity(seen)
    extensions = [(e.oid, e.critical, e.value) for e in seen.extensions or []]
    same = {
        "version": seen.version == x509.Version.v3.value,
        "serialNumber": seen.serial == intention.serial.number,
        "signature": structures.encoded(seen.signature) == _SIGNATURE,
        "signatureAlgorithm": structures.encoded(certificate.algorithm) == _SIGNATURE,
        "signatureValue": certificate.signature.padding_bits() == 0,
        "issuer": structures.encoded(seen.issuer) == issuer.name_der,
        "notBefore": not_before == intention.not_before,
        "notAfter": not_after == intention.not_after,
        "subject": _attributes(seen.subject)
        == [(NameOID.SERIAL_NUMBER, text), (NameOID.COMMON_NAME, text)],
        "subjectPublicKeyInfo": structures.encoded(seen.public_key)
        == intention.public_key_der,
        "extensions": extensions == _intended(intention, issuer),
    }
    return next((name for name, equal in same.items() if not equal), None)


def _validity(seen: structures.SeenTbs) -> tuple[datetime, datetime]:
    return (
        structures.decode_time(seen.validity.not_before),
        structures.decode_time(seen.validity.not_after),
    )


def _intended(
    intention: Intention, issuer: Issuer
) -> list[tuple[x509.ObjectIdentifier, bool, bytes]]:
    rsa = is_rsa(intention.public_key_der)
    intended = [
        *issuer.constant_extensions(intention.profile, rsa=rsa),
        *own_extensions(intention),
    ]
    return [(e.oid, e.critical, e.value) for e in intended]


def _attributes(
    subject: list[asn1.SetOf[structures.NameAttribute]],
) -> list[tuple[x509.ObjectIdentifier, str | None]]:
    return [
        (part.oid, structures.text(part.value))
        for relative in subject
        for part in relative.as_list()
    ]


def _device(subject: list[asn1.SetOf[structures.NameAttribute]]) -> DeviceId:
    found = [t for oid, t in _attributes(subject) if oid == NameOID.SERIAL_NUMBER]
    if len(found) != 1 or found[0] is None:
        message = "not one serialNumber"
        raise ValueError(message)
    return DeviceId.parse(found[0])


def _uri(extensions: list[structures.Extension]) -> str:
    names = [
        name
        for extension in extensions
        if extension.oid == x509.SubjectAlternativeName.oid
        for name in structures.items(extension.value)
    ]
    if len(names) != 1 or names[0].tag_bytes != b"\x86":
        message = "not one URI"
        raise ValueError(message)
    return bytes(names[0].data).decode("ascii")
