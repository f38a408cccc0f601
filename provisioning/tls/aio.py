"""The one asyncio transport over the engine: the gateway and the agent share it.

`TlsTransport` is a raw socket's protocol on one side and an `asyncio.Transport` on the
other. The upper protocol is made when the handshake is done, so a half-open peer costs
a TLS object and a timer, and only until its deadline.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol, cast

from typing_extensions import override

from provisioning.tls.engine import (
    ClientEngine,
    Data,
    Engine,
    Established,
    Event,
    Failed,
    PeerClosed,
    PskWanted,
    ServerEngine,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from provisioning.model.ids import PskIdentity
    from provisioning.tls.context import ClientContext, ServerContext

LINGER_S = 5.0
"""How long a closing connection may take to drain what is left to send."""

WRITE_HIGH = 64 * 1024
"""Octets waiting for a slow reader before the upper protocol is told to pause."""


class HandshakeError(Exception):
    """The handshake failed; a retry may help.

    alert: what the server said, such as `unknown_ca`; None if it said nothing.
    """

    def __init__(self, reason: str, alert: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.alert = alert


class AlertError(ConnectionResetError):
    """The peer ended an established connection by an alert, such as `unknown_ca`.

    In TLS 1.3 a client's certificate is judged after the client believes the
    handshake is done, so its refusal arrives here.
    """

    def __init__(self, alert: str) -> None:
        super().__init__(f"the peer ended the connection: {alert}")
        self.alert = alert


class ServerUntrustedError(HandshakeError):
    """The server is not the one it should be: its chain or its name does not fit."""


class Admittance(Protocol):
    """What a listener asks before and after each handshake; one for many transports."""

    handshake_deadline_s: float

    def arrived(self, transport: TlsTransport) -> None:
        """A connection is here; it may be closed at once."""

    def begins(self, transport: TlsTransport) -> bool:
        """Whether its handshake may begin now; if not, `begin` is called later.

        Asked at its first bytes: a silent connection takes no turn of others.
        """

    def ended(self, transport: TlsTransport, failed: Failed | None) -> None:
        """The handshake is done (None) or failed; not called if `lost` comes first."""

    def lost(self, transport: TlsTransport) -> None:
        """The connection is gone; called once for each `arrived`."""

    def cached_key(self, identity: PskIdentity) -> bytes | None:
        """A key that is in memory."""

    def fetch_key(self, transport: TlsTransport, identity: PskIdentity) -> None:
        """Get the key and call `transport.provide_key`."""


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """One TLS connection between a raw transport and an upper protocol."""

    __slots__ = (
        "_admittance", "_alert", "_begun", "_closing", "_early", "_engine", "_eof",
        "_loop", "_lost", "_make_upper", "_on_failed", "_paused", "_raw", "_timer",
        "_upper", "identity",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        make_upper: Callable[[], asyncio.Protocol],
        admittance: Admittance | None = None,
        on_failed: Callable[[Failed | None], None] | None = None,
    ) -> None:
        # asyncio.Transport keeps extra info in a dict; ours is computed.
        self._engine = engine
        self._make_upper = make_upper
        self._admittance = admittance
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._raw: asyncio.Transport | None = None
        self._upper: asyncio.Protocol | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._lost = False
        self._paused = False
        self._eof = False
        self._alert: AlertError | None = None
        self._begun = False
        self._early: bytes | None = None
        """First bytes of a handshake that waits for its turn."""
        self.identity: object = None
        """Who the listener found the peer to be; owned by the upper protocol."""

    # The raw side ----------------------------------------------------------------
    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw = self._raw = cast("asyncio.Transport", transport)
        raw.set_write_buffer_limits(high=WRITE_HIGH)
        if self._admittance is not None:
            self._timer = self._loop.call_later(
                self._admittance.handshake_deadline_s, self._too_slow
            )
            self._admittance.arrived(self)
        elif isinstance(self._engine, ClientEngine):
            self._handle(self._engine.start())

    def begin(self) -> None:
        """Start a handshake that `begins` put off."""
        early, self._early = self._early or b"", None
        if self._raw is not None and not self._raw.is_closing():
            self._raw.resume_reading()
            self._handle(self._engine.receive(early))

    @override
    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._admittance is not None and not self._begun:
            self._begun = True
            if not self._admittance.begins(self):
                self._early = data
                if self._raw is not None:
                    self._raw.pause_reading()
                return
        self._handle(self._engine.receive(data))

    @override
    def eof_received(self) -> bool:
        # TCP ended without `close_notify`: nothing more will come, nothing is proved
        # complete; HTTP and MQTT have lengths of their own.
        if self._upper is not None and not self._eof:
            self._eof = True
            self._upper.eof_received()
        self.close()
        return True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._stop_timer()
        self._early = None
        self._engine.release()
        if self._admittance is not None:
            self._admittance.lost(self)
        if self._upper is not None:
            self._upper.connection_lost(exc or self._alert)
        elif self._on_failed is not None:
            self._on_failed(None)
            self._on_failed = None
        self._raw = None

    @override
    def pause_writing(self) -> None:
        if self._upper is not None:
            self._upper.pause_writing()

    @override
    def resume_writing(self) -> None:
        if self._upper is not None:
            self._upper.resume_writing()

    # What events lead to -----------------------------------------------------------
    def provide_key(self, identity: PskIdentity, key: bytes | None) -> None:
        """The answer to `fetch_key`; None while the HSM is away."""
        if self._closing or not isinstance(self._engine, ServerEngine):
            return
        self._handle(self._engine.provide(identity, key))
        if not self._engine.wanted and not self._paused and self._raw is not None:
            self._raw.resume_reading()

    def _handle(self, events: list[Event]) -> None:
        self._flush()
        for event in events:
            if isinstance(event, Data):
                if self._upper is not None and not self._closing:
                    self._upper.data_received(event.octets)
            elif isinstance(event, Established):
                self._established()
            elif isinstance(event, PskWanted):
                self._want(event.identity)
            elif isinstance(event, PeerClosed):
                self.eof_received()
            else:
                self._failed(event)

    def _want(self, identity: PskIdentity) -> None:
        admittance = self._admittance
        if admittance is None:
            return
        key = admittance.cached_key(identity)
        if key is not None:
            self.provide_key(identity, key)
        elif self._raw is not None:
            self._raw.pause_reading()
            admittance.fetch_key(self, identity)

    def _established(self) -> None:
        self._stop_timer()
        if self._admittance is not None:
            self._admittance.ended(self, None)
        if self._closing:
            return
        self._on_failed = None
        self._upper = self._make_upper()
        self._upper.connection_made(self)

    def _failed(self, failed: Failed) -> None:
        self._closing = True
        self._flush()
        if failed.alert is not None:
            self._alert = AlertError(failed.alert)
        if self._engine.established is None and self._admittance is not None:
            self._admittance.ended(self, failed)
        if self._on_failed is not None:
            self._on_failed(failed)
            self._on_failed = None
        self._close_raw()

    def _too_slow(self) -> None:
        self._timer = None
        if self._admittance is not None and not self._closing:
            self._closing = True
            self._admittance.ended(self, Failed("it took too long", None, None))
        self.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush(self) -> None:
        if self._raw is not None and (data := self._engine.outgoing()):
            self._raw.write(data)

    def _close_raw(self) -> None:
        raw = self._raw
        if raw is None:
            return
        raw.close()
        self._stop_timer()
        self._timer = self._loop.call_later(LINGER_S, raw.abort)

    # The upper side -------------------------------------------------------------------
    @property
    def engine(self) -> Engine:
        """For channel bindings and sessions."""
        return self._engine

    @property
    def established(self) -> Established | None:
        """What the handshake said, once it is done."""
        return self._engine.established

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "established":
            return self._engine.established
        if name == "tls":
            return self
        if self._raw is None:
            return default
        return self._raw.get_extra_info(name, default)

    @override
    def is_closing(self) -> bool:
        return self._closing

    @override
    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._engine.close()
        self._flush()
        self._close_raw()

    @override
    def abort(self) -> None:
        self._closing = True
        if self._raw is not None:
            self._raw.abort()

    @override
    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)  # noqa: S101 - narrows the type
        self._upper = protocol

    @override
    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._upper or self

    @override
    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            return
        self._engine.send(data)
        self._flush()

    @override
    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    @override
    def write_eof(self) -> None:
        self.close()

    @override
    def can_write_eof(self) -> bool:
        return False

    @override
    def pause_reading(self) -> None:
        self._paused = True
        if self._raw is not None:
            self._raw.pause_reading()

    @override
    def resume_reading(self) -> None:
        self._paused = False
        if self._raw is not None and not self._raw.is_closing():
            self._raw.resume_reading()

    @override
    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    @override
    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high, low)

    @override
    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size() if self._raw is not None else 0


def server_transport(
    context: ServerContext,
    make_upper: Callable[[], asyncio.Protocol],
    admittance: Admittance,
) -> TlsTransport:
    """The raw protocol for one accepted connection."""
    return TlsTransport(ServerEngine(context, int(time.time())), make_upper, admittance)


class Stream(asyncio.Protocol):
    """The client's side as two coroutines, `read` and `write`, with backpressure."""

    READ_HIGH = 256 * 1024

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._over = False
        self._error: Exception | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()
        self._transport: TlsTransport | None = None

    # asyncio's side
    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TlsTransport)  # noqa: S101 - narrows the type
        self._transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._readable.set()
        if len(self._buffer) > self.READ_HIGH and self._transport is not None:
            self._transport.pause_reading()

    @override
    def eof_received(self) -> bool:
        self._over = True
        self._readable.set()
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._error = exc
        self._readable.set()
        self._writable.set()
        self._gone.set()

    @override
    def pause_writing(self) -> None:
        self._writable.clear()

    @override
    def resume_writing(self) -> None:
        self._writable.set()

    # The caller's side
    @property
    def established(self) -> Established:
        """What the handshake said."""
        assert self._transport is not None  # noqa: S101 - open_stream saw to it
        found = self._transport.established
        assert found is not None  # noqa: S101 - the stream is made after it
        return found

    async def read(self, limit: int = 65_536) -> bytes:
        """At most `limit` octets, as soon as there are some; empty at the end.

        Raises AlertError if the peer ended the connection by an alert.
        """
        while not self._buffer and not self._over:
            self._readable.clear()
            await self._readable.wait()
        if not self._buffer and isinstance(self._error, AlertError):
            raise self._error
        piece = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        if not self._buffer and self._transport is not None and not self._over:
            self._transport.resume_reading()
        return piece

    async def write(self, data: bytes) -> None:
        """Send; waits while the peer is slow; ConnectionError once it is gone."""
        if self._transport is None or self._gone.is_set() or self._over:
            raise ConnectionResetError("the connection is closed")
        self._transport.write(data)
        await self._writable.wait()
        if isinstance(self._error, AlertError):
            raise self._error
        if self._error is not None:
            raise ConnectionResetError(str(self._error))

    def session(self) -> bytes | None:
        """The newest TLS session that can be resumed, as bytes; a secret."""
        if self._transport is None or not isinstance(
            self._transport.engine, ClientEngine
        ):
            return None
        if self._gone.is_set():
            return None
        return self._transport.engine.session()

    async def close(self) -> None:
        """Say goodbye; returns when the socket is closed."""
        if self._transport is not None:
            self._transport.close()
            await self._gone.wait()


async def open_stream(  # noqa: PLR0913 - a connection is these
    host: str,
    port: int,
    context: ClientContext,
    *,
    server_name: str | None = None,
    session: bytes | None = None,
    deadline_s: float = 15.0,
) -> Stream:
    """Connect and shake hands.

    host: name or IP address to connect to; server_name: what the certificate must
    say, if that is another. session: of an earlier `Stream.session()`, to resume.
    Raises HandshakeError, ServerUntrustedError, OSError, TimeoutError.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Stream] = loop.create_future()

    def made() -> Stream:
        stream = Stream()
        if not done.done():
            done.set_result(stream)
        return stream

    def failed(event: Failed | None) -> None:
        if done.done():
            return
        if event is None:
            done.set_exception(HandshakeError("the server closed the connection"))
        elif event.untrusted:
            done.set_exception(ServerUntrustedError(event.untrusted))
        else:
            done.set_exception(HandshakeError(event.reason, event.alert))

    def factory() -> TlsTransport:
        engine = ClientEngine(
            context, int(time.time()), server_name=server_name or host, session=session
        )
        return TlsTransport(engine, made, on_failed=failed)

    async with asyncio.timeout(deadline_s):
        raw = await _connected(host, port, factory, deadline_s)
        try:
            return await done
        except BaseException:
            raw.abort()
            raise


async def _connected(
    host: str, port: int, factory: Callable[[], TlsTransport], deadline_s: float
) -> asyncio.Transport:
    """Connect to the first address that answers.

    Each has its share of the deadline, so that a dead IPv6 route does not use it up.
    asyncio's `happy_eyeballs_delay` would, but leaks a socket when it is cancelled.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    failed: Exception = OSError(f"{host} has no address")
    for address in addresses:
        try:
            async with asyncio.timeout(deadline_s / len(addresses)):
                raw, _ = await loop.create_connection(factory, address, port)
        except (OSError, TimeoutError) as error:
            failed = error
        else:
            return raw
    raise failed
