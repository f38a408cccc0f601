"""Root, factory and issuing CA: made once, read at each start.

The keys are in the token under the CAs' names; the certificates are files. Making may
be interrupted anywhere and begun again: keys and certificates that exist are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provisioning.ca.files import PUBLIC, write_atomically
from provisioning.ca.settings import CAS, FACTORY, ISSUING, ROOT
from provisioning.model.errors import Unusable
from provisioning.model.ids import Serial
from provisioning.x509.build import (
    Issuer,
    Term,
    ca_certificate,
    ca_name,
    key_identifier,
    root_certificate,
)
from provisioning.x509.profiles import NO_END

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.ca.settings import CaSettings
    from provisioning.hsm.token import Token
    from provisioning.model.ids import TrustDomain

ISSUING_LIFETIME = timedelta(days=3652)
"""Ten years; a rollover makes the next one long before."""

BACKDATE = timedelta(hours=1)
"""For relying parties whose clock is behind."""

_WHAT = "the CA"
_COMMON_NAMES = {ROOT: "Root CA", FACTORY: "Factory CA", ISSUING: "Issuing CA"}
_ENDS = {ROOT: None, FACTORY: None, ISSUING: ISSUING_LIFETIME}


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The CAs of this fleet: public parts only.

    issuers: by CA name, which is also the label of its key in the token.
    certificates: DER, by CA name.
    """

    domain: TrustDomain
    issuers: Mapping[str, Issuer]
    certificates: Mapping[str, bytes]

    @property
    def anchors(self) -> tuple[bytes, ...]:
        """DER of the trust anchors: what a verifier starts from."""
        return (self.certificates[ROOT],)

    def chain_for(self, name: str) -> tuple[bytes, ...]:
        """DER from the CA of this name up to the root (EST cacerts)."""
        if name == ROOT:
            return (self.certificates[ROOT],)
        return (self.certificates[name], self.certificates[ROOT])

    @property
    def anchors_pem(self) -> bytes:
        """The trust anchors in PEM, as `ca export` prints them."""
        return b"".join(to_pem(der) for der in self.anchors)

    @property
    def client_cas_pem(self) -> bytes:
        """What the server needs to verify a device that sends no more than its leaf."""
        return b"".join(to_pem(self.certificates[name]) for name in CAS)

    def issued_here(self, name: str) -> frozenset[Serial]:
        """Serials of CA certificates that this CA signed: they have no device."""
        if name != ROOT:
            return frozenset()
        return frozenset(
            Serial(self.issuers[ca].certificate.serial_number)
            for ca in (FACTORY, ISSUING)
        )


@dataclass(frozen=True, slots=True)
class _Making:
    """What every certificate that is made here needs."""

    token: Token
    settings: CaSettings
    now: datetime
    random_bytes: Callable[[int], bytes]


async def make_hierarchy(
    token: Token,
    settings: CaSettings,
    now: datetime,
    random_bytes: Callable[[int], bytes],
) -> Hierarchy:
    """Make what is missing of keys and certificates of the three CAs.

    random_bytes: as `secrets.token_bytes`. Raises Unusable for certificates that do
    not fit the token's keys, and as the token does.
    """
    making = _Making(token, settings, now, random_bytes)
    certificates: dict[str, bytes] = {}
    issuers: dict[str, Issuer] = {}
    for name in CAS:
        key = await make_ec_key(token, name)
        path = settings.certificate_path(name)
        if not path.exists():
            der = await _certificate(name, key, issuers.get(ROOT), making)
            write_atomically(path, der, PUBLIC)
        certificates[name], issuers[name] = _read(name, settings)
        if issuers[name].public_key != key:
            raise Unusable(
                _WHAT,
                f"{path} is not of the key '{name}' in the token; use the token that "
                "belongs to this data directory",
            )
        await token.set_id(name, issuers[name].key_id)
    return Hierarchy(settings.domain, issuers, certificates)


def load_hierarchy(settings: CaSettings) -> Hierarchy:
    """Read the CAs' certificates, without the token.

    Raises Unusable, with what to do, where one is missing or cannot be read.
    """
    certificates: dict[str, bytes] = {}
    issuers: dict[str, Issuer] = {}
    for name in CAS:
        certificates[name], issuers[name] = _read(name, settings)
    root = issuers[ROOT].certificate
    for name in (FACTORY, ISSUING):
        if issuers[name].certificate.issuer != root.subject:
            raise Unusable(
                _WHAT, f"{settings.certificate_path(name)} is not of this root"
            )
    return Hierarchy(settings.domain, issuers, certificates)


def own_term(
    now: datetime,
    lifetime: timedelta | None,
    issuer_end: datetime,
    random_bytes: Callable[[int], bytes],
) -> Term:
    """Serial and validity of a certificate for ourselves; lifetime: None for no end."""
    moment = now.replace(microsecond=0)
    end = issuer_end if lifetime is None else min(moment + lifetime, issuer_end)
    return Term(Serial.from_random(random_bytes(16)), moment - BACKDATE, end)


async def make_ec_key(token: Token, label: str) -> ec.EllipticCurvePublicKey:
    """The key of that label, made unless it is there."""
    try:
        return await token.make_ec_key(label)
    except Unusable:
        # There already, or worse: reading it tells which, and raises again if worse.
        return await token.public_key(label)


async def make_hmac_key(token: Token, label: str) -> None:
    """The secret of that label, made unless it is there."""
    try:
        await token.make_hmac_key(label)
    except Unusable:
        await token.check((), (label,))


def to_pem(der: bytes) -> bytes:
    """A certificate in PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo in DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def set_key_id(token: Token, label: str) -> None:
    """CKA_ID = the key identifier that certificates carry, so that tools match them."""
    key = await token.public_key(label)
    await token.set_id(label, key_identifier(spki(key)))


async def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    root: Issuer | None,
    making: _Making,
) -> bytes:
    subject = ca_name(_COMMON_NAMES[name], making.settings.org)
    lifetime = _ENDS[name]
    term = own_term(making.now, lifetime, NO_END, making.random_bytes)
    if root is None:
        return await making.token.use(
            ROOT, lambda private: root_certificate(subject, private, term)
        )
    return await making.token.use(
        ROOT, lambda private: ca_certificate(subject, key, term, root, private)
    )


def _read(name: str, settings: CaSettings) -> tuple[bytes, Issuer]:
    path = settings.certificate_path(name)
    try:
        der = path.read_bytes()
        certificate = x509.load_der_x509_certificate(der)
        return der, Issuer(name, certificate, settings.urls(name))
    except FileNotFoundError:
        raise Unusable(_WHAT, f"{path} is missing; run `birthmark init`") from None
    except (OSError, ValueError, TypeError) as error:
        raise Unusable(
            _WHAT, f"{path} cannot be read ({error}); restore it from the backup"
        ) from error
