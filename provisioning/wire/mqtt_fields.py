"""The fields MQTT packets are made of: numbers, strings, properties.

MQTT 3.1.1 section 1.5 and MQTT 5 sections 1.5 and 2.2.2. Everything here works on
bytes of one whole packet and raises PeerError(packet_malformed) for nonsense.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, NoReturn

from provisioning.model.errors import PeerError
from provisioning.model.refusals import PACKET_MALFORMED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

V311: Final = 4
V5: Final = 5

Value = int | str | bytes | tuple[str, str]
Properties = tuple[tuple[int, Value], ...]
"""MQTT 5 properties in the order in which they stand in the packet."""


class Kind(IntEnum):
    """Control packet types (MQTT 5, table 2-1); WILL is where its properties stand."""

    WILL = 0
    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class Prop(IntEnum):
    """Property identifiers (MQTT 5, table 2-4)."""

    PAYLOAD_FORMAT = 0x01
    MESSAGE_EXPIRY = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_ID = 0x0B
    SESSION_EXPIRY = 0x11
    ASSIGNED_CLIENT_ID = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTH_METHOD = 0x15
    AUTH_DATA = 0x16
    REQUEST_PROBLEM_INFO = 0x17
    WILL_DELAY = 0x18
    REQUEST_RESPONSE_INFO = 0x19
    RESPONSE_INFO = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_AVAILABLE = 0x28
    SUBSCRIPTION_ID_AVAILABLE = 0x29
    SHARED_AVAILABLE = 0x2A


class Form(IntEnum):
    """How a property's value stands on the wire."""

    FLAG = 0  # one byte that is 0 or 1: every one-byte property of MQTT 5
    TWO = 2
    FOUR = 4
    VARIABLE = 5
    TEXT = 6
    BINARY = 7
    PAIR = 8


_ACKS = (
    *(Kind.CONNACK, Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP),
    *(Kind.SUBACK, Kind.UNSUBACK, Kind.DISCONNECT, Kind.AUTH),
)
_MESSAGE = (Kind.PUBLISH, Kind.WILL)
_BOTH_ENDS = (Kind.CONNECT, Kind.CONNACK)

PROPERTIES: Final[dict[int, tuple[Form, frozenset[Kind]]]] = {
    Prop.PAYLOAD_FORMAT: (Form.FLAG, frozenset(_MESSAGE)),
    Prop.MESSAGE_EXPIRY: (Form.FOUR, frozenset(_MESSAGE)),
    Prop.CONTENT_TYPE: (Form.TEXT, frozenset(_MESSAGE)),
    Prop.RESPONSE_TOPIC: (Form.TEXT, frozenset(_MESSAGE)),
    Prop.CORRELATION_DATA: (Form.BINARY, frozenset(_MESSAGE)),
    Prop.SUBSCRIPTION_ID: (Form.VARIABLE, frozenset({Kind.PUBLISH, Kind.SUBSCRIBE})),
    Prop.SESSION_EXPIRY: (Form.FOUR, frozenset({*_BOTH_ENDS, Kind.DISCONNECT})),
    Prop.ASSIGNED_CLIENT_ID: (Form.TEXT, frozenset({Kind.CONNACK})),
    Prop.SERVER_KEEP_ALIVE: (Form.TWO, frozenset({Kind.CONNACK})),
    Prop.AUTH_METHOD: (Form.TEXT, frozenset({*_BOTH_ENDS, Kind.AUTH})),
    Prop.AUTH_DATA: (Form.BINARY, frozenset({*_BOTH_ENDS, Kind.AUTH})),
    Prop.REQUEST_PROBLEM_INFO: (Form.FLAG, frozenset({Kind.CONNECT})),
    Prop.WILL_DELAY: (Form.FOUR, frozenset({Kind.WILL})),
    Prop.REQUEST_RESPONSE_INFO: (Form.FLAG, frozenset({Kind.CONNECT})),
    Prop.RESPONSE_INFO: (Form.TEXT, frozenset({Kind.CONNACK})),
    Prop.SERVER_REFERENCE: (Form.TEXT, frozenset({Kind.CONNACK, Kind.DISCONNECT})),
    Prop.REASON_STRING: (Form.TEXT, frozenset(_ACKS)),
    Prop.RECEIVE_MAXIMUM: (Form.TWO, frozenset(_BOTH_ENDS)),
    Prop.TOPIC_ALIAS_MAXIMUM: (Form.TWO, frozenset(_BOTH_ENDS)),
    Prop.TOPIC_ALIAS: (Form.TWO, frozenset({Kind.PUBLISH})),
    Prop.MAXIMUM_QOS: (Form.FLAG, frozenset({Kind.CONNACK})),
    Prop.RETAIN_AVAILABLE: (Form.FLAG, frozenset({Kind.CONNACK})),
    Prop.USER_PROPERTY: (
        Form.PAIR,
        frozenset(set(Kind) - {Kind.PINGREQ, Kind.PINGRESP}),
    ),
    Prop.MAXIMUM_PACKET_SIZE: (Form.FOUR, frozenset(_BOTH_ENDS)),
    Prop.WILDCARD_AVAILABLE: (Form.FLAG, frozenset({Kind.CONNACK})),
    Prop.SUBSCRIPTION_ID_AVAILABLE: (Form.FLAG, frozenset({Kind.CONNACK})),
    Prop.SHARED_AVAILABLE: (Form.FLAG, frozenset({Kind.CONNACK})),
}
"""Each property's form, and the packets it may stand in."""

_NEVER_ZERO = frozenset(
    {
        Prop.RECEIVE_MAXIMUM,
        Prop.MAXIMUM_PACKET_SIZE,
        Prop.TOPIC_ALIAS,
        Prop.SUBSCRIPTION_ID,
    }
)
_LONGEST_VARIABLE = 4


def malformed(why: str) -> NoReturn:
    """Raise PeerError(packet_malformed) that says what is wrong."""
    raise PeerError(PACKET_MALFORMED, f"The MQTT packet is malformed: {why}.")


# Reading: each takes the packet and where to begin, and tells where it ended. ----


def take_byte(data: bytes, at: int) -> tuple[int, int]:
    """One octet."""
    if at >= len(data):
        malformed("it is cut short")
    return data[at], at + 1


def take_two(data: bytes, at: int) -> tuple[int, int]:
    """A two-byte integer (1.5.2)."""
    end = at + 2
    if end > len(data):
        malformed("it is cut short")
    return (data[at] << 8) | data[at + 1], end


def take_four(data: bytes, at: int) -> tuple[int, int]:
    """A four-byte integer (1.5.3)."""
    end = at + 4
    if end > len(data):
        malformed("it is cut short")
    return int.from_bytes(data[at:end]), end


def take_variable(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer, in as few bytes as it needs (MQTT 5, 1.5.5)."""
    value = 0
    for count in range(_LONGEST_VARIABLE):
        octet, at = take_byte(data, at)
        value |= (octet & 0x7F) << (7 * count)
        if octet < 0x80:  # noqa: PLR2004 - the continuation bit
            if count and octet == 0:
                malformed("a number is longer than it need be")
            return value, at
    malformed("a number has more than four bytes")


def take_binary(data: bytes, at: int) -> tuple[bytes, int]:
    """Binary data after its two-byte length (1.5.6)."""
    size, at = take_two(data, at)
    end = at + size
    if end > len(data):
        malformed("it is cut short")
    return data[at:end], end


def take_text(data: bytes, at: int) -> tuple[str, int]:
    """A UTF-8 string without U+0000 or surrogates (1.5.4)."""
    raw, at = take_binary(data, at)
    if 0 in raw:
        malformed("a string has U+0000 in it")
    try:
        return raw.decode(), at  # strict: surrogates and overlong forms are refused
    except UnicodeDecodeError:
        malformed("a string is not UTF-8")


def _take_flag(data: bytes, at: int) -> tuple[int, int]:
    value, at = take_byte(data, at)
    if value > 1:
        malformed("a property is neither 0 nor 1")
    return value, at


def _take_pair(data: bytes, at: int) -> tuple[tuple[str, str], int]:
    name, at = take_text(data, at)
    text, at = take_text(data, at)
    return (name, text), at


_TAKE: Final[dict[Form, Callable[[bytes, int], tuple[Value, int]]]] = {
    Form.FLAG: _take_flag,
    Form.TWO: take_two,
    Form.FOUR: take_four,
    Form.VARIABLE: take_variable,
    Form.TEXT: take_text,
    Form.BINARY: take_binary,
    Form.PAIR: _take_pair,
}


def take_properties(data: bytes, at: int, kind: Kind) -> tuple[Properties, int]:
    """The properties of a packet of that kind, with their length before them.

    Refused: unknown ones, those of other packets, and repeated ones (2.2.2.2), except
    user properties and the subscription identifiers that a server sends.
    """
    size, at = take_variable(data, at)
    end = at + size
    if end > len(data):
        malformed("it is cut short")
    if not size:
        return (), end
    found: list[tuple[int, Value]] = []
    seen: set[int] = set()
    section = data[at:end]
    at = 0
    while at < size:
        number, at = take_variable(section, at)
        row = PROPERTIES.get(number)
        if row is None or kind not in row[1]:
            malformed(f"property {number} does not belong into {kind.name}")
        if number in seen and not _may_repeat(number, kind):
            malformed(f"property {number} stands twice")
        seen.add(number)
        value, at = _TAKE[row[0]](section, at)
        if value == 0 and number in _NEVER_ZERO:
            malformed(f"property {number} is zero")
        found.append((number, value))
    return tuple(found), end


def _may_repeat(number: int, kind: Kind) -> bool:
    return number == Prop.USER_PROPERTY or (
        number == Prop.SUBSCRIPTION_ID and kind is Kind.PUBLISH
    )


# Writing ------------------------------------------------------------------------


def put_variable(value: int) -> bytes:
    """A variable byte integer, at most 268,435,455."""
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(0x80 | (value & 0x7F))
        value >>= 7
    out.append(value)
    return bytes(out)


def put_binary(data: bytes) -> bytes:
    """Binary data after its two-byte length; ValueError above 65,535 octets."""
    if len(data) > 0xFFFF:  # noqa: PLR2004 - what two bytes can say
        raise ValueError("an MQTT field has at most 65,535 octets")
    return len(data).to_bytes(2) + data


def put_text(text: str) -> bytes:
    """A UTF-8 string after its length; ValueError above 65,535 octets."""
    return put_binary(text.encode())


def _put_value(form: Form, value: Value) -> bytes:
    if isinstance(value, tuple):
        return put_text(value[0]) + put_text(value[1])
    if isinstance(value, str):
        return put_text(value)
    if isinstance(value, bytes):
        return put_binary(value)
    if form is Form.VARIABLE:
        return put_variable(value)
    return value.to_bytes(max(form, 1))


def put_properties(properties: Iterable[tuple[int, Value]]) -> bytes:
    """Properties after their length."""
    out = b"".join(
        put_variable(number) + _put_value(PROPERTIES[number][0], value)
        for number, value in properties
    )
    return put_variable(len(out)) + out


def put_packet(first: int, *parts: bytes) -> bytes:
    """A packet: first byte, remaining length, the parts."""
    return b"".join((bytes((first,)), put_variable(sum(map(len, parts))), *parts))


# Looking into properties ----------------------------------------------------------


def number_of(properties: Properties, wanted: Prop) -> int | None:
    """The number that a property says, None where it is missing."""
    for number, value in properties:
        if number == wanted and isinstance(value, int):
            return value
    return None


def text_of(properties: Properties, wanted: Prop) -> str | None:
    """The text that a property says, None where it is missing."""
    for number, value in properties:
        if number == wanted and isinstance(value, str):
            return value
    return None


def replaced(properties: Properties, wanted: Prop, value: Value) -> Properties:
    """The properties with this one set, in place of an earlier value."""
    kept = tuple(item for item in properties if item[0] != wanted)
    return (*kept, (int(wanted), value))
