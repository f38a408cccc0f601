"""Enrolment tokens: made once, shown once, kept as a hash."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provisioning.enrol.admission import TokenProof, named_profile
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import PROFILE_NOT_ALLOWED

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta

    from provisioning.enrol.policy import EnrolmentPolicy
    from provisioning.registry.records import TokenRow
    from provisioning.registry.store import Registry

TOKEN_BYTES = 32
"""Of randomness: nobody guesses it, so a plain SHA-256 is enough to keep it by."""


@dataclass(frozen=True, slots=True)
class TokenSecret:
    """The text that a device presents; shown once, never stored, not in a repr."""

    text: str = field(repr=False)

    @property
    def hash(self) -> bytes:
        """What the registry knows it by."""
        return hash_token(self.text)


@dataclass(frozen=True, slots=True)
class TokenWish:
    """What a new token shall do. device: None for any new device; ttl: its life."""

    device: DeviceId | None
    uses: int
    ttl: timedelta
    profile: str | None


def hash_token(text: str) -> bytes:
    """SHA-256 of a token as presented; looked up, so never compared in parts.

    Nonsense has a hash too, which leads nowhere.
    """
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def token_proof(user: str, password: str) -> TokenProof:
    """What HTTP Basic carries: the device ID and the token (DESIGN, EST).

    Raises PeerError(device_id_malformed).
    """
    return TokenProof(hash_token(password), DeviceId.parse(user))


async def create_enrolment_token(  # noqa: PLR0913 - who, when, from what randomness
    registry: Registry,
    policy: EnrolmentPolicy,
    wish: TokenWish,
    *,
    now: datetime,
    actor: str,
    random_bytes: Callable[[int], bytes],
) -> tuple[TokenSecret, TokenRow]:
    """Make a token; the secret is in what this returns and nowhere else.

    random_bytes: as `secrets.token_bytes`. Raises PeerError for a profile that tokens
    do not admit to, and as the registry does.
    """
    if wish.profile is not None and not named_profile(wish.profile, policy).token:
        raise PeerError(
            PROFILE_NOT_ALLOWED,
            f"No token admits to the profile {wish.profile}; the configuration says "
            "which ones have `token = true`.",
        )
    octets = random_bytes(TOKEN_BYTES)
    secret = TokenSecret(base64.urlsafe_b64encode(octets).rstrip(b"=").decode())
    row = await registry.create_token(
        token_hash=secret.hash,
        device=wish.device,
        uses=wish.uses,
        expires=now + wish.ttl,
        profile=wish.profile,
        now=now,
        actor=actor,
    )
    return secret, row
