"""ocsp: answers to OCSP requests by POST, beside `openssl ocsp -port`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from bench import peers
from bench.client import Plain, Work, answer, drive, expect, request
from bench.house import IN_FLIGHT
from bench.rounds import Plan, Side, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.house import House
    from bench.results import Result

DEVICES = 256
_TYPE = "application/ocsp-request"
_CLOSE = "Connection: close"


def measure(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """A connection for each request, as relying parties come."""
    public = house.data / "public" / "ca" / "issuing.crt"
    issuing = x509.load_der_x509_certificate(public.read_bytes())
    asked = [
        _asked(device.certificate.to_cryptography(), issuing, "/ocsp")
        for device in house.devices(DEVICES, "ldevid")
    ]
    with peers.responder(folder) as (process, port, ca, leaf):
        theirs = [_asked(leaf, ca.certificate, "/")]
        return compare(
            name,
            plan,
            Side(
                "gateway",
                house.process,
                lambda n: questions(house.ports["http"], asked, IN_FLIGHT, n),
            ),
            Side(
                "openssl ocsp",
                process,
                lambda n: questions(port, theirs, 4, n),
            ),
        )


def _asked(leaf: x509.Certificate, issuer: x509.Certificate, path: str) -> bytes:
    builder = ocsp.OCSPRequestBuilder().add_certificate(leaf, issuer, hashes.SHA1())  # noqa: S303 - what relying parties send (RFC 5019)
    der = builder.build().public_bytes(Encoding.DER)
    return request("POST", path, der, _TYPE, _CLOSE)


def questions(
    port: int, asked: Sequence[bytes], in_flight: int, count: int
) -> Callable[[], int]:
    """That many, over the certificates in turn."""
    left = iter(range(count))

    def worker(slot: int) -> Work:
        for n in left:
            connection = Plain(port, slot)
            connection.send(asked[n % len(asked)])
            expect((yield from answer(connection)), "OCSP")
            connection.close()

    def go() -> int:
        drive(worker(slot) for slot in range(in_flight))
        return count

    return go
