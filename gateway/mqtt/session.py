"""One device's MQTT conversation: what passes, what is changed, what is refused.

Pure: takes whole packets and says what becomes of them. Most pass as the bytes they
came in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gateway.mqtt.rules import (
    Aliases,
    Branch,
    judge_connect,
    judge_publish,
    may_subscribe,
)
from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    PROTOCOL_ERROR,
    TOO_MANY_REQUESTS,
    TOPIC_NOT_ALLOWED,
    Refusal,
)
from provisioning.wire.mqtt import (
    PINGREQ,
    V5,
    Ack,
    Connack,
    Connect,
    Farewell,
    Kind,
    Prop,
    Properties,
    Publish,
    Suback,
    Subscribe,
    Unsubscribe,
    number_of,
    reason_text,
    replaced,
)

if TYPE_CHECKING:
    from provisioning.model.ids import DeviceId

_REFUSED_311 = 0x80
_SERVER_UNAVAILABLE = 0x88
_SERVER_SHUTTING_DOWN = 0x8B
_ACKS = (Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP)
_SUBACK = Kind.SUBACK << 4
_DISCONNECT = Kind.DISCONNECT << 4


@dataclass(frozen=True, slots=True)
class MqttLimits:
    """What a device may use up.

    connect_s: from the connection to a whole CONNECT. admit_s: for telling who it is.
    broker_s: for the broker to take the connection and answer CONNECT. linger_s: for
    a device to take our last words. max_connect_bytes: CONNECT, which comes before
    anybody is known. max_packet_bytes: a packet of the device; told in CONNACK (5).
    max_delivery_bytes: a packet to the device; the broker is told by MQTT 5 only.
    max_buffered_bytes: in each direction, above which no more is read.
    max_topic_aliases and max_open_subscribes: what is remembered.
    """

    connect_s: float = 10.0
    admit_s: float = 5.0
    broker_s: float = 5.0
    linger_s: float = 0.5
    max_connect_bytes: int = 16_384
    max_packet_bytes: int = 262_144
    max_delivery_bytes: int = 1_048_576
    max_buffered_bytes: int = 65_536
    max_topic_aliases: int = 8
    max_open_subscribes: int = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of a packet that does not pass as it came.

    back: to the device. on: to the broker in its place. last: nothing follows it.
    """

    back: bytes = b""
    on: bytes = b""
    last: bool = False


def connack_refusal(level: int, refusal: Refusal) -> bytes:
    """The CONNACK that refuses, in the form of the level; empty where none is sent.

    MQTT 3.1.1 closes without one when the packet itself is wrong (3.1.4), and knows
    "unacceptable protocol version" for levels that nobody here speaks.
    """
    if level >= V5:
        told = ((int(Prop.REASON_STRING), reason_text(refusal)),)
        return Connack(refusal.mqtt5, properties=told).encode(level)
    if level == 0 or refusal.code in {
        "packet_malformed",
        "protocol_error",
        "body_too_large",
    }:
        return b""
    return Connack(refusal.mqtt311).encode(level)


def disconnect(level: int, refusal: Refusal, code: int | None = None) -> bytes:
    """The DISCONNECT that says why (5), empty in 3.1.1, which has none for servers.

    code: in place of the refusal's own. "Server unavailable" is for CONNACK only, so
    that DISCONNECT says "server shutting down" for it (MQTT 5, table 2-6).
    """
    if level < V5:
        return b""
    code = refusal.mqtt5 if code is None else code
    code = _SERVER_SHUTTING_DOWN if code == _SERVER_UNAVAILABLE else code
    told = ((int(Prop.REASON_STRING), reason_text(refusal)),)
    return Farewell(code, told).encode(level)


class Session:
    """A conversation from an allowed CONNECT on.

    Raises PeerError(topic_not_allowed | client_id_not_allowed | auth_method) for a
    CONNECT that is not allowed.
    """

    __slots__ = (
        "_aliases",
        "_assigned",
        "_branch",
        "_limits",
        "_open",
        "_problems",
        "_room",
        "client_id",
        "ended",
        "for_broker",
        "level",
    )

    def __init__(self, connect: Connect, device: DeviceId, limits: MqttLimits) -> None:
        self._branch = Branch.of(device)
        self.client_id = chosen = judge_connect(connect, device, self._branch)
        self.level = connect.level
        self._limits = limits
        self._assigned = None if connect.client_id else chosen
        properties = connect.properties
        self._problems = number_of(properties, Prop.REQUEST_PROBLEM_INFO) != 0
        self._room = number_of(properties, Prop.MAXIMUM_PACKET_SIZE)
        self._aliases = Aliases(0)
        self._open: dict[int, tuple[bool, ...]] | None = None
        self.ended = False
        """Whether either side has said DISCONNECT."""
        if connect.level == V5:
            room = min(
                self._room or limits.max_delivery_bytes, limits.max_delivery_bytes
            )
            properties = replaced(properties, Prop.MAXIMUM_PACKET_SIZE, room)
        self.for_broker = replace(
            connect,
            client_id=chosen,
            username=device.text,
            password=None,
            properties=properties,
        ).encode()
        """CONNECT as the broker gets it; may be forgotten once it is sent."""

    def accepted(self, packet: bytes) -> bytes:
        """The broker's CONNACK as the device gets it: with the gateway's own limits.

        Raises PeerError when it is none.
        """
        if packet[0] >> 4 != Kind.CONNACK:
            raise PeerError(PROTOCOL_ERROR)
        connack = Connack.parse(packet, self.level)
        self.ended = connack.code != 0
        if self.level != V5 or self.ended:
            return packet
        properties = connack.properties
        largest = number_of(properties, Prop.MAXIMUM_PACKET_SIZE)
        largest = min(
            largest or self._limits.max_packet_bytes, self._limits.max_packet_bytes
        )
        properties = replaced(properties, Prop.MAXIMUM_PACKET_SIZE, largest)
        aliases = number_of(properties, Prop.TOPIC_ALIAS_MAXIMUM)
        if aliases:
            aliases = min(aliases, self._limits.max_topic_aliases)
            self._aliases = Aliases(aliases)
            properties = replaced(properties, Prop.TOPIC_ALIAS_MAXIMUM, aliases)
        if self._assigned is not None:
            properties = replaced(properties, Prop.ASSIGNED_CLIENT_ID, self._assigned)
        return replace(connack, properties=properties).encode(self.level)

    def up(self, packet: bytes) -> Answer | None:
        """What becomes of a packet of the device; None: it passes as it came.

        Raises PeerError for what ends the connection.
        """
        kind = packet[0] >> 4
        if kind == Kind.PUBLISH:
            return self._publish(packet)
        if kind == Kind.SUBSCRIBE:
            return self._subscribe(packet)
        if kind in _ACKS:
            Ack.parse(packet, self.level)
        elif kind == Kind.UNSUBSCRIBE:
            Unsubscribe.parse(packet, self.level)
        elif kind == Kind.DISCONNECT:
            Farewell.parse(packet, self.level)
            self.ended = True
            return Answer(on=packet, last=True)
        elif packet != PINGREQ:
            # A second CONNECT, AUTH (no method was agreed on), or a server's packet.
            raise PeerError(PROTOCOL_ERROR)
        return None

    def _publish(self, packet: bytes) -> Answer | None:
        publish = Publish.parse(packet, self.level)
        try:
            judge_publish(publish, self._branch, self._aliases)
        except PeerError as error:
            # MQTT 3.1.1 has no way to say no to one message, nor has QoS 0.
            if error.refusal is not TOPIC_NOT_ALLOWED or self.level != V5:
                raise
            if publish.packet_id is None:
                raise
            kind = Kind.PUBACK if publish.qos == 1 else Kind.PUBREC
            # The broker never meets this packet identifier: with a reason code of
            # 0x80 or more the exchange is over (4.3.2, 4.3.3), PUBREC's too. It may
            # overtake the acknowledgement of an earlier message; clients match by ID.
            ack = Ack(kind, publish.packet_id, error.refusal.mqtt5)
            told = replace(ack, properties=self._told(error.refusal))
            return Answer(back=self._fitting(told.encode(V5), ack.encode(V5)))
        return None

    def _subscribe(self, packet: bytes) -> Answer | None:
        subscribe = Subscribe.parse(packet, self.level)
        allowed = tuple(may_subscribe(f, self._branch) for f, _ in subscribe.filters)
        if all(allowed):
            return None
        if not any(allowed):
            codes = bytes((self._refused,)) * len(allowed)
            suback = Suback(subscribe.packet_id, codes)
            told = replace(suback, properties=self._told(TOPIC_NOT_ALLOWED))
            return Answer(
                back=self._fitting(told.encode(self.level), suback.encode(self.level))
            )
        if self._open is None:
            self._open = {}
        if subscribe.packet_id in self._open:
            raise PeerError(PROTOCOL_ERROR)  # its identifier is in use (2.2.1)
        if len(self._open) >= self._limits.max_open_subscribes:
            raise PeerError(TOO_MANY_REQUESTS)
        self._open[subscribe.packet_id] = allowed
        kept = tuple(
            item for item, yes in zip(subscribe.filters, allowed, strict=True) if yes
        )
        return Answer(on=replace(subscribe, filters=kept).encode(self.level))

    def down(self, packet: bytes) -> bytes:
        """A packet of the broker as the device gets it.

        Raises PeerError for one that breaks the protocol, which is the broker's fault.
        """
        first = packet[0]
        if first == _SUBACK and self._open:
            return self._suback(packet, self._open)
        if first == _DISCONNECT:
            self.ended = True
        return packet

    def _suback(self, packet: bytes, waiting: dict[int, tuple[bool, ...]]) -> bytes:
        suback = Suback.parse(packet, self.level)
        allowed = waiting.pop(suback.packet_id, None)
        if allowed is None:
            return packet
        if sum(allowed) != len(suback.codes):
            raise PeerError(PROTOCOL_ERROR)
        granted = iter(suback.codes)
        codes = bytes(next(granted) if yes else self._refused for yes in allowed)
        return replace(suback, codes=codes).encode(self.level)

    @property
    def _refused(self) -> int:
        return TOPIC_NOT_ALLOWED.mqtt5 if self.level == V5 else _REFUSED_311

    def _told(self, refusal: Refusal) -> Properties:
        """The sentence, unless the client asked to be spared it (3.1.2.11.7)."""
        if self.level != V5 or not self._problems:
            return ()
        return ((int(Prop.REASON_STRING), reason_text(refusal)),)

    def _fitting(self, told: bytes, bare: bytes) -> bytes:
        """Without the sentence where the client's largest packet leaves no room."""
        return bare if self._room is not None and len(told) > self._room else told
