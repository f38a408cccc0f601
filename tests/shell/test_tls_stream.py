"""The asyncio transport over the engine, on real sockets: client and server of ours."""

from __future__ import annotations

import asyncio
import contextlib
from typing import ClassVar

import pytest

from provisioning.model.credentials import CertificateProof, PskProof
from provisioning.model.ids import PskIdentity
from provisioning.tls.aio import (
    AlertError,
    HandshakeError,
    ServerUntrustedError,
    TlsTransport,
    open_stream,
    server_transport,
)
from provisioning.tls.context import (
    ClientCertificate,
    ClientContext,
    ClientPsk,
    ServerContext,
)

KEY = bytes(range(32))
PUMP = PskIdentity.parse("pump-7#1")


class Porter:
    """An Admittance that lets everybody in, and counts."""

    def __init__(self, *, deadline_s=5.0, keys=None):
        self.handshake_deadline_s = deadline_s
        self.keys = keys or {}
        self.begun = self.ended_count = self.lost_count = 0
        self.failures = []
        self.gone = asyncio.Event()

    def arrived(self, transport):
        self.begun += 1

    def begins(self, transport):
        return True

    def ended(self, transport, failed):
        self.ended_count += 1
        if failed is not None:
            self.failures.append(failed)

    def lost(self, transport):
        self.lost_count += 1
        self.gone.set()

    def cached_key(self, identity):
        return None

    def fetch_key(self, transport, identity):
        loop = asyncio.get_running_loop()
        # Later, as the HSM's thread would.
        loop.call_later(0.01, transport.provide_key, identity, self.keys.get(identity))


class Echo(asyncio.Protocol):
    """Sends back what comes; keeps what its transport said."""

    seen: ClassVar[list] = []

    def connection_made(self, transport):
        self.transport = transport
        Echo.seen.append(transport.established)

    def data_received(self, data):
        self.transport.write(data)


class Stuffed(Echo):
    """Writes a lot at once to whoever connects, and obeys pause_writing."""

    stuck: ClassVar[asyncio.Event]
    written = 0

    def connection_made(self, transport):
        self.transport = transport
        self.free = True
        self._push()

    def _push(self):
        while self.free and Stuffed.written < 50_000_000:
            self.transport.write(b"x" * 65_536)
            Stuffed.written += 65_536

    def pause_writing(self):
        self.free = False
        Stuffed.stuck.set()

    def resume_writing(self):
        self.free = True
        self._push()


@pytest.fixture
async def serve(authority):
    """Start a server of a protocol; (port, porter)."""
    servers = []
    made = authority.server("localhost")
    context = ServerContext(
        chain_pem=made.pem,
        key_pem=made.key_pem,
        client_anchors=[authority.root.certificate],
        alpn=b"http/1.1",
        staple=lambda: None,
    )

    async def start(protocol=Echo, **how):
        Echo.seen = []
        porter = Porter(**how)
        server = await asyncio.get_running_loop().create_server(
            lambda: server_transport(context, protocol, porter), "127.0.0.1", 0
        )
        servers.append(server)
        return server.sockets[0].getsockname()[1], porter

    yield start
    for server in servers:
        server.close()


async def hang_up(writer):
    """Close a plain socket and wait until it is closed, in whatever state it is."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def client_of(authority, credential=None):
    return ClientContext(anchors_pem=authority.root.pem, credential=credential)


async def test_a_certificate_connection_echoes(authority, serve):
    port, porter = await serve()
    device = authority.device("pump-7")
    stream = await open_stream(
        "127.0.0.1",
        port,
        client_of(authority, ClientCertificate(device.pem, device.key_pem)),
        server_name="localhost",
    )
    await stream.write(b"hello")
    assert await stream.read() == b"hello"
    assert Echo.seen[0].proof == CertificateProof(device.der)
    assert stream.established.server_chain
    await stream.close()
    await porter.gone.wait()
    assert (porter.begun, porter.ended_count, porter.lost_count) == (1, 1, 1)


async def test_a_key_that_comes_late_delays_only_its_handshake(authority, serve):
    port, _ = await serve(keys={PUMP: KEY})
    stream = await open_stream(
        "127.0.0.1",
        port,
        client_of(authority, ClientPsk(str(PUMP), KEY)),
        server_name="localhost",
    )
    await stream.write(b"hello")
    assert await stream.read() == b"hello"
    assert Echo.seen[0].proof == PskProof(PUMP)
    session = stream.session()
    await stream.close()
    again = await open_stream(
        "127.0.0.1",
        port,
        client_of(authority, ClientPsk(str(PUMP), KEY)),
        server_name="localhost",
        session=session,
    )
    assert again.established.resumed
    await again.write(b"x")
    assert await again.read() == b"x"
    assert Echo.seen[1].resumed
    await again.close()


async def test_another_server_is_not_trusted(make_authority, serve):
    port, porter = await serve()
    with pytest.raises(ServerUntrustedError):
        await open_stream(
            "127.0.0.1",
            port,
            client_of(make_authority("Another")),
            server_name="localhost",
        )
    await porter.gone.wait()
    assert porter.lost_count == 1


async def test_the_right_server_of_another_name_is_not_trusted(authority, serve):
    port, _ = await serve()
    with pytest.raises(ServerUntrustedError):
        await open_stream(
            "127.0.0.1", port, client_of(authority), server_name="other.test"
        )


async def test_a_foreign_certificate_is_told_why(authority, make_authority, serve):
    port, _ = await serve()
    device = make_authority("Another").device("pump-7")
    stream = await open_stream(
        "127.0.0.1",
        port,
        client_of(authority, ClientCertificate(device.pem, device.key_pem)),
        server_name="localhost",
    )
    with pytest.raises(AlertError, match="unknown_ca"):
        await stream.read()
    await stream.close()


async def test_a_psk_that_is_away_is_internal_error(authority, serve):
    port, _ = await serve(keys={})
    with pytest.raises(HandshakeError) as failed:
        await open_stream(
            "127.0.0.1",
            port,
            client_of(authority, ClientPsk(str(PUMP), KEY)),
            server_name="localhost",
        )
    assert failed.value.alert == "internal_error"


async def test_a_half_open_peer_is_dropped_at_its_deadline(serve):
    port, porter = await serve(deadline_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read() == b""
    await porter.gone.wait()
    assert (porter.ended_count, porter.lost_count) == (1, 1)
    await hang_up(writer)


async def test_a_peer_that_drips_its_hello_is_dropped_at_its_deadline(serve):
    port, porter = await serve(deadline_s=0.3)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    record = iter(b"\x16\x03\x01\x02\x00" + b"\x01\x00\x01\xfc" + bytes(500))
    while not porter.gone.is_set():
        writer.write(bytes((next(record),)))
        try:
            async with asyncio.timeout(0.02):
                await porter.gone.wait()
        except TimeoutError:
            continue
    assert porter.lost_count == 1
    await hang_up(writer)


async def test_a_slow_reader_pauses_the_writer_and_memory_stays(authority, serve):
    Stuffed.written, Stuffed.stuck = 0, asyncio.Event()
    port, _ = await serve(Stuffed)
    stream = await open_stream(
        "127.0.0.1", port, client_of(authority), server_name="localhost"
    )
    # Nobody reads: the writer must be paused long before all of it is written.
    assert await stream.read(1)
    await asyncio.wait_for(Stuffed.stuck.wait(), 5)
    assert Stuffed.written < 20_000_000
    total = 1
    while total < 2_000_000:
        total += len(await stream.read())
    transport = stream._transport
    assert isinstance(transport, TlsTransport)
    assert len(stream._buffer) < 2 * stream.READ_HIGH
    transport.abort()
    await stream.close()


async def test_garbage_instead_of_tls_ends_that_connection_only(authority, serve):
    port, porter = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await reader.read()
    await hang_up(writer)
    await porter.gone.wait()
    assert porter.failures
    stream = await open_stream(
        "127.0.0.1", port, client_of(authority), server_name="localhost"
    )
    await stream.write(b"still here")
    assert await stream.read() == b"still here"
    await stream.close()


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003, 0.01])
async def test_a_client_that_is_cancelled_leaves_nothing(authority, serve, after):
    port, porter = await serve(keys={PUMP: KEY})
    dial = asyncio.ensure_future(
        open_stream(
            "127.0.0.1",
            port,
            client_of(authority, ClientPsk(str(PUMP), KEY)),
            server_name="localhost",
        )
    )
    await asyncio.sleep(after)
    dial.cancel()
    try:
        stream = await dial
    except asyncio.CancelledError:
        pass
    else:
        await stream.close()
    if porter.begun:
        await porter.gone.wait()
    assert porter.lost_count == porter.begun
