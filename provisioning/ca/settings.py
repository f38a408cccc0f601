"""What the CA's rooms are told by the configuration: names, addresses, lifetimes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from provisioning.x509.build import Urls

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provisioning.model.ids import TrustDomain
    from provisioning.x509.profiles import Profile

ROOT = "root"
FACTORY = "factory"
ISSUING = "issuing"
OCSP = "ocsp"
"""The label of the one responder key; each CA gives it a certificate of its own."""

CAS = (ROOT, FACTORY, ISSUING)
"""Every CA that issues and publishes a CRL: its name is also its key's label."""


@dataclass(frozen=True, slots=True)
class CaSettings:
    """The CA's part of the configuration.

    folder: the data directory. http_url: what certificates name, without a slash at
    the end. hosts: DNS names and IP addresses of the server certificate.
    presign_every: how often certificates without a fresh OCSP answer are looked for.
    debounce: how long a CRL waits for further revocations.
    """

    folder: Path
    org: str
    domain: TrustDomain
    hosts: tuple[str, ...]
    http_url: str
    profiles: Mapping[str, Profile]
    crl_lifetime: timedelta = timedelta(days=7)
    ocsp_lifetime: timedelta = timedelta(hours=24)
    presign_every: timedelta = timedelta(minutes=5)
    debounce: timedelta = timedelta(milliseconds=200)
    responder_lifetime: timedelta = timedelta(days=30)

    @property
    def public(self) -> Path:
        """The folder that everybody may read."""
        return self.folder / "public"

    def certificate_path(self, name: str) -> Path:
        """Where the DER certificate of a CA lies."""
        return self.public / "ca" / f"{name}.crt"

    def responder_path(self, issuer: str) -> Path:
        """Where the DER certificate lies that a CA gave to the responder key."""
        return self.public / "ca" / f"{OCSP}-{issuer}.crt"

    def crl_path(self, name: str) -> Path:
        """Where the DER CRL of a CA lies."""
        return self.public / "crl" / f"{name}.crl"

    def urls(self, name: str) -> Urls:
        """Where relying parties learn about what this CA issued (by plain HTTP)."""
        return Urls(
            ocsp=f"{self.http_url}/ocsp",
            crl=f"{self.http_url}/crl/{name}.crl",
            issuer=f"{self.http_url}/ca/{name}.crt",
        )
