"""Root, issuing CA and responder with keys in software, for tests of x509."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import strategies as st

from provisioning.model.ids import DeviceId, Serial, TrustDomain
from provisioning.x509.build import (
    Intention,
    Issuer,
    Term,
    Urls,
    ca_certificate,
    ca_name,
    device_certificate,
    responder_certificate,
    root_certificate,
)
from provisioning.x509.profiles import DEFAULTS, NO_END, validity

# The present, since openssl judges by its own clock.
NOW = datetime.now(UTC).replace(microsecond=0)
DOMAIN = TrustDomain.parse("factory.example")
PUMP = DeviceId.parse("pump-7")
PUMP_URI = "spiffe://factory.example/device/pump-7"
_serials = iter(range(1 << 126, 1 << 127))


def next_serial() -> Serial:
    return Serial(next(_serials))


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki_of(public_key) -> bytes:
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def urls_of(name: str) -> Urls:
    base = "http://gateway.example:8080"
    return Urls(f"{base}/ocsp", f"{base}/crl/{name}.crl", f"{base}/ca/{name}.crt")


def issuer_of(name: str, der: bytes) -> Issuer:
    return Issuer(name, x509.load_der_x509_certificate(der), urls_of(name))


@dataclass
class SoftwareCa:
    root_key: ec.EllipticCurvePrivateKey
    root: Issuer
    key: ec.EllipticCurvePrivateKey
    issuing: Issuer
    responder_key: ec.EllipticCurvePrivateKey
    responder_der: bytes

    def intention(self, *, profile="ldevid", device=PUMP, public_key=None) -> Intention:
        chosen = DEFAULTS[profile]
        not_before, not_after = validity(chosen, NOW)
        spki = spki_of(public_key or new_key().public_key())
        return Intention(
            device, DOMAIN, next_serial(), chosen, not_before, not_after, spki
        )

    def device(self, **kind) -> bytes:
        return device_certificate(self.intention(**kind), self.issuing, self.key)

    def write_pem(self, folder, **certificates: bytes) -> None:
        """Files that openssl reads: root.pem, issuing.pem and those given."""
        for name, certificate in {
            "root": self.root.certificate,
            "issuing": self.issuing.certificate,
            **{k: x509.load_der_x509_certificate(v) for k, v in certificates.items()},
        }.items():
            (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))


def make_ca() -> SoftwareCa:
    root_key, key, responder_key = new_key(), new_key(), new_key()
    root = issuer_of(
        "root",
        root_certificate(
            ca_name("Test Root", "Test Works"), root_key, Term(next_serial(), NOW)
        ),
    )
    issuing = issuer_of(
        "issuing",
        ca_certificate(
            ca_name("Test Issuing CA", "Test Works"),
            key.public_key(),
            Term(next_serial(), NOW, NO_END),
            root,
            root_key,
        ),
    )
    responder = responder_certificate(
        ca_name("Test Responder"),
        responder_key.public_key(),
        Term(next_serial(), NOW, NOW + timedelta(days=30)),
        issuing,
        key,
    )
    return SoftwareCa(root_key, root, key, issuing, responder_key, responder)


def openssl(*arguments: str, cwd, given: bytes | None = None) -> str:
    """What openssl prints, both streams; fails the test when it fails."""
    done = subprocess.run(
        ["openssl", *arguments], cwd=cwd, input=given, capture_output=True, check=False
    )
    shown = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, shown
    return shown


@st.composite
def mutated(draw, seeds: list[bytes]) -> bytes:
    """One of the seeds with a few octets changed, left out, doubled or put in."""
    octets = bytearray(draw(st.sampled_from(seeds)))
    telling = st.sampled_from(b"\x00\x02\x03\x05\x0c\x13\x30\x31\x80\x82\xa0\xff")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(octets) - 1)))
        match draw(st.sampled_from(("set", "flip", "cut", "insert", "double", "end"))):
            case "set":
                octets[at : at + 1] = bytes([draw(telling)])
            case "flip":
                octets[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del octets[at : at + draw(st.integers(1, 20))]
            case "insert":
                octets[at:at] = draw(st.binary(min_size=1, max_size=6))
            case "double":
                octets[at:at] = octets[at : at + draw(st.integers(1, 30))]
            case _:
                del octets[at:]
    return bytes(octets)
