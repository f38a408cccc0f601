"""Certification requests: what is taken, what is refused, and nothing else."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AttributeOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from software_ca import PUMP, PUMP_URI, mutated, new_key, openssl, spki_of

from provisioning.model.errors import PeerError
from provisioning.x509 import structures
from provisioning.x509.csr import (
    MAX_CSR,
    KeyRules,
    VerifiedCsr,
    Wishes,
    check_names,
    verify_csr,
)

RULES = KeyRules(frozenset({"P-256", "P-384"}), 2048, 4096)
EC_ONLY = KeyRules(frozenset({"P-256"}), None)
KEY = new_key()
SHA256 = hashes.SHA256()
RSA_KEY = rsa.generate_private_key(65537, 2048)


def attribute(oid, text):
    return x509.NameAttribute(oid, text)


PUMP_SUBJECT = (
    attribute(NameOID.SERIAL_NUMBER, "pump-7"),
    attribute(NameOID.COMMON_NAME, "pump-7"),
)


def request(
    *subject, key=KEY, names=(), password=None, algorithm=SHA256, **signing
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if names:
        alternative = x509.SubjectAlternativeName(names)
        builder = builder.add_extension(alternative, critical=False)
    if password:
        builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, password)
    return builder.sign(key, algorithm, **signing).public_bytes(Encoding.DER)


def refusal(der: bytes, rules: KeyRules = RULES) -> str:
    with pytest.raises(PeerError) as caught:
        verify_csr(der, rules)
    return caught.value.refusal.code


def test_a_request_without_any_names_is_taken():
    der = request()
    csr = verify_csr(der, RULES)
    assert csr.wishes == Wishes()
    assert csr.public_key_der == spki_of(KEY.public_key())
    assert csr.spki_sha256 == hashlib.sha256(csr.public_key_der).digest()
    assert csr.fingerprint == hashlib.sha256(der).digest()


def test_wishes_are_read_and_sorted():
    der = request(
        *PUMP_SUBJECT,
        names=[
            x509.UniformResourceIdentifier(PUMP_URI),
            x509.DNSName("pump-7.local"),
            x509.IPAddress(ip_address("192.0.2.7")),
            x509.IPAddress(ip_address("2001:db8::7")),
        ],
        password=b"tls-unique in base64",
    )
    assert verify_csr(der, RULES).wishes == Wishes(
        serial_numbers=("pump-7",),
        common_names=("pump-7",),
        uris=(PUMP_URI,),
        dns_names=("pump-7.local",),
        ip_addresses=(ip_address("192.0.2.7"), ip_address("2001:db8::7")),
        challenge_password="tls-unique in base64",  # noqa: S106 - not one
    )


def test_a_challenge_password_shows_in_no_repr():
    csr = verify_csr(request(password=b"sesame"), RULES)
    assert "sesame" not in repr(csr)
    assert "sesame" not in repr(csr.wishes)


def test_names_of_other_kinds_are_noticed():
    odd = attribute(NameOID.COUNTRY_NAME, "DE")
    assert verify_csr(request(odd), RULES).wishes.other_subject
    mail = [x509.RFC822Name("a@example.com")]
    assert verify_csr(request(names=mail), RULES).wishes.other_names


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384()])
def test_allowed_curves_are_taken(curve, algorithm):
    der = request(key=ec.generate_private_key(curve), algorithm=algorithm)
    assert verify_csr(der, RULES).public_key.curve.name == curve.name


@pytest.mark.parametrize("curve", [ec.SECP521R1(), ec.SECP256K1()])
def test_other_curves_are_refused(curve):
    assert refusal(request(key=ec.generate_private_key(curve))) == "key_not_allowed"


def test_rsa_is_taken_where_the_rules_have_it():
    der = request(key=RSA_KEY)
    assert verify_csr(der, RULES).public_key.key_size == 2048
    assert refusal(der, EC_ONLY) == "key_not_allowed"
    assert refusal(der, KeyRules(frozenset(), 3072)) == "key_not_allowed"


def test_a_small_rsa_exponent_is_refused():
    key = rsa.generate_private_key(3, 2048)
    assert refusal(request(key=key)) == "key_not_allowed"


@pytest.mark.parametrize(
    ("mask", "code"), [("sha256", None), ("sha1", "csr_signature")]
)
def test_pss_is_taken_with_strong_hashes_only(tmp_path, mask, code):
    new = ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-sha256"]
    pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", f"rsa_mgf1_md:{mask}"]
    openssl(*new, *pss, "-subj", "/", "-outform", "DER", "-out", "csr", cwd=tmp_path)
    der = (tmp_path / "csr").read_bytes()
    if code is None:
        assert isinstance(verify_csr(der, RULES), VerifiedCsr)
    else:
        assert refusal(der) == code


def test_other_kinds_of_key_are_refused():
    der = request(key=ed25519.Ed25519PrivateKey.generate(), algorithm=None)
    assert refusal(der) == "key_not_allowed"


@pytest.mark.parametrize(
    ("make_key", "code"),
    [
        (["ecparam", "-genkey", "-name", "prime256v1"], None),
        (
            ["ecparam", "-genkey", "-name", "prime256v1", "-param_enc", "explicit"],
            "key_not_allowed",
        ),
        (
            ["genpkey", "-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"],
            "key_not_allowed",
        ),
    ],
    ids=["named curve", "curve by its parameters", "RSA for PSS alone"],
)
def test_a_key_is_described_in_the_usual_way(tmp_path, make_key, code):
    openssl(*make_key, "-out", "key", cwd=tmp_path)
    ask = ["req", "-new", "-key", "key", "-subj", "/CN=pump-7", "-outform", "DER"]
    openssl(*ask, "-out", "csr", cwd=tmp_path)
    der = (tmp_path / "csr").read_bytes()
    if code is None:
        assert verify_csr(der, RULES).wishes.common_names == ("pump-7",)
    else:
        assert refusal(der) == code


def test_a_compressed_point_is_the_same_key(tmp_path):
    curve = ["-name", "prime256v1", "-conv_form", "compressed"]
    openssl("ecparam", "-genkey", *curve, "-out", "key", cwd=tmp_path)
    ask = ["req", "-new", "-key", "key", "-subj", "/", "-outform", "DER"]
    openssl(*ask, "-out", "csr", cwd=tmp_path)
    csr = verify_csr((tmp_path / "csr").read_bytes(), RULES)
    assert csr.public_key_der == spki_of(csr.public_key)
    assert len(csr.public_key_der) == 91


@pytest.mark.parametrize("digest", ["sha1", "md5"])
def test_weak_hashes_are_refused(tmp_path, digest):
    new = ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", f"-{digest}"]
    openssl(*new, "-subj", "/", "-outform", "DER", "-out", "csr", cwd=tmp_path)
    assert refusal((tmp_path / "csr").read_bytes()) == "csr_signature"


def test_a_signature_of_another_key_is_refused():
    ours, theirs = spki_of(KEY.public_key()), spki_of(new_key().public_key())
    assert refusal(request().replace(ours, theirs)) == "csr_signature"


def test_a_point_off_the_curve_is_refused():
    der = bytearray(request())
    der[der.index(spki_of(KEY.public_key())) + 90] ^= 1
    assert refusal(bytes(der)) == "key_not_allowed"


def test_size_and_trailing_octets_are_refused():
    der = request()
    assert refusal(der + b"\0") == "csr_malformed"
    assert refusal(b"") == "csr_malformed"
    assert refusal(b"\x30" * (MAX_CSR + 1)) == "csr_malformed"


def resigned(info: bytes) -> bytes:
    """A request of this content with a fitting signature."""
    algorithm = structures.Algorithm(
        oid=x509.ObjectIdentifier("1.2.840.10045.4.3.2"), parameters=None
    )
    signature = KEY.sign(info, ec.ECDSA(hashes.SHA256()))
    return asn1.encode_der(
        structures.Signed(
            content=structures.tlv(info),
            algorithm=structures.tlv(asn1.encode_der(algorithm)),
            signature=asn1.BitString(signature, 0),
        )
    )


def with_attributes(
    *attributes: tuple[str, list[bytes]], subject: tuple[str, bytes] | None = None
) -> bytes:
    """A well-signed request of parts that no builder would put together."""
    names = [
        asn1.SetOf(
            [
                structures.NameAttribute(
                    oid=x509.ObjectIdentifier(oid), value=structures.tlv(value)
                )
            ]
        )
        for oid, value in ([subject] if subject else [])
    ]
    info = structures.RequestInfo(
        version=0,
        subject=names,
        public_key=structures.tlv(spki_of(KEY.public_key())),
        attributes=asn1.SetOf(
            [
                structures.Attribute(
                    oid=x509.ObjectIdentifier(oid),
                    values=asn1.SetOf([structures.tlv(v) for v in values]),
                )
                for oid, values in attributes
            ]
        ),
    )
    return resigned(asn1.encode_der(info))


PASSWORD = "1.2.840.113549.1.9.7"  # noqa: S105 - an OID
EXTENSIONS = "1.2.840.113549.1.9.14"
NOTHING = b"\x30\x00"


def test_attributes_that_nobody_reads_are_passed_over():
    # Microsoft's clients send their operating system's version, for one.
    der = with_attributes(
        ("1.3.6.1.4.1.311.13.2.3", [b"\x16\x0210"]), (EXTENSIONS, [NOTHING])
    )
    assert verify_csr(der, RULES).wishes == Wishes()


@pytest.mark.parametrize(
    "attributes",
    [
        [(PASSWORD, [b"\x0c\x01a", b"\x0c\x01b"])],
        [(PASSWORD, [])],
        [(PASSWORD, [b"\x0c\x01a"]), (PASSWORD, [b"\x0c\x01b"])],
        [(PASSWORD, [b"\x02\x01\x01"])],
        [(PASSWORD, [b"\x0c\x01\xff"])],
        [(EXTENSIONS, [NOTHING]), (EXTENSIONS, [NOTHING])],
        [(EXTENSIONS, [b"\x02\x01\x01"])],
    ],
    ids=[
        "two values",
        "no value",
        "twice",
        "a number",
        "broken UTF-8",
        "two extension requests",
        "no extensions",
    ],
)
def test_odd_attributes_are_refused(attributes):
    assert refusal(with_attributes(*attributes)) == "csr_malformed"


@pytest.mark.parametrize(
    "subject",
    [("2.5.4.6", b"\x13\x03DEU"), ("2.5.4.3", b"\x0c\x00"), ("2.5.4.3", b"\x1e\x00")],
    ids=["country of three letters", "empty", "BMPString"],
)
def test_a_subject_at_which_the_library_warns_is_read_without_a_word(subject):
    wishes = verify_csr(with_attributes(subject=subject), RULES).wishes
    with pytest.raises(PeerError):
        check_names(wishes, PUMP, PUMP_URI)


def test_a_negative_version_is_refused():
    good = request()
    assert good.count(b"\x02\x01\x00") >= 1
    assert refusal(good.replace(b"\x02\x01\x00", b"\x02\x01\xff", 1)) == "csr_malformed"


SEEDS = [
    request(
        *PUMP_SUBJECT,
        names=[
            x509.UniformResourceIdentifier(PUMP_URI),
            x509.IPAddress(ip_address("192.0.2.7")),
            x509.DirectoryName(x509.Name(PUMP_SUBJECT)),
        ],
        password=b"sesame",
    ),
    request(attribute(NameOID.COUNTRY_NAME, "DE"), key=RSA_KEY),
    request(
        key=RSA_KEY,
        rsa_padding=padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32),
    ),
    request(key=ed25519.Ed25519PrivateKey.generate(), algorithm=None),
]


@given(mutated(SEEDS) | st.binary(max_size=200))
def test_nonsense_ends_in_a_refusal_and_nothing_else(der):
    try:
        csr = verify_csr(der, RULES)
    except PeerError as error:
        assert error.refusal.code in {  # noqa: PT017 - either outcome is right
            "csr_malformed",
            "csr_signature",
            "key_not_allowed",
        }
    else:
        assert csr.der == der


def content(der: bytes) -> bytes:
    return structures.encoded(asn1.decode_der(structures.Signed, der).content)


@given(mutated([content(SEEDS[0]), content(SEEDS[1])]))
def test_nonsense_that_is_well_signed_is_taken_or_refused(info):
    try:
        der = resigned(info)
    except ValueError:  # it is no longer one DER value, and so cannot be sent
        return
    with suppress(PeerError):
        assert isinstance(verify_csr(der, RULES), VerifiedCsr)


def test_names_that_are_left_out_are_filled_in():
    check_names(Wishes(), PUMP, PUMP_URI)


def test_the_devices_own_names_are_taken():
    own = Wishes(serial_numbers=("pump-7",), common_names=("pump-7",), uris=(PUMP_URI,))
    check_names(own, PUMP, PUMP_URI)
    listed = Wishes(dns_names=("a.example",), ip_addresses=(ip_address("192.0.2.7"),))
    check_names(
        listed,
        PUMP,
        PUMP_URI,
        dns_names={"a.example"},
        ip_addresses={ip_address("192.0.2.7")},
    )


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(serial_numbers=("pump-8",)),
        Wishes(serial_numbers=("pump-7", "pump-8")),
        Wishes(common_names=("PUMP-7",)),
        Wishes(other_subject=True),
        Wishes(uris=("spiffe://factory.example/device/pump-8",)),
        Wishes(dns_names=("gateway.example",)),
        Wishes(ip_addresses=(ip_address("192.0.2.7"),)),
        Wishes(other_names=True),
    ],
    ids=lambda w: next(f for f in Wishes.__slots__ if getattr(w, f)),
)
def test_any_other_name_is_refused(wishes):
    with pytest.raises(PeerError) as caught:
        check_names(wishes, PUMP, PUMP_URI)
    assert caught.value.refusal.code == "name_not_allowed"
    assert "pump-8" not in caught.value.detail
