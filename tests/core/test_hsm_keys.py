"""A token's key as cryptography sees it, with a key in software for the token."""

from __future__ import annotations

import copy

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import given
from hypothesis import strategies as st

from provisioning.hsm.keys import TokenEcPrivateKey, to_der

SOFTWARE = ec.generate_private_key(ec.SECP256R1())
SHA256 = ec.ECDSA(hashes.SHA256())


def sign_digest(digest: bytes) -> bytes:
    """What CKM_ECDSA does."""
    der = SOFTWARE.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    r, s = utils.decode_dss_signature(der)
    return r.to_bytes(32) + s.to_bytes(32)


KEY = TokenEcPrivateKey(SOFTWARE.public_key(), sign_digest)


@given(st.binary(max_size=200))
def test_what_it_signs_verifies(data):
    KEY.public_key().verify(KEY.sign(data, SHA256), data, SHA256)


@given(
    r=st.integers(min_value=1, max_value=2**256 - 1),
    s=st.integers(min_value=1, max_value=2**256 - 1),
)
def test_raw_signatures_become_der_and_keep_their_numbers(r, s):
    assert utils.decode_dss_signature(to_der(r.to_bytes(32) + s.to_bytes(32))) == (r, s)


@given(st.binary(max_size=65).filter(lambda raw: not raw or len(raw) % 2))
def test_a_signature_without_two_halves_is_no_signature(raw):
    with pytest.raises(ValueError, match="two halves"):
        to_der(raw)


def test_it_looks_like_the_key_it_stands_for():
    assert KEY.public_key() == SOFTWARE.public_key()
    assert KEY.key_size == 256
    assert isinstance(KEY.curve, ec.SECP256R1)
    assert isinstance(KEY, ec.EllipticCurvePrivateKey)
    assert copy.deepcopy([KEY])[0] is KEY


def test_another_hash_is_not_signed_with():
    with pytest.raises(UnsupportedAlgorithm):
        KEY.sign(b"data", ec.ECDSA(hashes.SHA512()))
