"""A device's pre-shared key, derived in the HSM when it is needed and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from provisioning.model.errors import OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from provisioning.hsm.token import Token
    from provisioning.model.ids import PskIdentity

PSK_MASTER = "psk-master"
"""The label of the generic secret in the token that every key is derived from."""

_VERSION = b"birthmark psk v1\0"


@dataclass(frozen=True, slots=True)
class PskKey:
    """The 32 octets both ends know. Its `repr` is without them."""

    octets: bytes

    @override
    def __repr__(self) -> str:
        return "PskKey(...)"

    @property
    def hex(self) -> str:
        """For the one answer that hands it to its device."""
        return self.octets.hex()


def label(identity: PskIdentity) -> bytes:
    """What the master is applied to.

    The version comes first, so that another scheme can never give the same key; an
    ID has no zero octet, and the generation has four, so no two identities meet.
    """
    name = identity.device.text.encode("ascii")
    return _VERSION + name + b"\0" + identity.generation.to_bytes(4)


async def derive(token: Token, identity: PskIdentity) -> PskKey:
    """HMAC-SHA-256 in the token; raises Unavailable or Unusable as the token does.

    Any well-formed identity has a key, registered or not: whether it may enter is
    judged after the handshake, so unknown identities and wrong keys fail alike.
    """
    try:
        return PskKey(await token.hmac(PSK_MASTER, label(identity)))
    except OutcomeUnknown:
        # Nothing came of it that could matter: asking again gives the same key.
        raise Unavailable("HSM") from None
