"""enrol.fresh and enrol.kept: EST with a factory certificate, beside `cfssl serve`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bench import peers
from bench.client import Identity, Secure, Work, answer, drive, expect, request
from bench.house import IN_FLIGHT, csr, enrolment, new_key
from bench.rounds import Plan, Side, compare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.house import House
    from bench.results import Result

    Form = Callable[[bytes], bytes]


def measure(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """One of the two."""
    prepare = fresh if name == "enrol.fresh" else kept
    with peers.cfssl(house, folder) as (process, port):
        return compare(
            name,
            plan,
            Side(
                "gateway",
                house.process,
                lambda n: prepare(house, house.ports["https"], enrolment, n),
            ),
            Side(peers.CFSSL, process, lambda n: prepare(house, port, for_cfssl, n)),
        )


def for_cfssl(der: bytes) -> bytes:
    """The same request for cfssl's API."""
    pem = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()
    body = json.dumps({"certificate_request": pem, "hosts": []}).encode()
    return request("POST", "/api/v1/cfssl/sign", body, "application/json")


def fresh(house: House, port: int, form: Form, count: int) -> Callable[[], int]:
    """Devices that were never seen, each on a connection of its own.

    So its factory certificate is proven here too, which is a write to the registry.
    """
    left = [
        (device, form(csr(new_key(), device.device)))
        for device in house.devices(count, "idevid")
    ]

    def worker(slot: int) -> Work:
        while left:
            device, asked = left.pop()
            connection = Secure(port, house.tls13, device, slot=slot)
            yield from connection.open()
            connection.send(asked)
            expect((yield from answer(connection)), "enrolment")
            connection.close()

    def go() -> int:
        drive(worker(slot) for slot in range(IN_FLIGHT))
        return count

    return go


def kept(house: House, port: int, form: Form, count: int) -> Callable[[], int]:
    """New devices, each of which stays connected and asks for one after the other."""
    each = max(2, count // IN_FLIGHT)
    devices = house.devices(IN_FLIGHT, "idevid")
    pairs = [
        (
            Secure(port, house.tls13, device, slot=slot),
            [form(csr(new_key(), device.device)) for _ in range(each + 1)],
        )
        for slot, device in enumerate(devices)
    ]

    def begin(connection: Secure, asked: list[bytes]) -> Work:
        yield from connection.open()
        connection.send(asked.pop())
        expect((yield from answer(connection)), "enrolment")
        connection.polled = False  # the next `drive` has another epoll

    def worker(connection: Secure, asked: list[bytes]) -> Work:
        while asked:
            connection.send(asked.pop())
            expect((yield from answer(connection)), "enrolment")

    def go() -> int:
        drive(worker(connection, asked) for connection, asked in pairs)
        for connection, _ in pairs:
            connection.close()
        return each * IN_FLIGHT

    # The handshake and the first proof of each belong to enrol.fresh.
    drive(begin(connection, asked) for connection, asked in pairs)
    return go


__all__ = ["Identity", "fresh", "kept", "measure"]
