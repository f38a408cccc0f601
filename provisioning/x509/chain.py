"""Chains of certificates: PEM and DER, in order, and their fingerprints."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_CHAIN = 16
"""Certificates in a chain that is put in order: ours have three."""


def fingerprint_sha256(der: bytes) -> str:
    """SHA-256 of a certificate's DER, lower-case hex (DESIGN: `--ca-sha256`)."""
    return hashlib.sha256(der).hexdigest()


def to_pem(certificates: Iterable[bytes]) -> bytes:
    """PEM of DER certificates, one after the other (RFC 7468, 5).

    Raises Unusable for DER that is no certificate.
    """
    return b"".join(_load(der).public_bytes(Encoding.PEM) for der in certificates)


def split_pem(pem: bytes, what: str = "certificate file") -> list[bytes]:
    """The DER certificates in PEM, in its order; other text is passed over.

    what: names the source in the error. Raises Unusable without any certificate.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise Unusable(what, "it holds no certificate in PEM") from error
    return [certificate.public_bytes(Encoding.DER) for certificate in found]


def order_chain(certificates: Sequence[bytes]) -> list[bytes]:
    """DER certificates as TLS sends them: the leaf, then each one's issuer.

    Each link's name and signature are checked; whether the end of it is trusted, and
    what is valid when, is for the verifier. Raises Unusable for what is not one chain.
    """
    if not 1 <= len(certificates) <= MAX_CHAIN:
        raise Unusable("certificate chain", f"it has not 1 to {MAX_CHAIN} members")
    rest = {bytes(der): _load(der) for der in certificates}
    leaves = [
        der
        for der, one in rest.items()
        if not any(_issued(one, other) for k, other in rest.items() if k != der)
    ]
    if len(leaves) != 1:
        raise Unusable("certificate chain", f"{len(leaves)} of it are leaves, not one")
    ordered = [leaves[0]]
    current = rest.pop(leaves[0])
    while rest:
        above = [der for der, one in rest.items() if _issued(one, current)]
        if len(above) != 1:
            raise Unusable("certificate chain", "a link of it is missing or double")
        ordered.append(above[0])
        current = rest.pop(above[0])
    return ordered


def _load(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise Unusable("certificate", f"it cannot be read: {error}") from error


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
