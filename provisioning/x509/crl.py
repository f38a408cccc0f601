"""Certificate revocation lists, version 2, complete (RFC 5280, 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat import asn1

from provisioning.model.credentials import RevocationReason
from provisioning.x509 import structures
from provisioning.x509.build import ALGORITHM, encoded_extension, signed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.model.ids import Serial
    from provisioning.x509.build import Issuer

CRL_TYPE = "application/pkix-crl"


@dataclass(frozen=True, slots=True)
class CrlEntry:
    """One revoked certificate. revoked_at: aware; its microseconds are dropped."""

    serial: Serial
    revoked_at: datetime
    reason: RevocationReason


# `unspecified` should be said by saying nothing (RFC 5280, 5.3.1).
_REASONS: dict[RevocationReason, list[structures.Extension] | None] = {
    reason: [
        encoded_extension(x509.CRLReason(x509.ReasonFlags(reason)), critical=False)
    ]
    for reason in RevocationReason
    if reason is not RevocationReason.UNSPECIFIED
} | {RevocationReason.UNSPECIFIED: None}


def crl(  # noqa: PLR0913, PLR0917 - the parts of a list, in its order
    issuer: Issuer,
    number: int,
    this_update: datetime,
    next_update: datetime,
    entries: Iterable[CrlEntry],
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """DER of a complete list of one issuer.

    number: grows with every list of this issuer, at most 20 octets (RFC 5280, 5.2.3).
    key: the issuer's; may call the token. Cryptography's builder copies its list at
    every entry, so the structure is written directly: 100,000 entries take half a
    second.
    """
    revoked = [
        structures.RevokedCertificate(
            serial=entry.serial.number,
            revoked_at=structures.encode_time(entry.revoked_at),
            extensions=_REASONS[entry.reason],
        )
        for entry in entries
    ]
    content = asn1.encode_der(
        structures.TbsCertList(
            version=1,
            signature=ALGORITHM,
            issuer=issuer.name_part,
            this_update=structures.encode_time(this_update),
            next_update=structures.encode_time(next_update),
            # An empty list must be absent (RFC 5280, 5.1.2.6).
            revoked=revoked or None,
            extensions=[
                encoded_extension(issuer.authority_key_id, critical=False),
                encoded_extension(x509.CRLNumber(number), critical=False),
            ],
        )
    )
    return signed(content, key)
