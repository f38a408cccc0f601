"""The gateway under measure: as `init` makes it, and devices that it enrolled."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from bench.client import (
    Identity,
    Secure,
    Work,
    answer,
    context,
    drive,
    expect,
    request,
)
from bench.machine import BIN, Process, run
from provisioning.tls.context import ClientPsk
from provisioning.wire import est

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

IN_FLIGHT = 32
"""Connections at the same time: enough for the registry to gather a group."""

_ANSWER_S = 60.0


class House:
    """One data folder and the gateway that serves it."""

    def __init__(self, folder: Path, program: Sequence[str | Path] = ()) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._program = program or (BIN / "birthmark",)
        self._numbers = itertools.count(1)
        self._tokens: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        self.cli("init", "--host", "localhost", "--ephemeral-ports")
        # As the listeners do: the root, and the CAs that devices come from.
        self.cas = folder / "cas.pem"
        self.cas.write_bytes(
            b"".join(
                x509.load_der_x509_certificate(
                    (self.data / "public" / "ca" / f"{name}.crt").read_bytes()
                ).public_bytes(Encoding.PEM)
                for name in ("root", "issuing", "factory")
            )
        )
        self.root_pem = self.cli_text("ca", "export", "--format", "pem").encode()
        self.chain, self.key = (
            self.data / "server" / name for name in ("chain.pem", "key.pem")
        )
        _, *rest = x509.load_pem_x509_certificates(self.chain.read_bytes())
        self.intermediates = folder / "intermediates.pem"
        self.intermediates.write_bytes(
            b"".join(one.public_bytes(Encoding.PEM) for one in rest)
        )
        self.tls13 = context(self.root_pem)
        self.process = self._start()

    def cli(self, *argv: str) -> Any:
        """`birthmark ARGV --json`, parsed."""
        return json.loads(self.cli_text(*argv, "--json"))

    def cli_text(self, *argv: str) -> str:
        """What `birthmark ARGV` prints."""
        return run((BIN / "birthmark", "--data", self.data, *argv))

    def _start(self) -> Process:
        process = Process(
            (*self._program, "--data", self.data, "gateway"),
            self.folder,
            stdout=subprocess.PIPE,
        )
        try:
            self.ports = json.loads(process.line('"ready"', _ANSWER_S))
        except BaseException:
            process.stop()
            raise
        return process

    def restart(self) -> None:
        """A new process, with nothing in its memory yet."""
        self.process.stop()
        self.process = self._start()

    # Devices --------------------------------------------------------------------
    def devices(self, count: int, profile: str) -> list[Identity]:
        """New devices with a certificate of that profile each, by one token."""
        token = self._token(profile)
        names = [f"bench-{next(self._numbers)}" for _ in range(count)]
        made: list[Identity] = []

        def worker(slot: int) -> Work:
            connection = Secure(self.ports["https"], self.tls13, slot=slot)
            yield from connection.open()
            while names:
                name = names.pop()
                key = new_key()
                basic = base64.b64encode(f"{name}:{token}".encode()).decode()
                connection.send(
                    enrolment(csr(key, name), f"Authorization: Basic {basic}")
                )
                body = expect((yield from answer(connection)), "enrolment by token")
                made.append(Identity.of(name, certificate_in(body), key))
            connection.close()

        drive(worker(slot) for slot in range(min(IN_FLIGHT, count)))
        return made

    def psks(self, devices: Sequence[Identity]) -> list[ClientPsk]:
        """A PSK for each of these, asked for with its certificate."""
        left = list(devices)
        made: list[ClientPsk] = []

        def worker(slot: int) -> Work:
            while left:
                device = left.pop()
                connection = Secure(self.ports["https"], self.tls13, device, slot=slot)
                yield from connection.open()
                connection.send(
                    request("POST", "/device/v1/psk", b"", "", "Content-Length: 0")
                )
                body = expect((yield from answer(connection)), "a PSK")
                found = json.loads(body)
                made.append(ClientPsk(found["identity"], bytes.fromhex(found["key"])))
                connection.close()

        drive(worker(slot) for slot in range(8))
        return made

    def _token(self, profile: str) -> str:
        if profile not in self._tokens:
            self._tokens[profile] = self.cli(
                "token", "create", "--uses", "1000000", "--profile", profile
            )["token"]
        return self._tokens[profile]


def new_key() -> ec.EllipticCurvePrivateKey:
    """A device's key."""
    return ec.generate_private_key(ec.SECP256R1())


def csr(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """DER of a request for that device, as firmware makes it."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.SERIAL_NUMBER, device),
            x509.NameAttribute(NameOID.COMMON_NAME, device),
        ]
    )
    made = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def enrolment(der: bytes, *more: str) -> bytes:
    """The HTTP request of EST's simpleenroll (RFC 7030, 4.2.1)."""
    return request(
        "POST",
        "/.well-known/est/simpleenroll",
        base64.b64encode(der),
        est.PKCS10_TYPE,
        *more,
    )


def certificate_in(body: bytes) -> x509.Certificate:
    """The certificate of an EST answer."""
    return x509.load_der_x509_certificate(
        est.read_certs_only(base64.b64decode(body))[0]
    )
