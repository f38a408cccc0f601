"""Between a device's TLS connection and the broker: every packet looked at once.

A relay is two protocols back to back and no task while it idles, since there may be
tens of thousands. Nothing is read that could not be passed on: when one side's
buffer is over its limit, the other is not read, so that a device that stops
reading costs its limit and no more.
"""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from gateway.mqtt.session import (
    MqttLimits,
    Session,
    connack_refusal,
    disconnect,
)
from provisioning.model.errors import (
    OutcomeUnknown,
    PeerError,
    Unavailable,
    Unusable,
)
from provisioning.model.events import INCIDENT, REFUSED
from provisioning.model.refusals import (
    AWAY,
    INTERNAL,
    OUT_OF_ORDER,
    PROTOCOL_ERROR,
    SESSION_TAKEN_OVER,
    Refusal,
)
from provisioning.wire.mqtt import Connect, Kind, Splitter, level_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from provisioning.model.ids import DeviceId

__all__ = ["MqttLimits", "MqttPeer", "Relay", "RelayParts"]

_ADMINISTRATIVE_ACTION = 0x98
_CONNECT_HEAD = 16  # octets that show a CONNECT's protocol level


@dataclass(frozen=True, slots=True)
class MqttPeer:
    """Who the TLS peer is, known, in good standing, not just a valid chain."""

    device: DeviceId


def _no_event(_name: str, _fields: Mapping[str, object]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class RelayParts:
    """What the composition root hands to every relay.

    admit: who the peer of this transport is; PeerError, Unavailable or Unusable
    otherwise. connect_broker: as `loop.create_connection`, with a protocol factory.
    on_open: called in the same step in which `admit` answered; may raise PeerError
    when the device was cut meanwhile. on_close: once for each on_open, when the
    device's connection is gone. spawn: as `TaskGroup.create_task`; tasks end soon.
    names: which relay has which client identifier; owned by the relays of one loop.
    """

    admit: Callable[[asyncio.Transport], Awaitable[MqttPeer]]
    connect_broker: Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]
    on_open: Callable[[Relay, DeviceId], None]
    on_close: Callable[[Relay, DeviceId], None]
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    on_event: Callable[[str, Mapping[str, object]], None] = _no_event
    limits: MqttLimits = field(default_factory=MqttLimits)
    names: dict[str, Relay] = field(default_factory=dict)


class _State(Enum):
    WAITING = auto()  # for CONNECT
    OPENING = auto()  # admission, then the broker's CONNACK
    OPEN = auto()
    ENDED = auto()


class Relay(asyncio.Protocol):
    """The device's side, on a TlsTransport; owns the broker's side."""

    __slots__ = (
        "__weakref__",
        "_answers_wait",
        "_broker",
        "_broker_full",
        "_device",
        "_device_full",
        "_down",
        "_level",
        "_name",
        "_parts",
        "_peer",
        "_reading",
        "_session",
        "_state",
        "_task",
        "_timer",
        "_told",
        "_up",
    )

    def __init__(self, parts: RelayParts) -> None:
        self._parts = parts
        self._state = _State.WAITING
        self._device: asyncio.Transport | None = None
        self._broker: asyncio.Transport | None = None
        self._session: Session | None = None
        self._peer: DeviceId | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._up = Splitter(parts.limits.max_connect_bytes)
        self._down = Splitter(parts.limits.max_delivery_bytes)
        self._level = 0
        self._name: str | None = None
        self._broker_full = False
        self._device_full = False
        self._answers_wait = False
        self._reading = True
        self._told = False

    def cut(self, refusal: Refusal) -> None:
        """End the connection because the device may no longer be here.

        MQTT 5 devices are told the refusal with 0x98, administrative action.
        """
        if self._state is _State.OPEN:
            self._end(disconnect(self._level, refusal, _ADMINISTRATIVE_ACTION))
        else:
            self._refuse(refusal)

    def shut_down(self) -> None:
        """End the connection because the gateway stops."""
        self._refuse(AWAY)

    # The device's side ----------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        device = cast("asyncio.Transport", transport)
        device.set_write_buffer_limits(high=self._parts.limits.max_buffered_bytes)
        self._device = device
        self._wait(self._parts.limits.connect_s)

    @override
    def data_received(self, data: bytes) -> None:
        if self._state is not _State.ENDED:
            self._up.receive_data(data)
            self._pump()

    @override
    def pause_writing(self) -> None:
        self._device_full = True
        if self._broker is not None:
            self._broker.pause_reading()

    @override
    def resume_writing(self) -> None:
        self._device_full = False
        if self._broker is not None and not self._broker.is_closing():
            self._broker.resume_reading()
        if self._answers_wait:
            self._answers_wait = False
            self._pump()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        if self._task is not None:
            self._task.cancel()
        if self._state is _State.OPEN:
            self._pass_rest()
        self._state = _State.ENDED
        self._device = None
        self._up = self._down = Splitter(0)
        if self._broker is not None:
            self._close_broker(self._broker)
        if self._name is not None and self._parts.names.get(self._name) is self:
            del self._parts.names[self._name]
        peer, self._peer = self._peer, None
        if peer is not None:
            self._parts.on_close(self, peer)

    def _pump(self) -> None:
        """Look at what the device has sent, as far as it can be passed on."""
        try:
            if self._state is _State.WAITING:
                self._take_connect()
            elif self._state is _State.OPEN:
                self._pass_up()
        except PeerError as error:
            self._refuse(error.refusal)
        self._read_device()

    def _read_device(self) -> None:
        device = self._device
        if device is None or device.is_closing():
            return
        reading = not (
            self._state is _State.OPENING or self._broker_full or self._answers_wait
        )
        if reading == self._reading:
            return
        self._reading = reading
        if reading:
            device.resume_reading()
        else:
            device.pause_reading()

    def _take_connect(self) -> None:
        try:
            packet = self._up.next_packet()
        except PeerError:
            self._level = level_of(self._up.begun(_CONNECT_HEAD))
            raise
        if packet is None:
            return
        if packet[0] >> 4 != Kind.CONNECT:
            raise PeerError(PROTOCOL_ERROR)
        self._level = level_of(packet)
        self._state = _State.OPENING
        self._cancel_timer()
        self._up.limit = self._parts.limits.max_packet_bytes
        self._task = self._parts.spawn(self._open(packet))

    def _pass_up(self) -> None:
        session, broker, device = self._session, self._broker, self._device
        if session is None or broker is None or device is None:
            return
        on: list[bytes] = []
        last = False
        try:
            while not (last or self._broker_full or self._answers_wait):
                packet = self._up.next_packet()
                if packet is None:
                    break
                answer = session.up(packet)
                if answer is None:
                    on.append(packet)
                    continue
                last = answer.last
                if answer.on:
                    on.append(answer.on)
                if answer.back:
                    self._note_refusal()
                    device.write(answer.back)
                    # No more is read that would make answers nobody takes.
                    self._answers_wait = self._device_full
        finally:
            if on:
                broker.write(on[0] if len(on) == 1 else b"".join(on))
        if last:
            self._end(b"")

    def _pass_rest(self) -> None:
        """Have the broker get what came whole before the device's connection ended."""
        self._broker_full = self._answers_wait = False
        broker, session = self._broker, self._session
        if broker is None or session is None:
            return
        try:
            while (packet := self._up.next_packet()) is not None:
                answer = session.up(packet)
                broker.write(packet if answer is None else answer.on)
        except PeerError:
            return  # there is nobody to be told

    def _note_refusal(self, refusal: Refusal | None = None) -> None:
        """Tell the log once a connection: what a device repeats must not fill it."""
        if self._told:
            return
        self._told = True
        device = self._device
        peer = None if device is None else device.get_extra_info("peername")
        fields: dict[str, object] = {
            "code": "topic_not_allowed" if refusal is None else refusal.code,
            "operation": "mqtt",
            "address": peer[0] if isinstance(peer, tuple) and peer else None,
            "device": None if self._peer is None else self._peer.text,
        }
        self._parts.on_event(REFUSED, fields)

    # Opening --------------------------------------------------------------------

    async def _open(self, packet: bytes) -> None:
        """Admit the peer, judge its CONNECT, hand it to the broker."""
        try:
            await self._try_open(packet)
        except PeerError as error:
            self._refuse(error.refusal)
        except (Unavailable, OutcomeUnknown, OSError, TimeoutError):
            self._refuse(AWAY)
        except Unusable:
            self._refuse(OUT_OF_ORDER)
        except Exception as error:  # noqa: BLE001 - the outermost shell of this task
            self._parts.on_event(
                INCIDENT,
                {
                    "where": "mqtt",
                    "error": repr(error),
                    "stack": traceback.format_exc(),
                },
            )
            self._refuse(INTERNAL)
        finally:
            self._task = None

    async def _try_open(self, packet: bytes) -> None:
        device, limits = self._device, self._parts.limits
        if device is None:
            return
        connect = Connect.parse(packet)
        async with asyncio.timeout(limits.admit_s):
            peer = await self._parts.admit(device)
        # Told even where the connection has ended meanwhile, so that whatever `admit`
        # noted down is taken back by `on_close`.
        self._parts.on_open(self, peer.device)
        if self._device is None:
            self._parts.on_close(self, peer.device)
            return
        self._peer = peer.device
        if self._has_ended():
            return
        session = Session(connect, peer.device, limits)
        async with asyncio.timeout(limits.broker_s):
            await self._parts.connect_broker(lambda: _BrokerSide(self))
        if self._has_ended() or self._broker is None:
            return
        self._session = session
        self._take_name(session.client_id)
        self._broker.write(session.for_broker)
        session.for_broker = b""
        self._wait(limits.broker_s)

    def _take_name(self, name: str) -> None:
        """End an earlier connection of that name, as the broker is about to.

        mosquitto 2.0.11 closes it without the DISCONNECT that MQTT 5 asks for (4.13).
        """
        earlier = self._parts.names.get(name)
        self._name = name
        self._parts.names[name] = self
        if earlier is not None:
            earlier._refuse(SESSION_TAKEN_OVER)  # noqa: SLF001 - one of our own

    def _has_ended(self) -> bool:
        return self._state is _State.ENDED

    # The broker's side ------------------------------------------------------------

    def _broker_made(self, transport: asyncio.Transport) -> None:
        if self._state is not _State.OPENING:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=self._parts.limits.max_buffered_bytes)
        self._broker = transport

    def _broker_sent(self, data: bytes) -> None:
        device, session = self._device, self._session
        if self._state is _State.ENDED or device is None or session is None:
            return
        self._down.receive_data(data)
        out: list[bytes] = []
        opened = broken = False
        try:
            while (packet := self._down.next_packet()) is not None:
                if self._state is _State.OPENING:
                    out.append(session.accepted(packet))
                    self._cancel_timer()
                    self._state = _State.OPEN
                    opened = True
                else:
                    out.append(session.down(packet))
        except PeerError as error:
            self._note_refusal(error.refusal)
            broken = True
        if out:
            device.write(out[0] if len(out) == 1 else b"".join(out))
        if broken:
            self._refuse(AWAY)  # the broker's fault, or one that speaks no MQTT
        elif session.ended:
            self._end(b"")
        elif opened:
            self._pump()

    def _broker_lost(self) -> None:
        self._broker = None
        self._broker_full = False
        self._refuse(AWAY)

    def _broker_paused(self, full: bool) -> None:
        self._broker_full = full
        if full:
            self._read_device()
        else:
            self._pump()

    # Ending -----------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        self._cancel_timer()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._late)

    def _late(self) -> None:
        """The deadline of CONNECT, or of the broker's answer, has passed."""
        self._timer = None
        if self._state is _State.WAITING:
            self._end(b"")  # nothing was said that could be answered
        else:
            self._refuse(AWAY)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection and say why, as far as the protocol version has words."""
        if self._state is _State.ENDED:
            return
        if refusal is not AWAY:
            self._note_refusal(refusal)
        if self._state is _State.OPEN:
            self._end(disconnect(self._level, refusal))
        else:
            self._end(connack_refusal(self._level, refusal))

    def _end(self, last_words: bytes) -> None:
        """Say the last words and close; nothing passes from now on."""
        if self._state is _State.ENDED:
            return
        self._state = _State.ENDED
        self._cancel_timer()
        if self._broker is not None:
            self._close_broker(self._broker)
        device = self._device
        if device is None:
            return
        if last_words:
            device.write(last_words)
        device.close()
        # A device that does not read would keep its connection, and what it may not
        # have any more, for as long as TCP is patient.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._parts.limits.linger_s, device.abort)

    def _close_broker(self, broker: asyncio.Transport) -> None:
        """Let the broker read what is on its way, but not for ever."""
        broker.close()
        if broker.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            loop.call_later(self._parts.limits.broker_s, broker.abort)


class _BrokerSide(asyncio.Protocol):
    """The other end of a relay; hands everything to it."""

    __slots__ = ("_relay",)

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._relay._broker_made(  # noqa: SLF001 - two halves of one thing
            cast("asyncio.Transport", transport)
        )

    @override
    def data_received(self, data: bytes) -> None:
        self._relay._broker_sent(data)  # noqa: SLF001 - two halves of one thing

    @override
    def pause_writing(self) -> None:
        self._relay._broker_paused(True)  # noqa: SLF001 - two halves of one thing

    @override
    def resume_writing(self) -> None:
        self._relay._broker_paused(False)  # noqa: SLF001 - two halves of one thing

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._relay._broker_lost()  # noqa: SLF001 - two halves of one thing
