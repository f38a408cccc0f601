"""MQTT 3.1.1 and 5 packets, both directions, without any I/O.

A `Splitter` turns a byte stream into whole packets, as bytes; the classes read and
build them. Nonsense raises PeerError(packet_malformed | protocol_version |
body_too_large) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from provisioning.model.errors import PeerError
from provisioning.model.refusals import BODY_TOO_LARGE, TABLE, Refusal
from provisioning.wire.mqtt_connect import Connack, Connect, Will, body_at, level_of
from provisioning.wire.mqtt_fields import (
    V5,
    V311,
    Kind,
    Prop,
    Properties,
    Value,
    malformed,
    number_of,
    put_packet,
    put_properties,
    put_text,
    replaced,
    take_byte,
    take_properties,
    take_text,
    take_two,
    text_of,
)

__all__ = [
    "PINGREQ",
    "PINGRESP",
    "V5",
    "V311",
    "Ack",
    "Connack",
    "Connect",
    "Farewell",
    "Kind",
    "Prop",
    "Properties",
    "Publish",
    "Splitter",
    "Suback",
    "Subscribe",
    "Unsubscribe",
    "Value",
    "Will",
    "build_publish",
    "kind_of",
    "level_of",
    "number_of",
    "packet_id_of",
    "read_reason_text",
    "reason_text",
    "replaced",
    "text_of",
]

PINGREQ: Final = b"\xc0\x00"
PINGRESP: Final = b"\xd0\x00"

_LONGEST_HEADER = 5


def _may_begin(first: int) -> bool:
    """Fixed header flags as 2.1.3 wants them; QoS 3 and DUP at QoS 0 do not exist."""
    kind, flags = first >> 4, first & 0x0F
    if kind == Kind.PUBLISH:
        qos = flags >> 1 & 3
        return qos in (1, 2) or (qos == 0 and not flags & 8)
    wanted = 2 if kind in (Kind.PUBREL, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE) else 0
    return kind != 0 and flags == wanted


_MAY_BEGIN = tuple(_may_begin(first) for first in range(256))


class Splitter:
    """Bytes in, whole packets out; holds nothing but an unfinished packet.

    limit: octets a packet may have, its fixed header included; may be changed while
    the stream runs.
    """

    __slots__ = ("_at", "_buffer", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer: bytes | bytearray = b""
        self._at = 0

    def receive_data(self, data: bytes) -> None:
        """Take what came in; it is not copied unless a packet is under way."""
        if not self._buffer:
            self._buffer = data
            return
        if not isinstance(self._buffer, bytearray):
            self._buffer = bytearray(self._buffer)
        self._buffer += data

    def begun(self, size: int) -> bytes:
        """The first octets of what is not yet given out, at most `size`."""
        return bytes(self._buffer[self._at : self._at + size])

    def next_packet(self) -> bytes | None:
        """The next whole packet, or None when more bytes are needed.

        Raises PeerError(packet_malformed | body_too_large), from then on always.
        """
        buffer, at = self._buffer, self._at
        end = self._end(buffer, at)
        if end is None or end > len(buffer):
            if at:
                self._buffer = buffer[at:]
                self._at = 0
            return None
        packet = bytes(memoryview(buffer)[at:end]) if at or end < len(buffer) else None
        if end == len(buffer):
            self._buffer = b""
            self._at = 0
        else:
            self._at = end
        return bytes(buffer) if packet is None else packet

    def _end(self, buffer: bytes | bytearray, at: int) -> int | None:
        """Where the packet that begins at `at` ends; None: not known yet."""
        available = len(buffer)
        if at >= available:
            return None
        if not _MAY_BEGIN[buffer[at]]:
            malformed("its first byte does not exist")
        size = shift = 0
        for place in range(at + 1, min(at + _LONGEST_HEADER, available)):
            octet = buffer[place]
            size |= (octet & 0x7F) << shift
            if octet < 0x80:  # noqa: PLR2004 - the continuation bit
                end = place + 1 + size
                if end - at > self.limit:
                    raise PeerError(BODY_TOO_LARGE)
                return end
            shift += 7
        if available - at >= _LONGEST_HEADER:
            malformed("its length has more than four bytes")
        return None


def kind_of(packet: bytes) -> int:
    """The packet's type, a value of `Kind`."""
    return packet[0] >> 4


def packet_id_of(packet: bytes) -> int:
    """The packet identifier of those that begin with it (all but PUBLISH)."""
    return _take_packet_id(packet, body_at(packet))[0]


def _take_packet_id(packet: bytes, at: int) -> tuple[int, int]:
    number, at = take_two(packet, at)
    if number == 0:
        malformed("packet identifier 0 does not exist")
    return number, at


@dataclass(frozen=True, slots=True)
class Publish:
    """What stands before a message's payload (3.3).

    topic: empty only beside a topic alias (5). packet_id: None at QoS 0.
    payload_at: where the payload begins in the packet.
    """

    topic: str
    qos: int
    retain: bool
    dup: bool
    packet_id: int | None
    properties: Properties
    payload_at: int

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole PUBLISH; PeerError(packet_malformed)."""
        first = packet[0]
        qos = first >> 1 & 3
        topic, at = take_text(packet, body_at(packet))
        packet_id = None
        if qos:
            packet_id, at = _take_packet_id(packet, at)
        properties: Properties = ()
        if level == V5:
            properties, at = take_properties(packet, at, Kind.PUBLISH)
        if not topic and number_of(properties, Prop.TOPIC_ALIAS) is None:
            malformed("a PUBLISH has no topic")
        return cls(
            topic, qos, bool(first & 1), bool(first & 8), packet_id, properties, at
        )


def build_publish(  # noqa: PLR0913 - a message has that many sides
    topic: str,
    payload: bytes,
    *,
    level: int,
    qos: int = 0,
    packet_id: int | None = None,
    retain: bool = False,
    dup: bool = False,
    properties: Properties = (),
) -> bytes:
    """A whole PUBLISH; packet_id is needed above QoS 0."""
    first = Kind.PUBLISH << 4 | int(dup) << 3 | qos << 1 | int(retain)
    head = put_text(topic)
    if packet_id is not None:
        head += packet_id.to_bytes(2)
    if level == V5:
        head += put_properties(properties)
    return put_packet(first, head, payload)


@dataclass(frozen=True, slots=True)
class Ack:
    """PUBACK, PUBREC, PUBREL or PUBCOMP (3.4 to 3.7). code: 0 in 3.1.1."""

    kind: Kind
    packet_id: int
    code: int = 0
    properties: Properties = ()

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole packet of those four; PeerError(packet_malformed)."""
        kind = Kind(packet[0] >> 4)
        packet_id, at = _take_packet_id(packet, body_at(packet))
        code, properties = _take_ending(packet, at, kind, level)
        return cls(kind, packet_id, code, properties)

    def encode(self, level: int) -> bytes:
        """The whole packet, as short as it can be."""
        first = self.kind << 4 | (2 if self.kind is Kind.PUBREL else 0)
        head = self.packet_id.to_bytes(2)
        return put_packet(first, head, _ending(self.code, self.properties, level))


@dataclass(frozen=True, slots=True)
class Farewell:
    """DISCONNECT or AUTH (3.14, 3.15). code: 0 in 3.1.1."""

    code: int = 0
    properties: Properties = ()
    kind: Kind = Kind.DISCONNECT

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole DISCONNECT or AUTH; PeerError(packet_malformed)."""
        kind = Kind(packet[0] >> 4)
        code, properties = _take_ending(packet, body_at(packet), kind, level)
        return cls(code, properties, kind)

    def encode(self, level: int) -> bytes:
        """The whole packet, as short as it can be."""
        return put_packet(self.kind << 4, _ending(self.code, self.properties, level))


def _take_ending(
    packet: bytes, at: int, kind: Kind, level: int
) -> tuple[int, Properties]:
    """A reason code and properties, each of which MQTT 5 lets senders leave out."""
    code = 0
    properties: Properties = ()
    if level == V5:
        if at < len(packet):
            code, at = take_byte(packet, at)
        if at < len(packet):
            properties, at = take_properties(packet, at, kind)
    if at != len(packet):
        malformed("bytes follow its end")
    return code, properties


def _ending(code: int, properties: Properties, level: int) -> bytes:
    if level < V5 or not (code or properties):
        return b""
    return bytes((code,)) + (put_properties(properties) if properties else b"")


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Filters with their options byte (3.8): QoS, and in MQTT 5 what else it says."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]
    properties: Properties = ()

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole SUBSCRIBE; PeerError(packet_malformed)."""
        packet_id, at = _take_packet_id(packet, body_at(packet))
        properties: Properties = ()
        if level == V5:
            properties, at = take_properties(packet, at, Kind.SUBSCRIBE)
        filters: list[tuple[str, int]] = []
        while at < len(packet):
            topic_filter, at = take_text(packet, at)
            options, at = take_byte(packet, at)
            reserved = 0xC0 if level == V5 else 0xFC
            if not topic_filter or options & reserved or options & 3 == 3:  # noqa: PLR2004 - QoS
                malformed("a subscription is empty or its options do not exist")
            if options & 0x30 == 0x30:  # noqa: PLR2004 - retain handling 3 (3.8.3.1)
                malformed("retain handling 3 does not exist")
            filters.append((topic_filter, options))
        if not filters:
            malformed("a SUBSCRIBE has no filter")
        return cls(packet_id, tuple(filters), properties)

    def encode(self, level: int) -> bytes:
        """The whole packet."""
        head = self.packet_id.to_bytes(2)
        if level == V5:
            head += put_properties(self.properties)
        body = b"".join(put_text(name) + bytes((opt,)) for name, opt in self.filters)
        return put_packet(Kind.SUBSCRIBE << 4 | 2, head, body)


@dataclass(frozen=True, slots=True)
class Suback:
    """SUBACK, or UNSUBACK (3.9, 3.11): a code for each filter, in their order."""

    packet_id: int
    codes: bytes
    properties: Properties = ()
    kind: Kind = Kind.SUBACK

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole SUBACK or UNSUBACK; PeerError(packet_malformed)."""
        kind = Kind(packet[0] >> 4)
        packet_id, at = _take_packet_id(packet, body_at(packet))
        properties: Properties = ()
        if level == V5:
            properties, at = take_properties(packet, at, kind)
        codes = packet[at:]
        if bool(codes) != (kind is Kind.SUBACK or level == V5):
            malformed("its codes are missing, or should be")
        return cls(packet_id, codes, properties, kind)

    def encode(self, level: int) -> bytes:
        """The whole packet."""
        head = self.packet_id.to_bytes(2)
        if level == V5:
            head += put_properties(self.properties)
        return put_packet(self.kind << 4, head, self.codes)


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Filters that are no longer wanted (3.10)."""

    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = ()

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole UNSUBSCRIBE; PeerError(packet_malformed)."""
        packet_id, at = _take_packet_id(packet, body_at(packet))
        properties: Properties = ()
        if level == V5:
            properties, at = take_properties(packet, at, Kind.UNSUBSCRIBE)
        filters: list[str] = []
        while at < len(packet):
            topic_filter, at = take_text(packet, at)
            if not topic_filter:
                malformed("a filter is empty")
            filters.append(topic_filter)
        if not filters:
            malformed("an UNSUBSCRIBE has no filter")
        return cls(packet_id, tuple(filters), properties)

    def encode(self, level: int) -> bytes:
        """The whole packet."""
        head = self.packet_id.to_bytes(2)
        if level == V5:
            head += put_properties(self.properties)
        body = b"".join(put_text(name) for name in self.filters)
        return put_packet(Kind.UNSUBSCRIBE << 4 | 2, head, body)


def reason_text(refusal: Refusal) -> str:
    """A refusal as an MQTT 5 reason string: its code, a colon, the sentence."""
    return f"{refusal.code}: {refusal.sentence}"


def read_reason_text(text: str) -> Refusal | None:
    """The refusal that a gateway's reason string carries, None for other texts."""
    return TABLE.get(text.partition(":")[0])
