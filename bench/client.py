"""The load: raw TLS engines over sockets, many connections, one loop, no asyncio.

A worker is a generator that yields the connection whose bytes it waits for. Client
CPU is not counted, but a slow client would keep the server from gathering work, so
this is as little Python as it can be.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from OpenSSL import SSL, crypto
from typing_extensions import override

from bench.machine import BenchError
from provisioning.tls.bindings import lib
from provisioning.tls.context import ClientContext, ClientPsk
from provisioning.tls.engine import ClientEngine, Data, Established, Failed, PeerClosed
from provisioning.tls.policy import MODERN, PSK_CLIENT

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.tls.engine import Event

ROUND_DEADLINE_S = 60.0
_STEP_S = 10.0
"""Without a byte for so long, the server is stuck."""

Work = Generator["Plain", None, None]
Part = Generator["Plain", None, bytes]


class Plain:
    """A TCP connection to this machine; the base of those with TLS."""

    closed = False

    def __init__(self, port: int, slot: int = 0) -> None:
        self.sock = socket.socket()
        # An address for each slot: ports that linger in TIME_WAIT never run out.
        self.sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        self.sock.bind((f"127.0.1.{1 + slot % 250}", 0))
        self.sock.settimeout(_STEP_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect(("127.0.0.1", port))
        self.polled = False
        self.up = self.down = 0

    def send(self, data: bytes) -> None:
        """Write; a server that closed meanwhile is met when reading."""
        self.up += len(data)
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def arrived(self) -> bytes | None:
        """Bytes that are here; None if there are none yet, empty at the end."""
        try:
            data = self.sock.recv(65_536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""
        self.down += len(data)
        return data

    def read(self) -> Part:
        """The next bytes; empty at the end."""
        while True:
            yield self
            data = self.arrived()
            if data is not None:
                return data

    def close(self) -> None:
        """End it."""
        self.closed = True
        self.sock.close()


# linux/in.h; Python has no name for it.
_BIND_ADDRESS_NO_PORT = 24


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's name, key and certificate, ready to be put into a handshake."""

    device: str
    certificate: crypto.X509
    key: crypto.PKey

    @classmethod
    def of(
        cls, device: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> Identity:
        """From cryptography's objects."""
        return cls(
            device,
            crypto.X509.from_cryptography(certificate),
            crypto.PKey.from_cryptography_key(key),
        )


class Secure(Plain):
    """A TLS connection."""

    def __init__(
        self,
        port: int,
        context: ClientContext,
        identity: Identity | None = None,
        *,
        slot: int = 0,
        session: bytes | None = None,
    ) -> None:
        super().__init__(port, slot)
        self.engine = ClientEngine(
            context, int(time.time()), server_name="localhost", session=session
        )
        if identity is not None:
            # For one connection: a context for each of thousands would be dear.
            ssl = self.engine._ssl  # noqa: SLF001 - the bench's own shortcut
            lib.SSL_use_certificate(ssl, identity.certificate._x509)  # noqa: SLF001 - as above
            lib.SSL_use_PrivateKey(ssl, identity.key._pkey)  # noqa: SLF001 - as above
        self._data = b""
        self._over = False

    def open(self) -> Generator[Plain, None, Established]:
        """Shake hands."""
        self.engine.start()
        self._flush()
        while (found := self.engine.established) is None:
            yield self
            self._take()
            if self._over:
                raise BenchError("the server closed in the handshake")
        return found

    @override
    def send(self, data: bytes) -> None:
        """Encrypt and write."""
        self.engine.send(data)
        self._flush()

    @override
    def read(self) -> Part:
        """The next plaintext; empty at the end."""
        while not self._data and not self._over:
            yield self
            self._take()
        data, self._data = self._data, b""
        return data

    @override
    def close(self) -> None:
        """Say goodbye and end it."""
        if not self.closed:
            self.engine.close()
            self._flush()
            self.engine.release()
            super().close()

    def linger(self) -> None:
        """Read what a server sends by itself after the handshake: tickets."""
        while select.select([self.sock], [], [], 0.25)[0] and not self._over:
            self._take()

    def _take(self) -> None:
        data = self.arrived()
        if data is None:
            return
        if not data:
            self._over = True
            return
        for event in self.engine.receive(data):
            self._met(event)
        self._flush()

    def _met(self, event: Event) -> None:
        match event:
            case Data(octets):
                self._data += octets
            case PeerClosed():
                self._over = True
            case Failed(reason, _, untrusted):
                raise BenchError(f"TLS failed: {untrusted or reason}")
            case _:
                pass

    def _flush(self) -> None:
        data = self.engine.outgoing()
        if data:
            super().send(data)


def context(
    anchors_pem: bytes, *, version: str = "1.3", psk: ClientPsk | None = None
) -> ClientContext:
    """A client of that version, as the agent but for the group.

    X25519 instead of the hybrid: the peers' OpenSSL 3.0 and Go do not know that one,
    and both sides of a comparison are to do the same work.
    """
    made = ClientContext(
        anchors_pem=anchors_pem,
        credential=psk,
        policy=replace(PSK_CLIENT if psk else MODERN, groups=("X25519",)),
    )
    if version == "1.2":
        made._public.set_max_proto_version(SSL.TLS1_2_VERSION)  # noqa: SLF001 - as the tests do
    return made


def drive(workers: Iterable[Work], deadline_s: float = ROUND_DEADLINE_S) -> None:
    """Run workers to their end, all at the same time."""
    waiting: dict[int, Work] = {}
    end = time.monotonic() + deadline_s
    with select.epoll() as poll:

        def advance(worker: Work) -> None:
            connection = next(worker, None)
            if connection is None:
                return
            number = connection.sock.fileno()
            if not connection.polled:
                connection.polled = True
                poll.register(number, select.EPOLLIN)
            waiting[number] = worker

        for worker in workers:
            advance(worker)
        while waiting:
            ready = poll.poll(_STEP_S)
            if not ready or time.monotonic() > end:
                raise BenchError(f"{len(waiting)} connections wait in vain")
            for number, _ in ready:
                if number in waiting:
                    advance(waiting.pop(number))


def settle(part: Generator[Plain, None, object]) -> object:
    """Run one part by itself; what it returns."""
    found: list[object] = []

    def worker() -> Work:
        found.append((yield from part))

    drive([worker()])
    return found[0]


def answer(connection: Plain) -> Generator[Plain, None, tuple[int, bytes]]:
    """Status and body of an HTTP/1 answer."""
    data = b""
    while (head := data.find(b"\r\n\r\n")) < 0:
        piece = yield from connection.read()
        if not piece:
            raise BenchError(f"the server closed without an answer {data[:100]!r}")
        data += piece
    fields = data[:head].lower().split(b"\r\n")
    length = None
    for field in fields[1:]:
        if field.startswith(b"content-length:"):
            length = int(field[15:])
    body = data[head + 4 :]
    while length is None or len(body) < length:
        piece = yield from connection.read()
        if not piece:
            break
        body += piece
    return int(fields[0].split()[1]), body


def request(
    method: str, path: str, body: bytes = b"", media: str = "", *more: str
) -> bytes:
    """An HTTP/1.1 request. more: whole header lines."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *more]
    if body:
        lines += [f"Content-Type: {media}", f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode() + body


def expect(found: tuple[int, bytes], what: str) -> bytes:
    """The body of an answer that must be 200."""
    status, body = found
    if status != 200:  # noqa: PLR2004 - OK
        raise BenchError(f"{what}: {status} {body[:300]!r}")
    return body
