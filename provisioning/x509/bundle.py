"""The trust bundle as SPIFFE writes it: anchors as a JWK set."""

from __future__ import annotations

from base64 import b64encode, urlsafe_b64encode
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Sequence

_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


def spiffe_bundle(
    anchors_der: Sequence[bytes], sequence: int, refresh_hint_s: int
) -> dict[str, object]:
    """The document at `/bundle.json` (SPIFFE Trust Domain and Bundle, 4).

    anchors_der: self-signed roots, never intermediates. sequence: grows whenever the
    anchors change. refresh_hint_s: how often consumers should look.
    Raises Unusable for an anchor whose key no JWK describes here.
    """
    return {
        "keys": [_key(x509.load_der_x509_certificate(der), der) for der in anchors_der],
        "spiffe_sequence": sequence,
        "spiffe_refresh_hint": refresh_hint_s,
    }


def _key(certificate: x509.Certificate, der: bytes) -> dict[str, object]:
    """One JWK (RFC 7517, 4; RFC 7518, 6) with exactly one certificate."""
    key = certificate.public_key()
    parameters: dict[str, object]
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        point, size = key.public_numbers(), (key.key_size + 7) // 8
        parameters = {
            "kty": "EC",
            "crv": _CURVES[key.curve.name],
            "x": _base64url(point.x, size),
            "y": _base64url(point.y, size),
        }
    elif isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        parameters = {
            "kty": "RSA",
            "n": _base64url(numbers.n, (numbers.n.bit_length() + 7) // 8),
            "e": _base64url(numbers.e, (numbers.e.bit_length() + 7) // 8),
        }
    else:
        raise Unusable(
            f"trust anchor {certificate.subject.rfc4514_string()}",
            "its key is neither EC (P-256, P-384, P-521) nor RSA",
        )
    # x5c is ordinary base64, unlike all else in a JWK (RFC 7517, 4.7).
    return parameters | {"use": "x509-svid", "x5c": [b64encode(der).decode()]}


def _base64url(number: int, size: int) -> str:
    octets = number.to_bytes(size)
    return urlsafe_b64encode(octets).rstrip(b"=").decode()
