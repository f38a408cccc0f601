"""HTTP/1.1 by h11 over any stream, with limits on everything the other side sends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Protocol

import h11

from device_agent.failures import NotNowError
from device_agent.schedule import LONGEST_RETRY_AFTER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LONGEST_HEAD: Final = 16 * 1024
LONGEST_BODY: Final = 128 * 1024
MOST_INTERIM: Final = 4
"""How many 1xx answers may come before the real one."""

ACCEPT: Final = "application/problem+json, application/json, application/pkcs7-mime"
"""What the agent can read; who asks for nothing is refused in plain text (DESIGN)."""

DEADLINE_S: Final = 30.0
GOODBYE_S: Final = 2.0
_LONGEST_NUMBER: Final = 9


class ByteStream(Protocol):
    """What HTTP and MQTT need of a connection; `provisioning.tls.aio.Stream` is one."""

    async def read(self, limit: int = 65_536) -> bytes:
        """Some octets; empty at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send, waiting while the other side is slow."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. retry_after: when it says when to come back."""

    status: int
    content_type: str
    retry_after: timedelta | None
    body: bytes


class HttpConnection:
    """One connection, one request at a time. Everything wrong is NotNowError."""

    def __init__(
        self,
        stream: ByteStream,
        host: str,
        now: Callable[[], datetime],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._stream = stream
        self._host = host
        self._now = now
        self._deadline_s = deadline_s
        self._machine = h11.Connection(
            h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD
        )

    async def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Answer:
        """Send a request, wait for its whole answer. Raises NotNowError only."""
        try:
            async with asyncio.timeout(self._deadline_s):
                if self._machine.our_state is not h11.IDLE:
                    self._machine.start_next_cycle()
                await self._send(method, path, headers, body)
                return await self._receive()
        except TimeoutError as error:
            raise NotNowError("the gateway was too slow to answer") from error
        except h11.ProtocolError as error:
            raise NotNowError(
                "the gateway answered something else than HTTP"
            ) from error
        except OSError as error:
            raise NotNowError("the gateway closed the connection") from error

    async def close(self) -> None:
        """End the connection, without waiting long for the other side's goodbye."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._stream.close()
        except (OSError, TimeoutError):
            return  # all that was asked has been answered

    async def _send(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> None:
        fields = [
            ("Host", self._host),
            ("User-Agent", "birthmark-agent"),
            ("Accept", ACCEPT),
            *headers,
        ]
        if body or method == "POST":
            fields.append(("Content-Length", str(len(body))))
        request = h11.Request(method=method, target=path, headers=fields)
        octets = self._machine.send(request) or b""
        if body:
            octets += self._machine.send(h11.Data(data=body)) or b""
        octets += self._machine.send(h11.EndOfMessage()) or b""
        await self._stream.write(octets)

    async def _receive(self) -> Answer:
        head: h11.Response | None = None
        body = bytearray()
        interim = 0
        while True:
            event = await self._next_event()
            if isinstance(event, h11.InformationalResponse):
                interim += 1
                if interim > MOST_INTERIM:
                    raise NotNowError("the gateway answers without end")
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > LONGEST_BODY:
                    raise NotNowError("the gateway's answer is too long")
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return self._answer(head, bytes(body))
            else:
                raise NotNowError("the gateway closed the connection")

    async def _next_event(self) -> object:
        while True:
            event = self._machine.next_event()
            if event is not h11.NEED_DATA:
                return event
            octets = await self._stream.read()
            self._machine.receive_data(octets)

    def _answer(self, head: h11.Response, body: bytes) -> Answer:
        content_type, retry_after = "", None
        for name, value in head.headers:
            if name == b"content-type":
                content_type = value.decode("latin-1").partition(";")[0].strip().lower()
            elif name == b"retry-after":
                retry_after = read_retry_after(value.decode("latin-1"), self._now())
        return Answer(head.status_code, content_type, retry_after, body)


def read_retry_after(text: str, now: datetime) -> timedelta | None:
    """The time to wait (RFC 9110, 10.2.3: seconds or a date); None for nonsense."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        if len(text) > _LONGEST_NUMBER:
            return LONGEST_RETRY_AFTER
        return min(timedelta(seconds=int(text)), LONGEST_RETRY_AFTER)
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - rare, and large

    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        wait = moment - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(wait, timedelta(0)), LONGEST_RETRY_AFTER)
