"""What the rest of the house may ask of a token, whatever stands behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cryptography.hazmat.primitives.asymmetric import ec

T = TypeVar("T")

HSM = "HSM"
"""What an error of this room names as away or unusable."""


class Token(Protocol):
    """Keys that sign and are never seen.

    Every call raises Unavailable when the token is away or does not answer in time,
    Unusable when the operator must act, and OutcomeUnknown when a signature or a key
    was asked for and the answer is lost. None raises PeerError.
    """

    async def use(
        self, label: str, work: Callable[[ec.EllipticCurvePrivateKey], T]
    ) -> T:
        """Run `work` on the token's thread with the key of that label.

        work: plain code, for it holds up everybody who waits for the token. It may
        run twice, when the session was lost in the middle; then only what the second
        run returns counts. What it raises reaches the caller. The key works inside
        of `work` only.
        """
        ...

    async def hmac(self, label: str, message: bytes) -> bytes:
        """HMAC-SHA-256 (RFC 2104) of the message under the secret of that label."""
        ...

    async def make_ec_key(self, label: str) -> ec.EllipticCurvePublicKey:
        """A new P-256 key that never leaves the token and can only sign.

        Its CKA_ID is the RFC 5280 key identifier (4.2.1.2, method 1). Raises Unusable
        if there is a key of that label.
        """
        ...

    async def make_hmac_key(self, label: str) -> None:
        """A new 32-byte secret that nobody can read, for `hmac` only.

        Raises Unusable if there is a secret of that label.
        """
        ...

    async def public_key(self, label: str) -> ec.EllipticCurvePublicKey:
        """The public half of the key of that label."""
        ...

    async def set_id(self, label: str, key_id: bytes) -> None:
        """Give both halves of a key this CKA_ID: the SKI of its certificate."""
        ...

    async def check(self, ec_labels: Iterable[str], hmac_labels: Iterable[str]) -> None:
        """Read back what the keys may do; raises Unusable that names each fault.

        P-256 or a 32-byte secret, sensitive, not extractable, private, signing only;
        and the public half is truly the private half's.
        """
        ...

    async def close(self) -> None:
        """Log out and let the module go; what still waits gets Unavailable."""
        ...
