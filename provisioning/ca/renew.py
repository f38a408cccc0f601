"""The gateway's own short-lived certificates: of its TLS server and its responders.

Made by `init`, renewed when two thirds of their life are gone, all under keys that
stay: the TLS key is a file (no key of a token can serve TLS in OpenSSL's bindings),
the responder's is in the token. Keeping the key makes each renewal one file, written
atomically, so that no crash can leave a key beside another key's certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from provisioning.ca.files import PRIVATE, PUBLIC, write_atomically
from provisioning.ca.hierarchy import (
    BACKDATE,
    make_ec_key,
    own_term,
    set_key_id,
    spki,
    to_pem,
)
from provisioning.ca.settings import CAS, ISSUING, OCSP
from provisioning.model.errors import Unusable
from provisioning.x509.build import (
    ca_name,
    responder_certificate,
    server_certificate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.ca.settings import CaSettings
    from provisioning.hsm.token import Token
    from provisioning.x509.build import Issuer

RENEW_AT = 2 / 3
LONGEST = timedelta(days=90) - BACKDATE
"""A server's certificate lives no longer than 90 days, whatever a profile says."""
_SERVER = "the server certificate"
_RESPONDER = "OCSP responder"


@dataclass(frozen=True, slots=True)
class _Renewing:
    """What every certificate that is made here needs."""

    token: Token
    settings: CaSettings
    now: datetime
    random_bytes: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Own:
    """The gateway's own certificates.

    server_chain_pem: the leaf, then the issuing CA; the root is the client's to have.
    responders: DER, by the CA that gave each to the one responder key.
    """

    server_certificate: x509.Certificate
    server_chain_pem: bytes
    server_key_pem: bytes = field(repr=False)
    responders: Mapping[str, bytes]


def load_own(settings: CaSettings) -> Own:
    """Read them, without the token; raises Unusable where one is missing."""
    responders = {
        name: _load(
            settings.responder_path(name), x509.load_der_x509_certificate
        ).public_bytes(Encoding.DER)
        for name in CAS
    }
    key_pem = _read(key_path(settings))
    chain_pem = _read(chain_path(settings))
    try:
        leaf = x509.load_pem_x509_certificate(chain_pem)
    except ValueError as error:
        raise Unusable(_SERVER, f"{chain_path(settings)}: {error}") from error
    if leaf.public_key() != _key(key_pem, settings).public_key():
        raise Unusable(
            _SERVER,
            f"{chain_path(settings)} is not of the key beside it; move it away and "
            "run `birthmark init`",
        )
    return Own(leaf, chain_pem, key_pem, responders)


async def renew_own(
    token: Token,
    settings: CaSettings,
    hierarchy: Hierarchy,
    now: datetime,
    random_bytes: Callable[[int], bytes],
) -> Own:
    """Make what is missing, renew what is due; the present state of all.

    Raises Unavailable when the token is away and something was due.
    """
    renewing = _Renewing(token, settings, now, random_bytes)
    for name in CAS:
        path = settings.responder_path(name)
        if _due(_certificate_or_none(path, x509.load_der_x509_certificate), now):
            public_key = await token.public_key(OCSP)
            der = await _responder(hierarchy.issuers[name], public_key, renewing)
            write_atomically(path, der, PUBLIC)
    if not key_path(settings).exists():
        write_atomically(key_path(settings), _new_key(), PRIVATE)
    chain = chain_path(settings)
    leaf = _certificate_or_none(chain, x509.load_pem_x509_certificate)
    key = _key(_read(key_path(settings)), settings).public_key()
    if (
        leaf is None
        or _due(leaf, now)
        or leaf.public_key() != key
        or _hosts(leaf) != _wanted_hosts(settings)
    ):
        pem = await _server_chain(hierarchy.issuers[ISSUING], key, renewing)
        write_atomically(chain, pem, PRIVATE)
    return load_own(settings)


def key_path(settings: CaSettings) -> Path:
    """Where the TLS server's key lies."""
    return settings.folder / "server" / "key.pem"


def chain_path(settings: CaSettings) -> Path:
    """Where the TLS server's certificate lies, with its issuer's."""
    return settings.folder / "server" / "chain.pem"


async def make_responder_key(token: Token) -> None:
    """The one responder key, made unless it is there."""
    await make_ec_key(token, OCSP)
    await set_key_id(token, OCSP)


async def _responder(
    issuer: Issuer, public_key: ec.EllipticCurvePublicKey, renewing: _Renewing
) -> bytes:
    settings = renewing.settings
    name = ca_name(f"OCSP responder of the {issuer.name} CA", settings.org)
    term = own_term(
        renewing.now,
        settings.responder_lifetime,
        issuer.not_after,
        renewing.random_bytes,
    )
    return await renewing.token.use(
        issuer.name,
        lambda key: responder_certificate(name, public_key, term, issuer, key),
    )


async def _server_chain(
    issuer: Issuer, public_key: ec.EllipticCurvePublicKey, renewing: _Renewing
) -> bytes:
    settings = renewing.settings
    wanted = settings.profiles["server"].lifetime
    lifetime = LONGEST if wanted is None else min(wanted, LONGEST)
    term = own_term(renewing.now, lifetime, issuer.not_after, renewing.random_bytes)
    der = await renewing.token.use(
        issuer.name,
        lambda key: server_certificate(
            settings.hosts, spki(public_key), term, issuer, key
        ),
    )
    return to_pem(der) + issuer.certificate.public_bytes(Encoding.PEM)


def _due(certificate: x509.Certificate | None, now: datetime) -> bool:
    if certificate is None:
        return True
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= start + (end - start) * RENEW_AT


def _hosts(certificate: x509.Certificate) -> frozenset[str]:
    try:
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        return frozenset()
    addresses = names.get_values_for_type(x509.IPAddress)
    return frozenset(names.get_values_for_type(x509.DNSName)) | frozenset(
        str(address) for address in addresses
    )


def _wanted_hosts(settings: CaSettings) -> frozenset[str]:
    wanted = set()
    for host in settings.hosts:
        try:
            wanted.add(str(ip_address(host)))
        except ValueError:
            wanted.add(host)
    return frozenset(wanted)


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def _key(pem: bytes, settings: CaSettings) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except ValueError as error:
        raise Unusable(_SERVER, f"{key_path(settings)} is no key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unusable(_SERVER, f"{key_path(settings)} is no EC key")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Unusable(_SERVER, f"{path} is missing; run `birthmark init`") from None
    except OSError as error:
        raise Unusable(_SERVER, f"{path} cannot be read: {error.strerror}") from error


def _load(path: Path, load: Callable[[bytes], x509.Certificate]) -> x509.Certificate:
    try:
        return load(_read(path))
    except ValueError as error:
        raise Unusable(_SERVER, f"{path} is no certificate") from error


def _certificate_or_none(
    path: Path, load: Callable[[bytes], x509.Certificate]
) -> x509.Certificate | None:
    return _load(path, load) if path.exists() else None
