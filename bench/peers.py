"""The peers: programs of others that do the same work with the same certificates."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bench.house import new_key
from bench.machine import Process, free_port, running
from gateway.mqtt.broker import find_mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import ec

    from bench.house import House

CFSSL, S_SERVER, MOSQUITTO = "cfssl serve", "openssl s_server", "mosquitto"


@contextlib.contextmanager
def cfssl(house: House, folder: Path) -> Iterator[tuple[Process, int]]:
    """`cfssl serve` with mTLS, a P-256 key in software and no database."""
    ca = Authority("Peer CA")
    ca.write(folder)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "signing": {
                    "default": {
                        "expiry": "720h",
                        "usages": ["digital signature", "client auth"],
                    }
                }
            }
        )
    )
    port = free_port()
    process = Process(
        (
            *("cfssl", "serve", "-address", "127.0.0.1", "-port", str(port)),
            *("-ca", "ca.pem", "-ca-key", "ca-key.pem", "-config", "config.json"),
            *("-tls-cert", house.chain, "-tls-key", house.key),
            *("-mutual-tls-ca", house.cas, "-loglevel", "5"),
        ),
        folder,
    )
    with running(process):
        process.listening(port)
        yield process, port


@contextlib.contextmanager
def s_server(
    house: House, folder: Path, *options: str | Path
) -> Iterator[tuple[Process, int]]:
    """`openssl s_server -www` with the gateway's own certificate."""
    port = free_port()
    process = Process(
        (
            *("openssl", "s_server", "-www", "-quiet", "-accept", f"127.0.0.1:{port}"),
            *("-cert", house.chain, "-cert_chain", house.intermediates),
            *("-key", house.key, *options),
        ),
        folder,
    )
    with running(process):
        process.listening(port)
        yield process, port


def verifying(house: House) -> tuple[str | Path, ...]:
    """What makes s_server ask for, and verify, a device's certificate."""
    return ("-Verify", "3", "-verify_return_error", "-CAfile", house.cas)


@contextlib.contextmanager
def mosquitto(house: House, folder: Path) -> Iterator[tuple[Process, int]]:
    """A mosquitto that does the TLS itself and asks for certificates."""
    port = free_port()
    (folder / "mosquitto.conf").write_text(
        "\n".join(
            (
                f"listener {port} 127.0.0.1",
                f"cafile {house.cas}",
                f"certfile {house.chain}",
                f"keyfile {house.key}",
                "require_certificate true",
                "use_identity_as_username true",
                "allow_anonymous false",
                "persistence false",
                "user root" if os.geteuid() == 0 else "",
                "log_type error",
                "connection_messages false",
                "sys_interval 0",
                "",
            )
        )
    )
    process = Process((find_mosquitto(), "-c", "mosquitto.conf"), folder)
    with running(process):
        process.listening(port)
        yield process, port


@contextlib.contextmanager
def responder(
    folder: Path,
) -> Iterator[tuple[Process, int, Authority, x509.Certificate]]:
    """`openssl ocsp -port` over an index of one certificate."""
    ca = Authority("Peer CA")
    ca.write(folder)
    leaf = ca.sign("leaf", new_key(), days=30)
    end = leaf.not_valid_after_utc.strftime("%y%m%d%H%M%SZ")
    (folder / "index.txt").write_text(
        f"V\t{end}\t\t{leaf.serial_number:X}\tunknown\t/CN=leaf\n"
    )
    port = free_port()
    process = Process(
        (
            *("openssl", "ocsp", "-port", str(port), "-index", "index.txt"),
            *("-CA", "ca.pem", "-rsigner", "ca.pem", "-rkey", "ca-key.pem"),
            *("-ndays", "1", "-ignore_err"),
        ),
        folder,
    )
    with running(process):
        process.said("waiting for")
        yield process, port, ca, leaf


class Authority:
    """A CA with a P-256 key in software."""

    def __init__(self, name: str) -> None:
        self.key = new_key()
        self.certificate = self.sign(name, self.key, days=3650, ca=True)

    def sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, days: int, ca: bool = False
    ) -> x509.Certificate:
        """A certificate for this name and key."""
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if ca else self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            )
        return builder.sign(self.key, hashes.SHA256())

    def write(self, folder: Path) -> None:
        """As ca.pem and ca-key.pem."""
        (folder / "ca.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        key = folder / "ca-key.pem"
        key.touch(mode=0o600)
        key.write_bytes(
            self.key.private_bytes(
                Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
            )
        )
