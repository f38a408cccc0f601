"""Names that are parsed or refused: device IDs, serials, PSK identities, domains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from typing_extensions import override

from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    DEVICE_ID_MALFORMED,
    PSK_IDENTITY_MALFORMED,
    SERIAL_MALFORMED,
    TRUST_DOMAIN_MALFORMED,
)

_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]{0,63}")
_GENERATION = re.compile(r"[1-9][0-9]{0,8}")
_TRUST_DOMAIN = re.compile(r"[a-z0-9][a-z0-9.\-_]{0,254}")
_HEX = re.compile(r"[0-9a-fA-F]{1,40}")

MAX_PSK_IDENTITY = 128
"""Octets that a PSK identity may have (RFC 4279, 5.3 asks for 128 to be supported)."""


@dataclass(frozen=True, slots=True, order=True)
class DeviceId:
    """A device's name, fit for a serialNumber, a SPIFFE path, a topic and a file.

    Made by `parse` only: 1 to 64 of `A-Z a-z 0-9 . -`, first a letter or digit.
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise PeerError(device_id_malformed) for what no certificate could carry."""
        if _DEVICE_ID.fullmatch(text) is None:
            raise PeerError(DEVICE_ID_MALFORMED)
        return cls(text)

    @property
    def folded(self) -> str:
        """What must be unique: distinguished names compare without case."""
        return self.text.lower()

    @override
    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class Serial:
    """A certificate's serial number: positive, at most 20 octets (RFC 5280)."""

    number: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From hexadecimal, in either case, with or without leading zeros.

        Raises PeerError(serial_malformed).
        """
        if _HEX.fullmatch(text) is None or int(text, 16) == 0:
            raise PeerError(SERIAL_MALFORMED)
        return cls(int(text, 16))

    @classmethod
    def from_random(cls, octets: bytes) -> Self:
        """From 16 random octets; bit 126 set, so that every serial has 16 octets.

        125 random bits stay, where the CA/Browser Forum and RFC 5280 ask for 64.
        """
        number = int.from_bytes(octets[:16].rjust(16, b"\0"))
        return cls((number & ((1 << 127) - 1)) | (1 << 126))

    @property
    def hex(self) -> str:
        """Lower case, two digits an octet, as `openssl x509 -serial` but for case."""
        text = f"{self.number:x}"
        return text.rjust(len(text) + len(text) % 2, "0")

    @override
    def __str__(self) -> str:
        return self.hex


@dataclass(frozen=True, slots=True, order=True)
class PskIdentity:
    """What names a pre-shared key on the wire: `ID#GENERATION`, such as `pump-7#3`."""

    device: DeviceId
    generation: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise PeerError(psk_identity_malformed) for anything not made by us."""
        name, mark, number = text.partition("#")
        if (
            not mark
            or _GENERATION.fullmatch(number) is None
            or _DEVICE_ID.fullmatch(name) is None
        ):
            raise PeerError(PSK_IDENTITY_MALFORMED)
        return cls(DeviceId(name), int(number))

    @classmethod
    def from_wire(cls, octets: bytes) -> Self | None:
        """The identity in these octets, or None: tickets pass here too (FACTS)."""
        if len(octets) > MAX_PSK_IDENTITY or not octets.isascii():
            return None
        try:
            return cls.parse(octets.decode("ascii"))
        except PeerError:
            return None

    @property
    def wire(self) -> bytes:
        """The octets that TLS carries and compares."""
        return str(self).encode("ascii")

    @override
    def __str__(self) -> str:
        return f"{self.device.text}#{self.generation}"


@dataclass(frozen=True, slots=True)
class TrustDomain:
    """The part of a SPIFFE ID before the path."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise PeerError(trust_domain_malformed): lower case, digits, `.-_`."""
        if _TRUST_DOMAIN.fullmatch(text) is None:
            raise PeerError(TRUST_DOMAIN_MALFORMED)
        return cls(text)

    def device(self, device: DeviceId) -> str:
        """The SPIFFE ID of a device in this domain."""
        return f"spiffe://{self.text}/device/{device.text}"

    @override
    def __str__(self) -> str:
        return self.text
