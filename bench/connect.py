"""connect.*: a handshake and one `whoami`, beside `openssl s_server -www`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import peers
from bench.client import (
    Identity,
    Plain,
    Secure,
    Work,
    answer,
    context,
    drive,
    expect,
    request,
)
from bench.house import IN_FLIGHT
from bench.machine import BenchError
from bench.rounds import Plan, Side, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from bench.house import House
    from bench.results import Result
    from provisioning.tls.context import ClientContext, ClientPsk
    from provisioning.tls.engine import Established

WHOAMI = request("GET", "/device/v1/whoami", b"", "", "Connection: close")
PEER_IN_FLIGHT = 4
"""s_server takes one connection at a time; the others wait in its backlog."""


class Caller:
    """A device that connects by one of the modes, again and again.

    resumes: with the newest ticket; its first connection shakes hands in full.
    """

    def __init__(
        self,
        tls: ClientContext,
        mode: str,
        identity: Identity | None = None,
    ) -> None:
        self.tls = tls
        self.identity = identity
        self._psk = mode.startswith("psk")
        self._version = "TLSv1.2" if mode.endswith("12") else "TLSv1.3"
        self.resumes = mode.startswith("resumed")
        self._session: bytes | None = None

    def connect(self, port: int, slot: int) -> Secure:
        """A connection that is to be opened."""
        return Secure(
            port,
            self.tls,
            None if self._psk else self.identity,
            slot=slot,
            session=self._session,
        )

    def check(self, found: Established) -> None:
        """That it is the mode that is to be measured."""
        if (
            found.version != self._version
            or found.resumed is not (self._session is not None)
            or (self._psk and found.server_chain)
        ):
            raise BenchError(f"the handshake was another than asked for: {found}")

    def keep(self, connection: Secure) -> None:
        """Keep the ticket, where the mode wants it."""
        if self.resumes:
            self._session = connection.engine.session()
            if self._session is None:
                raise BenchError("the server gave no ticket")

    def forget(self) -> None:
        """Have no ticket."""
        self._session = None

    def ask(self, port: int, slot: int) -> Generator[Plain, None, None]:
        """One connection and its `whoami`."""
        connection = self.connect(port, slot)
        self.check((yield from connection.open()))
        connection.send(WHOAMI)
        expect((yield from answer(connection)), "whoami")
        self.keep(connection)
        connection.close()


def measure(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """One of the modes."""
    mode = name.removeprefix("connect.")
    callers, options = callers_of(house, mode)
    strangers = callers
    if mode.startswith("resumed"):  # a ticket is good for its own server
        strangers = [Caller(one.tls, mode, one.identity) for one in callers]
    elif mode.startswith("psk"):  # s_server knows one identity
        strangers = callers[:1] * PEER_IN_FLIGHT
    with peers.s_server(house, folder, *options) as (process, port):
        return compare(
            name,
            plan,
            Side(
                "gateway",
                house.process,
                lambda n: work(house.ports["https"], callers, IN_FLIGHT, n),
            ),
            Side(
                peers.S_SERVER,
                process,
                lambda n: work(port, strangers, PEER_IN_FLIGHT, n),
            ),
        )


def callers_of(
    house: House, mode: str, count: int = IN_FLIGHT
) -> tuple[list[Caller], tuple[str | Path, ...]]:
    """Devices that connect in this mode, and s_server's options for it."""
    devices = house.devices(count, "ldevid")
    if not mode.startswith("psk"):
        callers = [Caller(house.tls13, mode, device) for device in devices]
        return callers, ("-tls1_3", *peers.verifying(house))
    keys = house.psks(devices)
    version = "1.2" if mode.endswith("12") else "1.3"
    callers = [
        Caller(context(house.root_pem, version=version, psk=key), mode) for key in keys
    ]
    return callers, (f"-tls{version.replace('.', '_')}", *_of_psk(keys[0], version))


def _of_psk(psk: ClientPsk, version: str) -> tuple[str, ...]:
    suite = (
        ("-cipher", "ECDHE-PSK-CHACHA20-POLY1305")
        if version == "1.2"
        else ("-ciphersuites", "TLS_AES_128_GCM_SHA256")
    )
    return ("-psk_identity", psk.identity, "-psk", psk.key.hex(), *suite)


def work(
    port: int, callers: Sequence[Caller], in_flight: int, count: int
) -> Callable[[], int]:
    """That many connections; each caller has one at a time."""
    left: Iterator[int] = iter(range(count))

    def worker(slot: int) -> Work:
        mine = callers[slot::in_flight]
        for n in left:
            yield from mine[n % len(mine)].ask(port, slot)

    def go() -> int:
        drive(worker(slot) for slot in range(in_flight))
        return count

    return go
