"""What birthmark.toml can say: one frozen record a table, every default in sight."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from provisioning.ca.settings import CaSettings
from provisioning.enrol.policy import EnrolmentPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provisioning.model.ids import TrustDomain
    from provisioning.x509.profiles import Profile

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - the design's default: all addresses


@dataclass(frozen=True, slots=True)
class Listener:
    """One port.

    hosts: addresses it listens at. port: 0 takes a free one. public: HOST:PORT that
    certificates and answers name; None: the first host name and the real port.
    plain_psk: whether PSK without forward secrecy may be spoken here (devices that
    can do no more; a profile's choice in the design).
    """

    port: int
    hosts: tuple[str, ...] = EVERYWHERE
    public: str | None = None
    plain_psk: bool = False


@dataclass(frozen=True, slots=True)
class Listeners:
    """The five ports of the design; None where a listener is switched off."""

    https: Listener | None = Listener(8443)
    mqtts: Listener | None = Listener(8883)
    coaps: Listener | None = None  # 5684, when it is switched on
    http: Listener | None = Listener(8080)
    operator: Listener | None = None  # 9443, when it is switched on


PORTS = {"https": 8443, "mqtts": 8883, "coaps": 5684, "http": 8080, "operator": 9443}


@dataclass(frozen=True, slots=True)
class Hsm:
    """The token: any PKCS#11 module. Paths are absolute or below the data folder.

    pin: file:PATH, env:NAME or command:ARGV; never the PIN itself.
    softhsm_conf: for SoftHSM, which finds its token by this file; None for others.
    """

    module: str
    token_label: str = "birthmark"  # noqa: S105 - a name
    pin: str = "file:hsm/pin"
    softhsm_conf: str | None = None
    deadline: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Broker:
    """The MQTT broker; managed: the gateway runs a mosquitto of its own."""

    managed: bool = True
    host: str = "127.0.0.1"
    port: int = 1883


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer, and all of them together, may take."""

    connections: int = 20_000
    connections_of_a_device: int = 32
    handshakes: int = 1_000
    handshake_deadline: timedelta = timedelta(seconds=10)
    header_deadline: timedelta = timedelta(seconds=10)
    body_deadline: timedelta = timedelta(seconds=20)
    keep_alive: timedelta = timedelta(seconds=75)
    http_header_bytes: int = 8_190
    http_body_bytes: int = 65_536
    mqtt_packet_bytes: int = 262_144
    mqtt_connect_deadline: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Rotation:
    """grace: how long an old credential lives after the new one's first connection."""

    grace: timedelta = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Outages:
    """How long live connections go on without the registry."""

    registry_grace: timedelta = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Psk:
    """How long, and how many, proven PSK keys stay in memory."""

    cache_for: timedelta = timedelta(minutes=5)
    cache_size: int = 10_000


@dataclass(frozen=True, slots=True)
class Revocation:
    """How long CRL and OCSP answers stay valid: the longest unnoticed HSM outage."""

    crl_lifetime: timedelta = timedelta(days=7)
    ocsp_lifetime: timedelta = timedelta(hours=24)
    presign_every: timedelta = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that birthmark.toml says, checked."""

    folder: Path
    org: str
    domain: TrustDomain
    hosts: tuple[str, ...]
    hsm: Hsm
    listen: Listeners
    registry_url: str
    broker: Broker
    limits: Limits
    rotation: Rotation
    outages: Outages
    psk: Psk
    revocation: Revocation
    tls_policy: str
    profiles: Mapping[str, Profile]

    def public_address(self, name: str, bound: int | None = None) -> str | None:
        """HOST:PORT under which a listener is known; None if it is switched off.

        bound: the port it really has, where the configuration says 0.
        """
        listener: Listener | None = getattr(self.listen, name)
        if listener is None:
            return None
        if listener.public is not None:
            return listener.public
        host = self.hosts[0]
        return f"{f'[{host}]' if ':' in host else host}:{bound or listener.port}"

    def url(self, name: str, bound: int | None = None) -> str | None:
        """The public URL of a listener, without a slash at its end."""
        address = self.public_address(name, bound)
        return None if address is None else f"{_SCHEMES[name]}://{address}"

    @property
    def ca(self) -> CaSettings:
        """What the CA's rooms are told."""
        return CaSettings(
            folder=self.folder,
            org=self.org,
            domain=self.domain,
            hosts=self.hosts,
            # Names in certificates outlive any listener that is off for a while.
            http_url=self.url("http") or f"http://{self.hosts[0]}:{PORTS['http']}",
            profiles=self.profiles,
            crl_lifetime=self.revocation.crl_lifetime,
            ocsp_lifetime=self.revocation.ocsp_lifetime,
            presign_every=self.revocation.presign_every,
        )

    @property
    def enrolment(self) -> EnrolmentPolicy:
        """What enrolment is told."""
        return EnrolmentPolicy(
            domain=self.domain,
            profiles=self.profiles,
            # A signature takes at most the token's deadline: what is older is dead.
            intent_stale=self.hsm.deadline * 3,
        )

    def path(self, text: str) -> Path:
        """A path of the configuration: absolute, or below the data folder."""
        return self.folder / text


_SCHEMES = {
    "https": "https",
    "mqtts": "mqtts",
    "coaps": "coaps",
    "http": "http",
    "operator": "https",
}
