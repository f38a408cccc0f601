"""The device's own keys, requests and certificates, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, Serial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the agent needs to know of its own certificate. serial: as DESIGN's HEX."""

    serial: str
    not_before: datetime
    not_after: datetime
    device: str | None


def make_key_and_csr(device: DeviceId) -> tuple[bytes, bytes]:
    """A new P-256 key (PKCS#8 PEM), and its PKCS#10 request (DER) for this device."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [
        x509.NameAttribute(NameOID.SERIAL_NUMBER, device.text),
        x509.NameAttribute(NameOID.COMMON_NAME, device.text),
    ]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    request = builder.sign(key, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return key_pem, request.public_bytes(serialization.Encoding.DER)


def read_chain(chain_pem: bytes, key_pem: bytes) -> Leaf:
    """The leaf of a chain that fits the key. Raises ValueError for any other pair."""
    leaf = x509.load_pem_x509_certificates(chain_pem)[0]
    key = serialization.load_pem_private_key(key_pem, None)
    if _spki(leaf.public_key()) != _spki(key.public_key()):
        raise ValueError("the certificate is for another key")
    return Leaf(
        Serial(leaf.serial_number).hex,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
        _device_of(leaf),
    )


def chain_of(certificates: Sequence[bytes], key_pem: bytes) -> bytes:
    """The PEM chain, leaf first, from the DER certificates of an EST answer.

    Raises ValueError when none of them is for the key, or one is no certificate.
    """
    parsed = [x509.load_der_x509_certificate(der) for der in certificates]
    wanted = _spki(serialization.load_pem_private_key(key_pem, None).public_key())
    leaves = [one for one in parsed if _spki(one.public_key()) == wanted]
    if len(leaves) != 1:
        raise ValueError("the answer has no certificate for the key of this device")
    rest = [one for one in parsed if one is not leaves[0]]
    return b"".join(
        one.public_bytes(serialization.Encoding.PEM) for one in leaves + rest
    )


def device_of_chain(chain_pem: bytes) -> DeviceId | None:
    """The device a certificate names in its subject, None where that is no ID."""
    name = _device_of(x509.load_pem_x509_certificates(chain_pem)[0])
    try:
        return DeviceId.parse(name or "")
    except PeerError:
        return None


def pem_to_ders(pem: bytes) -> list[bytes]:
    """The certificates of a PEM file as DER. Raises ValueError if there is none."""
    return [
        one.public_bytes(serialization.Encoding.DER)
        for one in x509.load_pem_x509_certificates(pem)
    ]


def ders_to_pem(certificates: Sequence[bytes]) -> bytes:
    """DER certificates as one PEM file. Raises ValueError for what is none."""
    return b"".join(
        x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
        for der in certificates
    )


def beginning_of(certificates: Sequence[bytes]) -> datetime:
    """The latest notBefore of DER certificates: in the past of whoever trusts them.

    Raises ValueError for what is no certificate.
    """
    return max(
        x509.load_der_x509_certificate(der).not_valid_before_utc for der in certificates
    )


def end_of_certificate(der: bytes) -> datetime:
    """The notAfter of a certificate that TLS has verified."""
    return x509.load_der_x509_certificate(der).not_valid_after_utc


def _device_of(leaf: x509.Certificate) -> str | None:
    """The subject's serialNumber (802.1AR's place for it), else its common name."""
    for oid in (NameOID.SERIAL_NUMBER, NameOID.COMMON_NAME):
        for attribute in leaf.subject.get_attributes_for_oid(oid):
            return str(attribute.value)
    return None


def _spki(key: object) -> bytes:
    public_bytes = getattr(key, "public_bytes", None)
    if public_bytes is None:
        raise ValueError("a key of a kind that has no certificate")
    encoded: bytes = public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded
