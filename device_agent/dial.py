"""Connections to the gateway: who it must be, who we are, which session to resume."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from device_agent.est import Gateway, UnverifiedGateway
from device_agent.failures import NotNowError, UntrustedError
from device_agent.http import GOODBYE_S, HttpConnection
from device_agent.keys import beginning_of, end_of_certificate
from device_agent.sessions import tag_of
from provisioning.tls.aio import HandshakeError, ServerUntrustedError, open_stream
from provisioning.tls.context import ClientContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from device_agent.address import Endpoint
    from device_agent.clock import Clock
    from device_agent.sessions import Sessions
    from provisioning.tls.aio import Stream
    from provisioning.tls.context import ClientCertificate, ClientPsk

HTTP: Final = (b"http/1.1",)
MQTT: Final = (b"mqtt",)
CONNECT_S: Final = 15.0

_NOT_TAKEN: Final = frozenset(
    {
        "unknown_ca",
        "bad_certificate",
        "unsupported_certificate",
        "certificate_unknown",
        "certificate_expired",
        "certificate_revoked",
        "access_denied",
        "decrypt_error",
        "bad_record_mac",
        "unknown_psk_identity",
        "illegal_parameter",
    }
)
"""Alerts by which a gateway says that it was there and did not like the credential."""


class Dialer:
    """Opens verified connections with a credential, and keeps their sessions."""

    def __init__(self, anchors_pem: bytes, clock: Clock, sessions: Sessions) -> None:
        self._anchors_pem = anchors_pem
        self._sessions = sessions
        self.clock = clock

    async def open(
        self,
        endpoint: Endpoint,
        credential: ClientCertificate | ClientPsk | None,
        alpn: tuple[bytes, ...],
    ) -> Stream:
        """A stream to the gateway. Raises NotNowError, UntrustedError.

        A certificate that is not valid yet is judged at its own beginning: its signer
        has been there, so it is our clock that is behind. What has expired stays
        expired, since the time of judgement only moves forward.
        """
        now = self.clock.now()
        try:
            stream = await self._verified(endpoint, credential, alpn, now)
        except UntrustedError:
            beginning = await _beginning(endpoint, alpn)
            if beginning is None or beginning <= now:
                raise
            stream = await self._verified(endpoint, credential, alpn, beginning)
        self._believe(stream.established.server_chain)
        return stream

    async def _verified(
        self,
        endpoint: Endpoint,
        credential: ClientCertificate | ClientPsk | None,
        alpn: tuple[bytes, ...],
        at: datetime,
    ) -> Stream:
        context = ClientContext(
            anchors_pem=self._anchors_pem,
            credential=credential,
            alpn=alpn,
            verify_at=at,
        )
        session = None
        if credential is not None:
            session = self._sessions.take(endpoint, tag_of(credential))
        return await _dialled(endpoint, context, session)

    def _believe(self, chain: tuple[bytes, ...]) -> None:
        """It is later than the beginning of what was just verified."""
        if not chain:
            return  # a resumed session shows none
        try:
            self.clock.raise_to(beginning_of(chain))
        except OSError:
            return  # it was raised in memory, which is what this run needs

    def keep_session(
        self,
        endpoint: Endpoint,
        credential: ClientCertificate | ClientPsk | None,
        stream: Stream,
    ) -> None:
        """Keep the newest ticket; to be called while the connection is open."""
        if credential is None:
            return
        try:
            self._sessions.put(endpoint, tag_of(credential), stream.session())
        except OSError:
            return  # a full disk costs a full handshake, not the connection

    @asynccontextmanager
    async def gateway(
        self, endpoint: Endpoint, credential: ClientCertificate | ClientPsk | None
    ) -> AsyncIterator[Gateway]:
        """The gateway by HTTPS, verified; `credential` None proves nothing to it."""
        stream = await self.open(endpoint, credential, HTTP)
        http = HttpConnection(stream, str(endpoint), self.clock.now)
        try:
            yield Gateway(http, _end_of(stream.established.server_chain))
            self.keep_session(endpoint, credential, stream)
        finally:
            await http.close()


@asynccontextmanager
async def unverified(
    endpoint: Endpoint, clock: Clock
) -> AsyncIterator[UnverifiedGateway]:
    """Whoever listens there, to be asked for nothing but its CA certificates."""
    context = ClientContext(anchors_pem=None, alpn=HTTP)
    stream = await _dialled(endpoint, context, None)
    http = HttpConnection(stream, str(endpoint), clock.now)
    try:
        yield UnverifiedGateway(http)
    finally:
        await http.close()


async def _beginning(endpoint: Endpoint, alpn: tuple[bytes, ...]) -> datetime | None:
    """When the certificates there began, by their own word; nothing is sent to them."""
    context = ClientContext(anchors_pem=None, alpn=alpn)
    try:
        stream = await _dialled(endpoint, context, None)
    except (NotNowError, UntrustedError):
        return None
    chain = stream.established.server_chain
    try:
        async with asyncio.timeout(GOODBYE_S):
            await stream.close()
        return beginning_of(chain) if chain else None
    except (ValueError, OSError):
        return None


def _end_of(chain: tuple[bytes, ...]) -> datetime | None:
    return end_of_certificate(chain[0]) if chain else None


async def _dialled(
    endpoint: Endpoint, context: ClientContext, session: bytes | None
) -> Stream:
    try:
        return await open_stream(
            endpoint.host,
            endpoint.port,
            context,
            session=session,
            deadline_s=CONNECT_S,
        )
    except ServerUntrustedError as error:
        text = f"the server at {endpoint} is not the one it should be: {error.reason}"
        raise UntrustedError(text) from error
    except HandshakeError as error:
        said = f" ({error.alert})" if error.alert else ""
        raise NotNowError(
            f"the handshake with {endpoint} failed: {error.reason}{said}",
            handshake=error.alert in _NOT_TAKEN,
        ) from error
    except TimeoutError as error:
        text = f"{endpoint} did not answer within {CONNECT_S:g} s"
        raise NotNowError(text) from error
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise NotNowError(f"{endpoint} is not reachable: {why}") from error
