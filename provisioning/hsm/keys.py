"""Token keys in the shape that cryptography's builders take."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives import serialization
    from cryptography.utils import Buffer


class TokenEcPrivateKey(ec.EllipticCurvePrivateKey):
    """A P-256 key of which only `sign` is here; the rest stays in the token.

    sign_digest: a SHA-256 digest in, r and s of 32 bytes each out, as PKCS#11 gives
    them (v2.40, 2.3.1). Called on the token's thread only.
    """

    def __init__(
        self,
        public_key: ec.EllipticCurvePublicKey,
        sign_digest: Callable[[bytes], bytes],
    ) -> None:
        self._public_key = public_key
        self._sign_digest = sign_digest

    @override
    def sign(
        self,
        data: Buffer,
        signature_algorithm: ec.EllipticCurveSignatureAlgorithm,
    ) -> bytes:
        """ECDSA with SHA-256, DER as X.509 wants it (RFC 3279, 2.2.3).

        The digest is made here and signed by CKM_ECDSA: every token has that, not
        every one CKM_ECDSA_SHA256. Raises UnsupportedAlgorithm for another hash.
        """
        algorithm = signature_algorithm.algorithm
        if not isinstance(signature_algorithm, ec.ECDSA) or not isinstance(
            algorithm, hashes.SHA256
        ):
            raise UnsupportedAlgorithm("token keys sign by ECDSA with SHA-256")
        hasher = hashes.Hash(algorithm)
        hasher.update(data)
        return to_der(self._sign_digest(hasher.finalize()))

    @override
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    @override
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    @override
    def key_size(self) -> int:
        return self._public_key.key_size

    @override
    def exchange(
        self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey
    ) -> NoReturn:
        raise UnsupportedAlgorithm("token keys only sign")

    @override
    def private_numbers(self) -> NoReturn:
        raise UnsupportedAlgorithm("the private key is in the token and stays there")

    @override
    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> NoReturn:
        raise UnsupportedAlgorithm("the private key is in the token and stays there")

    @override
    def __copy__(self) -> Self:
        return self

    @override
    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


def to_der(raw: bytes) -> bytes:
    """ECDSA-Sig-Value from the two halves r and s that a token returns.

    Raises ValueError for an odd number of bytes, or none.
    """
    half, odd = divmod(len(raw), 2)
    if odd or not half:
        message = f"an ECDSA signature of {len(raw)} bytes has no two halves"
        raise ValueError(message)
    return utils.encode_dss_signature(
        int.from_bytes(raw[:half]), int.from_bytes(raw[half:])
    )
