"""Certificates and TLS contexts that tests of several rooms share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, settings

# A time limit for one example says more of the machine than of the code; a test has
# its own. Nor is a slow machine a reason to give up on drawing examples.
settings.register_profile(
    "birthmark",
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.load_profile("birthmark")


@dataclass
class Made:
    """A certificate, its key, and both as PEM."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


class Authority:
    """A small CA in memory, for tests of TLS alone."""

    def __init__(self, name: str = "Test root") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.root = Made(
            self._sign(self.name, self.key.public_key(), ca=True), self.key
        )

    def _sign(self, subject, public, *, ca=False, names=(), usage=None, days=(-1, 30)):
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), False
            )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        return builder.sign(self.key, hashes.SHA256())

    def server(self, *names: str, days=(-1, 30)) -> Made:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        return Made(
            self._sign(subject, key.public_key(), names=names, usage=usage, days=days),
            key,
        )

    def device(self, name: str, days=(-1, 30)) -> Made:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.SERIAL_NUMBER, name),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return Made(self._sign(subject, key.public_key(), usage=usage, days=days), key)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def make_authority():
    return Authority


# Gateways, each started once and shared by shell/, interop/ and story/ -------------
@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    """A gateway as `init` and `gateway` make it, with every default."""
    yield from _served(tmp_path_factory.mktemp("gateway"), {})


@pytest.fixture(scope="session")
def narrow_gateway(tmp_path_factory):
    """A gateway with little patience and little room, and certificates for seconds."""
    tables = {
        "limits": {
            "connections": "24",
            "handshakes": "4",
            "handshake_deadline": '"1s"',
            "header_deadline": '"1s"',
            "body_deadline": '"1s"',
            "keep_alive": '"2s"',
            "mqtt_connect_deadline": '"1s"',
        },
        "listen.https": {"plain_psk": "true"},
        "rotation": {"grace": '"2s"'},
        "profiles.brief": {
            "like": '"ldevid"',
            "lifetime": '"2s"',
            "expired_grace": '"1h"',
            "from": '["brief"]',
        },
        "profiles.strict": {
            "like": '"brief"',
            "expired_grace": '"0"',
            "from": '["strict"]',
        },
    }
    yield from _served(tmp_path_factory.mktemp("narrow"), tables)


def _served(folder, tables):
    # Not above: the server's imports are many, and most tests do without.
    from gateway_process import GatewayProcess, missing  # noqa: PLC0415

    if lacking := missing():
        pytest.skip(lacking)
    made = GatewayProcess(folder)
    made.initialise()
    for table, values in tables.items():
        made.configure(table, **values)
    made.start()
    try:
        yield made
    finally:
        code = made.stop()
    assert code == 0, made.log.read_text()[-3000:]


@pytest.fixture(scope="session")
def field(gateway):
    """Devices of the shared gateway."""
    from device_client import Field  # noqa: PLC0415 - as above

    return Field(gateway)


@pytest.fixture(scope="session")
def narrow_field(narrow_gateway):
    """Devices of the narrow one."""
    from device_client import Field  # noqa: PLC0415 - as above

    return Field(narrow_gateway)
