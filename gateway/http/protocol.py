"""HTTP/1.1 by aiohttp on our transports, with deadlines no slow client stretches."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import PayloadEncodingError
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from typing_extensions import override
from yarl import URL

from gateway.http.answers import refusal_answer
from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    BODY_TOO_LARGE,
    REQUEST_MALFORMED,
    REQUEST_SLOW,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import StreamReader
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.http_parser import RawRequestMessage

SERVER = "birthmark"
"""What answers say of the server: not its parts and their versions."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may take.

    header_s: from the connection to the first whole request. keep_alive_s: from an
    answer to the next whole request. body_s: for one body. Sizes in octets.
    """

    header_s: float = 10.0
    keep_alive_s: float = 75.0
    body_s: float = 20.0
    header_bytes: int = 8_190
    body_bytes: int = 65_536
    connections: int = 20_000


class HttpConnection(RequestHandler):
    """One connection. aiohttp has no time limit for a request that never ends."""

    __slots__ = ("limits", "on_lost", "server", "timer")

    limits: HttpLimits
    server: HttpServer
    timer: asyncio.TimerHandle | None
    on_lost: Callable[[], None] | None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.on_lost = self.timer = None
        super().connection_made(transport)
        self.server.open += 1
        if self.server.open > self.limits.connections:
            self.force_close()
        self.wait(self.limits.header_s)

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        self.stop_waiting()
        self.server.open -= 1
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP gets our words, not the parser's, and ends the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        answer = refusal_answer(request, REQUEST_MALFORMED, REQUEST_MALFORMED.sentence)
        answer.headers["Server"] = SERVER
        answer.force_close()
        return answer

    def wait(self, seconds: float) -> None:
        """The next whole request must be here within this time."""
        self.stop_waiting()
        self.timer = self._loop.call_later(seconds, self._too_slow)

    def stop_waiting(self) -> None:
        """A request is here."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_slow(self) -> None:
        self.timer = None
        if self.transport is not None:
            self.transport.abort()


class HttpServer(web.Server):
    """Makes the protocol of each connection; `handler` answers each request."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: HttpLimits,
    ) -> None:
        self._limits = limits
        self.open = 0
        """Connections at the moment; owned by the event loop's thread."""
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

        async def timed(request: web.BaseRequest) -> web.StreamResponse:
            connection = request.protocol
            assert isinstance(connection, HttpConnection)  # noqa: S101 - narrows
            connection.stop_waiting()
            self._answering += 1
            self._idle.clear()
            try:
                answer = await handler(request)
            finally:
                self._answering -= 1
                if not self._answering:
                    self._idle.set()
                connection.wait(limits.keep_alive_s)
            answer.headers.setdefault("Server", SERVER)
            return answer

        super().__init__(
            timed,
            request_factory=_request,
            access_log=None,
            # The listener has it on already; once more is a system call each time.
            tcp_keepalive=False,
            # A compressed body could be a thousand times what was sent.
            auto_decompress=False,
            keepalive_timeout=limits.keep_alive_s,
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
        )

    @override
    def __call__(self) -> HttpConnection:
        made = HttpConnection(self, loop=self._loop, **self._kwargs)
        made.limits = self._limits
        made.server = self
        return made

    async def answered(self) -> None:
        """Wait until no request is being worked on."""
        await self._idle.wait()

    def close_all(self) -> None:
        """End every connection."""
        for connection in self.connections:
            connection.force_close()


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """Aiohttp's request; it cannot make one of `CONNECT` without a target.

    Its parser lets that pass with no URL, and the task of the connection would end in
    an AttributeError with the client still waiting. There is nothing at `/`.
    """
    if message.url is None:
        # Its types say that there always is one.
        message = message._replace(url=URL("/"))  # type: ignore[unreachable]
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop)


async def read_body(request: web.BaseRequest, limits: HttpLimits) -> bytes:
    """The whole body.

    Raises PeerError(body_too_large | request_slow). Asks for it, where the client
    waits to be asked (`Expect: 100-continue`, which curl sends).
    """
    if (request.content_length or 0) > limits.body_bytes:
        raise PeerError(BODY_TOO_LARGE)
    if (
        request.headers.get("Expect", "").lower() == "100-continue"
        and request.version == HttpVersion11
        and request.transport is not None
    ):
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.content.iter_any():
                found += piece
                if len(found) > limits.body_bytes:
                    raise PeerError(BODY_TOO_LARGE)
    except TimeoutError:
        raise PeerError(REQUEST_SLOW) from None
    except (ConnectionError, PayloadEncodingError, RequestPayloadError) as error:
        # It hung up in its body, or broke the body's own framing: the peer's doing.
        raise PeerError(REQUEST_MALFORMED) from error
    return bytes(found)
