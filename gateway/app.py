"""The composition root: the one place where the server's parts are joined."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import secrets
import signal
import socket
import sys
import traceback
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography import x509

from gateway.follow import Follower, Followers
from gateway.http.device import DeviceApi, Told
from gateway.http.est import Est
from gateway.http.protocol import HttpLimits, HttpServer
from gateway.http.revocation import RevocationApi
from gateway.listen.limits import Gatekeeper, ListenerLimits
from gateway.listen.tcp import bind, serve
from gateway.log import EventLog, listen_to_libraries, tell_of_loop
from gateway.mqtt.broker import BrokerAddress, Mosquitto
from gateway.mqtt.notices import Notices, RotationAnswer
from gateway.mqtt.relay import MqttLimits, MqttPeer, Relay, RelayParts
from gateway.parts import Parts, now, opened, sole_gateway
from gateway.upkeep import Upkeep
from provisioning.ca.recover import recover
from provisioning.enrol.answer import Enrolment
from provisioning.model.errors import OutcomeUnknown, PeerError, Unavailable
from provisioning.model.events import (
    CONNECTED,
    INCIDENT,
    INTENT_VOIDED,
    READY,
    ROTATION_ANSWERED,
    STOPPED,
    STOPPING,
)
from provisioning.model.refusals import CREDENTIAL_MISSING, CREDENTIAL_UNKNOWN
from provisioning.tls.aio import TlsTransport, server_transport
from provisioning.tls.context import ServerContext
from provisioning.tls.policy import PLAIN_PSK, POLICIES
from provisioning.x509.bundle import spiffe_bundle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web

    from gateway.live import Connection
    from provisioning.ca.renew import Own
    from provisioning.config import Config, Listener
    from provisioning.model.ids import DeviceId
    from provisioning.registry.changes import Change

IN_HAND_S = 3.0
"""For requests that are being answered when the gateway stops."""

GOODBYE_S = 1.0
"""For peers to take what is on its way then."""

STOP_S = 7.0
"""After which what is left is given up: SIGTERM ends within 10 s (DESIGN)."""

RESTART_S = 1.0
"""Before a lasting task that failed is begun again."""


class App:
    """One gateway process, from its parts to its listeners."""

    def __init__(self, parts: Parts, tasks: asyncio.TaskGroup) -> None:
        self._parts = parts
        self._tasks = tasks
        self._tell = parts.log.tell
        config = parts.config
        self._contexts: dict[str, ServerContext] = {}
        self._ports: dict[str, int | None] = {"coaps": None, "operator": None}
        self._gatekeepers: list[Gatekeeper] = []
        self._servers: list[asyncio.Server] = []
        self._relays: dict[Relay, Connection] = {}
        self._stopping = False
        self._background: list[asyncio.Task[None]] = []
        self._http_servers: list[HttpServer] = []
        self._folder = config.folder
        self._broker: Mosquitto | None = None
        self._notices: Notices | None = None
        self._enrolment = Enrolment(
            registry=parts.registry,
            token=parts.token,
            hierarchy=parts.hierarchy,
            policy=config.enrolment,
            clock=now,
            random_bytes=secrets.token_bytes,
            tasks=tasks,
            on_event=self._tell,
        )
        self._follower = Follower(
            # Only one gateway serves a data directory, so an earlier one of this name
            # is gone, however it ended.
            f"{socket.gethostname()}:{config.folder}",
            parts.registry,
            parts.live,
            parts.keys,
            Followers(on_rotate=self._on_rotate, on_changed=parts.publisher.changed),
            grace=config.outages.registry_grace,
            clock=now,
            tell=self._tell,
        )
        parts.peers.in_step = lambda: self._follower.in_step
        self._upkeep = Upkeep(
            parts, clock=now, on_renewed=self._use_own, tell=self._tell
        )

    # Start and stop
    async def start(self) -> dict[str, int | None]:
        """Recover, bind, listen; the port of each listener."""
        parts = self._parts
        for intent in await recover(parts.registry, now()):
            self._tell(
                INTENT_VOIDED,
                {
                    "device": intent.device.text,
                    "serial": intent.serial.hex,
                    "why": "found unresolved at start",
                },
            )
        self._use_own(parts.own)
        sockets = {
            name: bind(name, listener.hosts, listener.port)
            for name, listener in self._listeners()
        }
        for name, bound in sockets.items():
            self._ports[name] = int(bound[0].getsockname()[1])
        await self._follower.join()
        self._start_broker()
        await parts.publisher.start()
        if self._broker is not None:
            await self._broker.ready()
        for name, bound in sockets.items():
            self._servers += await serve(bound, self._factory(name))
        for name, work in (
            ("follower", self._follower),
            ("publisher", parts.publisher),
            ("upkeep", self._upkeep),
        ):
            self._in_background(name, work.run)
        return self._ports

    def _in_background(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        self._background.append(self._tasks.create_task(self._lasting(name, work)))

    async def _lasting(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task that lasts; the outermost shell of it.

        A bug, a full disk or a broken file in one of them ends neither the gateway
        nor the connections of devices: it is told, and begun again.
        """
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - the outermost shell
                self._tell(
                    INCIDENT,
                    {
                        "where": name,
                        "error": type(error).__name__,
                        "stack": "".join(traceback.format_exception(error)),
                    },
                )
            if self._stopping:
                # Its TaskGroup may have lost the cancellation to a child's error.
                return
            await asyncio.sleep(RESTART_S)

    def _listeners(self) -> list[tuple[str, Listener]]:
        listen = self._parts.config.listen
        found = (
            ("https", listen.https),
            ("mqtts", listen.mqtts),
            ("http", listen.http),
        )
        for name, listener in found:
            if listener is None:
                self._ports[name] = None
        return [(name, listener) for name, listener in found if listener is not None]

    async def stop(self) -> None:
        """Take no more, finish what is in hand, say goodbye."""
        for server in self._servers:
            server.close()
        for relay in tuple(self._relays):
            relay.shut_down()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IN_HAND_S):
                for http in self._http_servers:
                    await http.answered()
        for gatekeeper in self._gatekeepers:
            gatekeeper.close_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                for gatekeeper in self._gatekeepers:
                    await gatekeeper.empty.wait()
        for gatekeeper in self._gatekeepers:
            gatekeeper.abort_all()
        for http in self._http_servers:
            http.close_all()
        with contextlib.suppress(Unavailable, OutcomeUnknown, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._follower.leave()
        self._stopping = True
        for task in self._background:
            task.cancel()

    # TLS
    def _use_own(self, own: Own) -> None:
        """New contexts from this server certificate; connections keep the old ones.

        A new context cannot read older tickets: a device then shakes hands in full,
        and what a ticket key protected ends with it.
        """
        parts = self._parts
        parts.own = own
        parts.publisher.use(own)
        anchors = x509.load_pem_x509_certificates(parts.hierarchy.client_cas_pem)
        config = parts.config
        for name, alpn in (("https", b"http/1.1"), ("mqtts", b"mqtt")):
            listener: Listener | None = getattr(config.listen, name)
            if listener is None:
                continue
            policy = POLICIES[config.tls_policy]
            self._contexts[name] = ServerContext(
                chain_pem=own.server_chain_pem,
                key_pem=own.server_key_pem,
                client_anchors=anchors,
                alpn=alpn,
                staple=parts.publisher.staple,
                policy=PLAIN_PSK if listener.plain_psk else policy,
            )

    def _factory(self, name: str) -> Callable[[], asyncio.Protocol]:
        if name == "http":
            return self._plain_http()
        limits = self._parts.config.limits
        gatekeeper = Gatekeeper(
            name,
            ListenerLimits(
                limits.connections,
                limits.handshakes,
                limits.handshake_deadline.total_seconds(),
            ),
            self._parts.keys,
            self._tasks,
            self._tell,
            chatty=self._parts.log.wants(CONNECTED),
        )
        self._gatekeepers.append(gatekeeper)
        upper = self._https() if name == "https" else self._mqtts()
        return lambda: server_transport(self._contexts[name], upper, gatekeeper)

    # HTTP
    def _http_limits(self) -> HttpLimits:
        limits = self._parts.config.limits
        return HttpLimits(
            header_s=limits.header_deadline.total_seconds(),
            keep_alive_s=limits.keep_alive.total_seconds(),
            body_s=limits.body_deadline.total_seconds(),
            header_bytes=limits.http_header_bytes,
            body_bytes=limits.http_body_bytes,
            connections=limits.connections,
        )

    def _https(self) -> Callable[[], asyncio.Protocol]:
        parts, limits = self._parts, self._http_limits()
        config = parts.config
        profile = config.profiles["ldevid"]
        api = DeviceApi(
            est=Est(self._enrolment, parts.hierarchy, config.profiles, self._tell),
            enrolment=self._enrolment,
            peers=parts.peers,
            live=parts.live,
            limits=limits,
            told=Told(
                {
                    name: config.url(name, self._ports[name])
                    if self._ports[name] is not None
                    else None
                    for name in ("https", "mqtts", "coaps")
                },
                profile.renew_at,
                profile.renew_jitter,
            ),
            bundle=lambda: spiffe_bundle(parts.hierarchy.anchors, 1, 3600),
            clock=now,
            tell=self._tell,
        )
        return self._http_server(api.handle, limits)

    def _http_server(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: HttpLimits,
    ) -> HttpServer:
        self._http_servers.append(HttpServer(handler, limits))
        return self._http_servers[-1]

    def _plain_http(self) -> Callable[[], asyncio.Protocol]:
        limits = self._http_limits()
        api = RevocationApi(
            self._parts.publisher,
            self._parts.config.ca,
            limits,
            clock=now,
            tell=self._tell,
        )
        return self._http_server(api.handle, limits)

    # MQTT
    def _start_broker(self) -> None:
        config = self._parts.config
        if config.listen.mqtts is None:
            return
        if config.broker.managed:
            self._broker = Mosquitto(self._folder / "run", on_event=self._tell)
            self._in_background("broker", self._broker.run)
        self._notices = Notices(
            self._broker_address(), self._on_answer, on_event=self._tell
        )
        self._in_background("notices", self._notices.run)

    def _broker_address(self) -> BrokerAddress:
        broker = self._parts.config.broker
        if self._broker is not None:
            return self._broker.address
        return BrokerAddress(host=broker.host, port=broker.port)

    def _mqtts(self) -> Callable[[], asyncio.Protocol]:
        limits = self._parts.config.limits
        relay_parts = RelayParts(
            admit=self._admit_relay,
            connect_broker=self._broker_address().connect,
            on_open=lambda _relay, _device: None,
            on_close=self._relay_closed,
            spawn=self._tasks.create_task,
            on_event=self._tell,
            limits=MqttLimits(
                connect_s=limits.mqtt_connect_deadline.total_seconds(),
                max_packet_bytes=limits.mqtt_packet_bytes,
            ),
        )
        return lambda: Relay(relay_parts)

    async def _admit_relay(self, transport: asyncio.Transport) -> MqttPeer:
        assert isinstance(transport, TlsTransport)  # noqa: S101 - narrows the type
        relay = transport.get_protocol()
        assert isinstance(relay, Relay)  # noqa: S101 - narrows the type
        established = transport.established
        proof = None if established is None else established.proof
        peer = await self._parts.peers.look(proof)
        if peer is not None:
            peer, connection = await self._parts.peers.arrived(
                transport, peer, relay.cut
            )
            if connection is not None:
                self._relays[relay] = connection
                return MqttPeer(connection.device)
            raise PeerError(peer.refusal or CREDENTIAL_UNKNOWN)
        raise PeerError(CREDENTIAL_MISSING)

    def _relay_closed(self, relay: Relay, _device: DeviceId) -> None:
        connection = self._relays.pop(relay, None)
        if connection is not None:
            self._parts.live.remove(connection)

    # What changes and devices lead to
    def _on_rotate(self, change: Change) -> None:
        if self._notices is not None and change.device is not None:
            by = change.detail.get("by")
            if isinstance(by, str):
                self._notices.ask_rotation(change.device, datetime.fromisoformat(by))

    async def _on_answer(self, answer: RotationAnswer) -> None:
        self._tell(
            ROTATION_ANSWERED,
            {
                "device": answer.device.text,
                "action": answer.action,
                "serial": answer.serial.hex if answer.serial else None,
                "reason": answer.reason,
            },
        )
        named = answer.serial or answer.generation
        if answer.action != "rotated" or named is None:
            return
        # A refusal or an absent registry loses nothing: the second connection of the
        # new credential supersedes the old one as well.
        with contextlib.suppress(PeerError, Unavailable, OutcomeUnknown):
            await self._parts.registry.rotated(answer.device, named, now())


async def run(config: Config, log: EventLog | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is in hand.

    Raises Unusable and Unavailable for what keeps it from starting.
    """
    log = log or EventLog(level=os.environ.get("BIRTHMARK_LOG", "info"))
    _allow_many_files()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    listen_to_libraries(log)
    loop.set_exception_handler(lambda _, context: tell_of_loop(log, context))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with sole_gateway(config.folder):
        async with opened(config, log) as parts:
            with contextlib.suppress(TimeoutError):
                await _serve(parts, stop)
        log.tell(STOPPED, {})


async def _serve(parts: Parts, stop: asyncio.Event) -> None:
    """From start to goodbye; TimeoutError when something would not end."""
    async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as tasks:
        app = App(parts, tasks)
        ports = await app.start()
        _settle_memory()
        ready = {**ports, "pid": os.getpid()}
        parts.log.tell(READY, ready)
        sys.stdout.write(json.dumps({"event": READY, **ready}) + "\n")
        sys.stdout.flush()
        _notify("READY=1")
        await stop.wait()
        _notify("STOPPING=1")
        parts.log.tell(STOPPING, {})
        patience.reschedule(asyncio.get_running_loop().time() + STOP_S)
        await app.stop()


def _settle_memory() -> None:
    """What is here now stays: the collector need not look through it again.

    Nothing on the way of a request makes cycles that matter; looking for them at the
    default rate costs a twentieth of the CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _allow_many_files() -> None:
    """Raise the soft limit of open files: an MQTT device takes two of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it has asked to be told."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), address)
