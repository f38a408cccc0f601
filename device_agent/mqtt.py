"""The agent's MQTT 5 connection: rotation notices in, answers out.

Its session outlives the connection, so that a notice sent while the device slept is
waiting for it. It needs a stream and a device, and knows no files and no TLS.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from device_agent.failures import NotNowError, RefusedError
from provisioning.model.errors import PeerError
from provisioning.wire import mqtt as wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from device_agent.http import ByteStream
    from provisioning.model.ids import DeviceId

KEEP_ALIVE_S: Final = 60
SESSION_EXPIRY_S: Final = 7 * 24 * 3600
LARGEST_PACKET: Final = 16 * 1024
ANSWER_S: Final = 20.0
GOODBYE_S: Final = 2.0

_FAILURE: Final = 0x80
_LATER: Final = frozenset({0x80, 0x83, 0x88, 0x89, 0x8D, 0x8E, 0x93, 0x97, 0x9F})
"""Reason codes (MQTT 5, 2.4) that time heals; 0x8E is another agent's takeover."""


@dataclass(frozen=True, slots=True)
class Notice:
    """The gateway asks for a rotation. by, campaign: as it said, to tell them apart."""

    by: str | None
    campaign: str | None


def read_notice(payload: bytes) -> Notice | None:
    """A rotation notice, None for any other message."""
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("action") != "rotate":
        return None
    by, campaign = told.get("by"), told.get("campaign")
    return Notice(
        by if isinstance(by, str) else None,
        campaign if isinstance(campaign, str) else None,
    )


class MqttLink:
    """One connection. `open`, then `serve` until it ends; `publish` meanwhile.

    Everything that ends it is RefusedError or NotNowError.
    """

    def __init__(
        self, stream: ByteStream, device: DeviceId, on_notice: Callable[[Notice], None]
    ) -> None:
        self._stream = stream
        self._device = device
        self._on_notice = on_notice
        self._splitter = wire.Splitter(LARGEST_PACKET)
        self._keep_alive_s = float(KEEP_ALIVE_S)
        self._heard_at = 0.0
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[int]] = {}  # owned by `serve`

    async def open(self) -> None:
        """CONNECT and SUBSCRIBE, both answered."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._send(self._connect())
                self._welcome(await self._packet())
                topic = f"devices/{self._device}/down/credential"
                subscribe = wire.Subscribe(self._new_id(), ((topic, 1),))
                await self._send(subscribe.encode(wire.V5))
                while not await self._take(await self._packet()):
                    pass  # what waited for us may come before the SUBACK (3.8.4)
        except TimeoutError as error:
            raise NotNowError("the MQTT broker was too slow to answer") from error

    async def serve(self) -> None:
        """Take messages and keep the connection alive, until it ends by an error."""
        loop = asyncio.get_running_loop()
        every = max(self._keep_alive_s * 0.6, 1.0)
        self._heard_at = loop.time()
        ping_at = self._heard_at + every
        while True:
            try:
                async with asyncio.timeout_at(ping_at):
                    packet = await self._packet()
            except TimeoutError:
                if loop.time() - self._heard_at > 2 * every:
                    raise NotNowError("the MQTT connection is silent") from None
                ping_at = loop.time() + every
                await self._send(wire.PINGREQ)
            else:
                await self._take(packet)

    async def publish(self, payload: dict[str, object]) -> None:
        """Answer on the device's credential topic at QoS 1; `serve` must be running.

        Raises NotNowError, RefusedError (MQTT 5 says when a message is not allowed).
        """
        number = self._new_id()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        packet = wire.build_publish(
            f"devices/{self._device}/up/credential",
            json.dumps(payload).encode(),
            level=wire.V5,
            qos=1,
            packet_id=number,
        )
        try:
            await self._send(packet)
            async with asyncio.timeout(ANSWER_S):
                code = await future
        except TimeoutError as error:
            raise NotNowError("the MQTT broker does not acknowledge") from error
        finally:
            self._waiting.pop(number, None)
        if code >= _FAILURE:
            raise RefusedError(f"mqtt_{code:02x}", "the broker refused the answer")

    async def close(self) -> None:
        """DISCONNECT and end the connection, without waiting long."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._stream.write(wire.Farewell().encode(wire.V5))
                await self._stream.close()
        except (OSError, TimeoutError):
            return  # it is gone, which is what was wanted

    def _connect(self) -> bytes:
        properties: wire.Properties = (
            (wire.Prop.SESSION_EXPIRY, SESSION_EXPIRY_S),
            (wire.Prop.MAXIMUM_PACKET_SIZE, LARGEST_PACKET),
        )
        return wire.Connect(
            f"{self._device}:agent",
            level=wire.V5,
            clean=False,
            keep_alive_s=KEEP_ALIVE_S,
            properties=properties,
        ).encode()

    def _welcome(self, packet: bytes) -> None:
        """Read the CONNACK."""
        if wire.kind_of(packet) != wire.Kind.CONNACK:
            raise NotNowError("the MQTT broker does not begin with CONNACK")
        try:
            told = wire.Connack.parse(packet, wire.V5)
        except PeerError as error:
            raise NotNowError(f"the MQTT broker's CONNACK: {error.detail}") from error
        if told.code:
            raise _refusal(told.code, told.properties)
        keep_alive = wire.number_of(told.properties, wire.Prop.SERVER_KEEP_ALIVE)
        if keep_alive is not None:
            # 0 switches it off; we still want to notice a dead connection.
            self._keep_alive_s = float(keep_alive or KEEP_ALIVE_S)

    async def _packet(self) -> bytes:
        try:
            while (packet := self._splitter.next_packet()) is None:
                octets = await self._stream.read()
                if not octets:
                    raise NotNowError("the MQTT connection ended")
                self._heard_at = asyncio.get_running_loop().time()
                self._splitter.receive_data(octets)
        except PeerError as error:
            raise NotNowError(f"the MQTT broker's packet: {error.detail}") from error
        except OSError as error:
            raise NotNowError("the MQTT connection ended") from error
        return packet

    async def _take(self, packet: bytes) -> bool:
        """Act on a packet; True if it was the SUBACK."""
        kind = wire.kind_of(packet)
        try:
            if kind == wire.Kind.PUBLISH:
                await self._message(packet)
            elif kind == wire.Kind.PUBACK:
                ack = wire.Ack.parse(packet, wire.V5)
                future = self._waiting.get(ack.packet_id)
                if future is not None and not future.done():
                    future.set_result(ack.code)
            elif kind == wire.Kind.SUBACK:
                codes = wire.Suback.parse(packet, wire.V5).codes
                if any(code >= _FAILURE for code in codes):
                    raise _refusal(max(codes), ())
                return True
            elif kind == wire.Kind.DISCONNECT:
                goodbye = wire.Farewell.parse(packet, wire.V5)
                raise _refusal(goodbye.code, goodbye.properties)
            elif kind != wire.Kind.PINGRESP:
                raise NotNowError(
                    "the MQTT broker sent a packet that is not its to send"
                )
        except PeerError as error:
            raise NotNowError(f"the MQTT broker's packet: {error.detail}") from error
        return False

    async def _message(self, packet: bytes) -> None:
        message = wire.Publish.parse(packet, wire.V5)
        if message.qos > 1:
            raise NotNowError("the MQTT broker sent QoS 2, which nobody asked for")
        if message.topic == f"devices/{self._device}/down/credential":
            notice = read_notice(packet[message.payload_at :])
            if notice is not None:
                self._on_notice(notice)
        if message.packet_id is not None:
            # Acknowledged when noted, not when obeyed: what a power cut takes from us
            # is seen again in `whoami`.
            ack = wire.Ack(wire.Kind.PUBACK, message.packet_id)
            await self._send(ack.encode(wire.V5))

    async def _send(self, octets: bytes) -> None:
        try:
            await self._stream.write(octets)
        except OSError as error:
            raise NotNowError("the MQTT connection ended") from error

    def _new_id(self) -> int:
        number = self._next_id
        self._next_id = number % 0xFFFF + 1
        return number


def _refusal(code: int, properties: wire.Properties) -> RefusedError | NotNowError:
    """What a reason code of the gateway or the broker means for us."""
    text = wire.text_of(properties, wire.Prop.REASON_STRING) or ""
    refusal = wire.read_reason_text(text)
    if refusal is not None:
        if refusal.retryable:
            return NotNowError(refusal.sentence)
        return RefusedError(refusal.code, refusal.sentence)
    if code < _FAILURE or code in _LATER:
        return NotNowError(f"the MQTT broker said goodbye (reason 0x{code:02x})")
    return RefusedError(f"mqtt_{code:02x}", f"MQTT was refused (reason 0x{code:02x})")
