"""What a device may ask on 8443: EST, whoami, config, its next PSK, the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.http.answers import document, error_answer
from gateway.http.est import EST_PREFIX, Est
from gateway.http.protocol import HttpConnection, read_body
from gateway.listen.limits import address_of
from gateway.peers import admitted
from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    METHOD_NOT_ALLOWED,
    OPERATION_UNKNOWN,
)
from provisioning.tls.aio import TlsTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from aiohttp import web

    from gateway.http.protocol import HttpLimits
    from gateway.live import Connection, Live
    from gateway.peers import Peer, Peers
    from provisioning.enrol.answer import Enrolment
    from provisioning.model.credentials import Standing
    from provisioning.model.refusals import Refusal

    Route = Callable[["Asked"], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: on which connection, and by whom."""

    request: web.BaseRequest
    transport: TlsTransport
    peer: Peer | None


@dataclass(frozen=True, slots=True)
class Told:
    """What `config` tells: all that a device need not know beforehand."""

    endpoints: Mapping[str, str | None]
    renew_at: float
    renew_jitter: float


class DeviceApi:
    """Routes requests of devices; the outermost shell of each."""

    def __init__(  # noqa: PLR0913 - the parts it joins, each by its name
        self,
        *,
        est: Est,
        enrolment: Enrolment,
        peers: Peers,
        live: Live,
        limits: HttpLimits,
        told: Told,
        bundle: Callable[[], Mapping[str, object]],
        clock: Callable[[], datetime],
        tell: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._est = est
        self._enrolment = enrolment
        self._peers = peers
        self._live = live
        self._limits = limits
        self._told = told
        self._bundle = bundle
        self._clock = clock
        self._tell = tell
        self._routes: dict[str, dict[str, Route]] = {
            "/device/v1/whoami": {"GET": self._whoami},
            "/device/v1/config": {"GET": self._config},
            "/device/v1/psk": {"POST": self._psk},
            "/bundle.json": {"GET": self._bundle_json},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; whatever goes wrong becomes an answer too."""
        transport = request.transport
        if not isinstance(transport, TlsTransport):
            raise ConnectionResetError("the connection is gone")
        device: str | None = None
        try:
            peer = await self._peer(request, transport)
            if peer is not None and peer.standing is not None:
                device = peer.standing.credential.device.text
            asked = Asked(request, transport, peer)
            path = request.path
            if path.startswith(EST_PREFIX):
                body = await read_body(request, self._limits)
                return await self._est.answer(asked, path, body)
            return await self._route(path, request.method)(asked)
        except Exception as error:  # noqa: BLE001 - the outermost shell of a request
            return error_answer(
                request,
                error,
                self._tell,
                device=device,
                address=address_of(transport),
            )

    def _route(self, path: str, method: str) -> Route:
        methods = self._routes.get(path)
        if methods is None:
            raise PeerError(OPERATION_UNKNOWN)
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join(methods)
            raise PeerError(
                METHOD_NOT_ALLOWED, f"This address takes {allowed}, not {method[:20]}."
            )
        return route

    async def _peer(
        self, request: web.BaseRequest, transport: TlsTransport
    ) -> Peer | None:
        established = transport.established
        proof = None if established is None else established.proof
        peer = await self._peers.look(proof)
        if peer is None or transport.identity is not None or peer.refusal is not None:
            return peer
        connection = request.protocol
        assert isinstance(connection, HttpConnection)  # noqa: S101 - narrows

        def cut(_: Refusal) -> None:
            transport.close()

        peer, made = await self._peers.arrived(transport, peer, cut)
        if made is not None:
            # aiohttp asks for one request of a connection at a time; what failed
            # before here is done again for the next one.
            transport.identity = proof
            self._watch(connection, made)
        return peer

    def _watch(self, connection: HttpConnection, made: Connection) -> None:
        if connection.transport is None:
            self._live.remove(made)
        else:
            connection.on_lost = lambda: self._live.remove(made)

    # What there is
    async def _whoami(self, asked: Asked) -> web.Response:
        established = asked.transport.established
        peer = asked.peer
        credential = None
        if peer is not None:
            credential = admitted(peer).credential
        assert established is not None  # noqa: S101 - the handshake is done
        rotate = peer is not None and rotation_due(admitted(peer))
        ends = credential.not_after if credential else None
        return document(
            {
                "device": credential.device.text if credential else None,
                "auth": peer.auth.value if peer else None,
                "resumed": established.resumed,
                "tls": established.version,
                "cipher": established.cipher,
                "group": established.group,
                "serial": credential.serial.hex
                if credential and credential.serial
                else None,
                "generation": credential.generation if credential else None,
                "not_after": rfc3339(ends) if ends else None,
                "rotate": rotate,
            }
        )

    async def _config(self, asked: Asked) -> web.Response:
        standing = admitted(asked.peer)
        return document(
            {
                "device": standing.credential.device.text,
                "endpoints": dict(self._told.endpoints),
                "renew": {
                    "at": self._told.renew_at,
                    "jitter": self._told.renew_jitter,
                },
                "time": rfc3339(self._clock()),
            }
        )

    async def _psk(self, asked: Asked) -> web.Response:
        standing = admitted(asked.peer)
        assert asked.peer is not None  # noqa: S101 - admitted raises for None
        await read_body(asked.request, self._limits)
        identity, key = await self._enrolment.next_psk(standing, asked.peer.auth)
        return document({"identity": str(identity), "key": key.hex})

    async def _bundle_json(self, _: Asked) -> web.Response:
        return document(self._bundle())


def rotation_due(standing: Standing) -> bool:
    """Whether the operator has asked this device to rotate and it has not yet."""
    return standing.rotate_by is not None


def rfc3339(moment: datetime) -> str:
    """A time as answers carry it: UTC, whole seconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
