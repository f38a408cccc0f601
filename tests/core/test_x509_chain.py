"""Chains in order, PEM in and out, and the SPIFFE bundle."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, urlsafe_b64decode
from itertools import permutations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from software_ca import NOW, make_ca, openssl

from provisioning.model.errors import Unusable
from provisioning.x509.build import ca_name
from provisioning.x509.bundle import spiffe_bundle
from provisioning.x509.chain import (
    MAX_CHAIN,
    fingerprint_sha256,
    order_chain,
    split_pem,
    to_pem,
)

CA = make_ca()
LEAF = CA.device()
ISSUING = CA.issuing.certificate.public_bytes(Encoding.DER)
ROOT = CA.root.certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize("given", list(permutations([LEAF, ISSUING, ROOT])))
def test_a_chain_is_put_in_order_leaf_first(given):
    assert order_chain(given) == [LEAF, ISSUING, ROOT]


def test_a_chain_may_leave_out_the_root_or_be_one_certificate():
    assert order_chain([ISSUING, LEAF]) == [LEAF, ISSUING]
    assert order_chain([ROOT]) == [ROOT]


@pytest.mark.parametrize(
    "given",
    [
        [],
        [LEAF, ROOT],
        [LEAF, CA.device(), ISSUING],
        [LEAF, ISSUING, make_ca().root.certificate.public_bytes(Encoding.DER)],
        [LEAF, ISSUING, b"nonsense"],
        [LEAF] * (MAX_CHAIN + 1),
    ],
    ids=["empty", "gap", "two leaves", "foreign root", "nonsense", "too long"],
)
def test_what_is_not_one_chain_is_unusable(given):
    with pytest.raises(Unusable):
        order_chain(given)


def test_pem_is_split_and_joined_whatever_stands_between():
    pem = to_pem([LEAF, ISSUING])
    assert split_pem(pem) == [LEAF, ISSUING]
    noisy = b"subject=pump-7\n" + to_pem([LEAF]) + b"\n\n# issuer\n" + to_pem([ISSUING])
    assert split_pem(noisy) == [LEAF, ISSUING]


@pytest.mark.parametrize("pem", [b"", b"hello", LEAF, to_pem([LEAF])[:200]])
def test_a_file_without_certificates_is_unusable_and_named(pem):
    with pytest.raises(Unusable, match=r"anchors\.pem"):
        split_pem(pem, "anchors.pem")


def test_a_fingerprint_is_what_openssl_prints(tmp_path):
    CA.write_pem(tmp_path)
    ask = ["x509", "-in", "root.pem", "-noout", "-fingerprint", "-sha256"]
    shown = openssl(*ask, cwd=tmp_path).split("=")[1].strip()
    assert fingerprint_sha256(ROOT) == shown.replace(":", "").lower()
    assert fingerprint_sha256(ROOT) == hashlib.sha256(ROOT).hexdigest()


def number(text: str) -> int:
    return int.from_bytes(urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def test_the_bundle_lists_the_anchors_as_spiffe_writes_them():
    bundle = json.loads(json.dumps(spiffe_bundle([ROOT], 3, 300)))
    assert bundle["spiffe_sequence"] == 3
    assert bundle["spiffe_refresh_hint"] == 300
    (key,) = bundle["keys"]
    assert (key["use"], key["kty"], key["crv"]) == ("x509-svid", "EC", "P-256")
    assert [b64decode(c, validate=True) for c in key["x5c"]] == [ROOT]
    point = CA.root.public_key.public_numbers()
    assert (number(key["x"]), number(key["y"])) == (point.x, point.y)
    # RFC 7518, 6.2.1.2: always the curve's full length.
    assert len(key["x"]) == len(key["y"]) == 43


def test_an_rsa_anchor_of_a_former_owner_is_listed_too():
    key = rsa.generate_private_key(65537, 2048)
    name = ca_name("Former owner")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW)
        .sign(key, SHA256())
    )
    der = certificate.public_bytes(Encoding.DER)
    (listed,) = spiffe_bundle([der], 1, 60)["keys"]
    assert listed["kty"] == "RSA"
    assert number(listed["n"]) == key.public_key().public_numbers().n
    assert number(listed["e"]) == 65537
