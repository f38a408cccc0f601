"""CONNECT and CONNACK of MQTT 3.1.1 and 5, both directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from provisioning.model.errors import PeerError
from provisioning.model.refusals import PROTOCOL_VERSION
from provisioning.wire.mqtt_fields import (
    V5,
    V311,
    Kind,
    Properties,
    malformed,
    put_binary,
    put_packet,
    put_properties,
    put_text,
    take_binary,
    take_byte,
    take_properties,
    take_text,
    take_two,
)

_USER_NAME = 0x80
_PASSWORD = 0x40
_WILL_RETAIN = 0x20
_WILL = 0x04
_CLEAN = 0x02
_RESERVED = 0x01
_BAD_QOS = 3


def body_at(packet: bytes) -> int:
    """Where the variable header begins in a whole packet, as the splitter gives it.

    The splitter has judged the length before it, which 3.1.1 lets clients write in
    more bytes than it needs.
    """
    at = 1
    while packet[at] > 0x7F:  # noqa: PLR2004 - the continuation bit
        at += 1
    return at + 1


def level_of(packet: bytes) -> int:
    """The protocol level that a CONNECT names, in whose form a refusal is understood.

    packet: may be cut short, too. 0 where it cannot be told.
    """
    try:
        _, at = take_binary(packet, body_at(packet))
        return take_byte(packet, at)[0]
    except (PeerError, IndexError):
        return 0


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes when the client is lost (MQTT 5, 3.1.2.5)."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = ()


@dataclass(frozen=True, slots=True)
class Connect:
    """The first packet of a client (3.1).

    clean: Clean Session (3.1.1) or Clean Start (5). keep_alive_s: 0 to 65,535.
    """

    client_id: str
    level: int = V5
    clean: bool = True
    keep_alive_s: int = 60
    properties: Properties = ()
    will: Will | None = None
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, packet: bytes) -> Self:
        """Read a whole CONNECT.

        Raises PeerError(protocol_version) for anything but MQTT 3.1.1 and 5, and
        PeerError(packet_malformed).
        """
        name, at = take_text(packet, body_at(packet))
        level, at = take_byte(packet, at)
        if name != "MQTT" or level not in (V311, V5):
            raise PeerError(PROTOCOL_VERSION)
        flags, at = take_byte(packet, at)
        _check_flags(flags, level)
        keep_alive_s, at = take_two(packet, at)
        properties: Properties = ()
        if level == V5:
            properties, at = take_properties(packet, at, Kind.CONNECT)
        client_id, at = take_text(packet, at)
        will, at = _take_will(packet, at, flags, level)
        username = password = None
        if flags & _USER_NAME:
            username, at = take_text(packet, at)
        if flags & _PASSWORD:
            password, at = take_binary(packet, at)
        if at != len(packet):
            malformed("bytes follow its end")
        return cls(
            client_id,
            level,
            bool(flags & _CLEAN),
            keep_alive_s,
            properties,
            will,
            username,
            password,
        )

    def encode(self) -> bytes:
        """The whole packet."""
        flags = _CLEAN if self.clean else 0
        parts = [put_text(self.client_id)]
        if self.will is not None:
            flags |= _WILL | self.will.qos << 3
            flags |= _WILL_RETAIN if self.will.retain else 0
            if self.level == V5:
                parts.append(put_properties(self.will.properties))
            parts += (put_text(self.will.topic), put_binary(self.will.payload))
        if self.username is not None:
            flags |= _USER_NAME
            parts.append(put_text(self.username))
        if self.password is not None:
            flags |= _PASSWORD
            parts.append(put_binary(self.password))
        head = put_text("MQTT") + bytes((self.level, flags))
        head += self.keep_alive_s.to_bytes(2)
        if self.level == V5:
            head += put_properties(self.properties)
        return put_packet(Kind.CONNECT << 4, head, *parts)


def _check_flags(flags: int, level: int) -> None:
    if flags & _RESERVED:
        malformed("the reserved CONNECT flag is set")
    qos = flags >> 3 & 3
    if qos == _BAD_QOS:
        malformed("QoS 3 does not exist")
    if not flags & _WILL and (qos or flags & _WILL_RETAIN):
        malformed("it describes a will without having one")
    if level == V311 and flags & _PASSWORD and not flags & _USER_NAME:
        malformed("it has a password without a user name")  # 3.1.1: 3.1.2-22


def _take_will(
    packet: bytes, at: int, flags: int, level: int
) -> tuple[Will | None, int]:
    if not flags & _WILL:
        return None, at
    properties: Properties = ()
    if level == V5:
        properties, at = take_properties(packet, at, Kind.WILL)
    topic, at = take_text(packet, at)
    if not topic:
        malformed("the will has no topic")
    payload, at = take_binary(packet, at)
    retain = bool(flags & _WILL_RETAIN)
    return Will(topic, payload, flags >> 3 & 3, retain, properties), at


@dataclass(frozen=True, slots=True)
class Connack:
    """The answer to CONNECT (3.2).

    code: 0 accepted; else a return code (3.1.1) or reason code (5).
    """

    code: int = 0
    session_present: bool = False
    properties: Properties = ()

    @classmethod
    def parse(cls, packet: bytes, level: int) -> Self:
        """Read a whole CONNACK; PeerError(packet_malformed)."""
        flags, at = take_byte(packet, body_at(packet))
        if flags > 1:
            malformed("a reserved CONNACK flag is set")
        code, at = take_byte(packet, at)
        properties: Properties = ()
        # A server that speaks no MQTT 5 answers in the old form, without properties.
        if level == V5 and at < len(packet):
            properties, at = take_properties(packet, at, Kind.CONNACK)
        if at != len(packet):
            malformed("bytes follow its end")
        return cls(code, bool(flags), properties)

    def encode(self, level: int) -> bytes:
        """The whole packet in the form of that protocol level."""
        head = bytes((int(self.session_present), self.code))
        if level >= V5:
            head += put_properties(self.properties)
        return put_packet(Kind.CONNACK << 4, head)
