"""MQTT packets: what is built is read again, and nonsense only ever is refused."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    BODY_TOO_LARGE,
    PACKET_MALFORMED,
    PROTOCOL_VERSION,
    TABLE,
)
from provisioning.wire.mqtt import (
    PINGREQ,
    PINGRESP,
    V5,
    V311,
    Ack,
    Connack,
    Connect,
    Farewell,
    Kind,
    Publish,
    Splitter,
    Suback,
    Subscribe,
    Unsubscribe,
    Will,
    build_publish,
    kind_of,
    level_of,
    packet_id_of,
    read_reason_text,
    reason_text,
)
from provisioning.wire.mqtt_fields import PROPERTIES, Form, Properties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 1 << 20

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
names = texts.filter(bool)
numbers = st.integers(1, 0xFFFF)
levels = st.sampled_from([V311, V5])
VALUES: dict[Form, st.SearchStrategy[object]] = {
    Form.FLAG: st.integers(0, 1),
    Form.TWO: st.integers(1, 0xFFFF),
    Form.FOUR: st.integers(1, 0xFFFFFFFF),
    Form.VARIABLE: st.integers(1, 0xFFFFFFF),
    Form.TEXT: texts,
    Form.BINARY: st.binary(max_size=20),
    Form.PAIR: st.tuples(texts, texts),
}


def properties_of(kind: Kind) -> st.SearchStrategy[Properties]:
    """Properties that may stand in a packet of that kind, each at most once."""
    allowed = sorted(number for number, row in PROPERTIES.items() if kind in row[1])
    return st.lists(st.sampled_from(allowed), unique=True, max_size=5).flatmap(
        lambda chosen: st.tuples(
            *(st.tuples(st.just(n), VALUES[PROPERTIES[n][0]]) for n in chosen)
        )
    )


def only_v5(level: int, properties: Properties) -> Properties:
    return properties if level == V5 else ()


@st.composite
def connects(draw: st.DrawFn) -> Connect:
    level = draw(levels)
    will = None
    if draw(st.booleans()):
        will = Will(
            draw(names),
            draw(st.binary(max_size=30)),
            draw(st.integers(0, 2)),
            draw(st.booleans()),
            only_v5(level, draw(properties_of(Kind.WILL))),
        )
    username = draw(st.none() | texts)
    password = draw(st.none() | st.binary(max_size=9))
    if level == V311 and username is None:
        password = None
    return Connect(
        draw(texts),
        level,
        draw(st.booleans()),
        draw(st.integers(0, 0xFFFF)),
        only_v5(level, draw(properties_of(Kind.CONNECT))),
        will,
        username,
        password,
    )


@given(connects())
def test_a_connect_is_read_as_it_was_built(connect: Connect) -> None:
    packet = connect.encode()
    assert Connect.parse(packet) == connect
    assert level_of(packet) == connect.level


@given(levels, st.integers(0, 255), st.booleans(), properties_of(Kind.CONNACK))
def test_a_connack_is_read_as_it_was_built(
    level: int, code: int, present: bool, properties: Properties
) -> None:
    connack = Connack(code, present, only_v5(level, properties))
    assert Connack.parse(connack.encode(level), level) == connack


@given(
    levels,
    names,
    st.binary(max_size=300),
    st.integers(0, 2),
    st.booleans(),
    properties_of(Kind.PUBLISH),
)
def test_a_publish_is_read_as_it_was_built(  # noqa: PLR0917 - given by hypothesis
    level: int,
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    properties: Properties,
) -> None:
    packet = build_publish(
        topic,
        payload,
        level=level,
        qos=qos,
        packet_id=7 if qos else None,
        retain=retain,
        dup=bool(qos),
        properties=properties,
    )
    publish = Publish.parse(packet, level)
    assert publish == Publish(
        topic,
        qos,
        retain,
        bool(qos),
        7 if qos else None,
        only_v5(level, properties),
        publish.payload_at,
    )
    assert packet[publish.payload_at :] == payload


@given(
    levels,
    st.sampled_from([Kind.PUBACK, Kind.PUBREC, Kind.PUBREL, Kind.PUBCOMP]),
    numbers,
    st.integers(0, 255),
    st.data(),
)
def test_an_acknowledgement_is_read_as_it_was_built(
    level: int, kind: Kind, packet_id: int, code: int, data: st.DataObject
) -> None:
    properties = only_v5(level, data.draw(properties_of(kind)))
    ack = Ack(kind, packet_id, code if level == V5 else 0, properties)
    packet = ack.encode(level)
    assert Ack.parse(packet, level) == ack
    assert packet_id_of(packet) == packet_id


@given(
    levels,
    numbers,
    st.lists(st.tuples(names, st.integers(0, 2)), min_size=1, max_size=5),
    properties_of(Kind.SUBSCRIBE),
)
def test_a_subscribe_and_an_unsubscribe_are_read_as_they_were_built(
    level: int, packet_id: int, filters: list[tuple[str, int]], properties: Properties
) -> None:
    subscribe = Subscribe(packet_id, tuple(filters), only_v5(level, properties))
    assert Subscribe.parse(subscribe.encode(level), level) == subscribe
    unsubscribe = Unsubscribe(packet_id, tuple(name for name, _ in filters))
    assert Unsubscribe.parse(unsubscribe.encode(level), level) == unsubscribe


@given(levels, numbers, st.binary(min_size=1, max_size=9))
def test_a_suback_and_an_unsuback_are_read_as_they_were_built(
    level: int, packet_id: int, codes: bytes
) -> None:
    suback = Suback(packet_id, codes)
    assert Suback.parse(suback.encode(level), level) == suback
    unsuback = Suback(packet_id, codes if level == V5 else b"", (), Kind.UNSUBACK)
    assert Suback.parse(unsuback.encode(level), level) == unsuback


@given(st.integers(0, 255), properties_of(Kind.DISCONNECT))
def test_a_farewell_is_read_as_it_was_built(code: int, properties: Properties) -> None:
    farewell = Farewell(code, properties)
    assert Farewell.parse(farewell.encode(V5), V5) == farewell
    assert Farewell.parse(Farewell().encode(V311), V311) == Farewell()


READERS: dict[int, Callable[[bytes, int], object]] = {
    Kind.CONNECT: lambda packet, _: Connect.parse(packet),
    Kind.CONNACK: Connack.parse,
    Kind.PUBLISH: Publish.parse,
    Kind.PUBACK: Ack.parse,
    Kind.PUBREC: Ack.parse,
    Kind.PUBREL: Ack.parse,
    Kind.PUBCOMP: Ack.parse,
    Kind.SUBSCRIBE: Subscribe.parse,
    Kind.SUBACK: Suback.parse,
    Kind.UNSUBSCRIBE: Unsubscribe.parse,
    Kind.UNSUBACK: Suback.parse,
    Kind.PINGREQ: lambda packet, _: packet,
    Kind.PINGRESP: lambda packet, _: packet,
    Kind.DISCONNECT: Farewell.parse,
    Kind.AUTH: Farewell.parse,
}


@contextmanager
def read_or_refused() -> Iterator[None]:
    """Nothing but a refusal may come out of nonsense."""
    refusal = None
    try:
        yield
    except PeerError as error:
        refusal = error.refusal
    assert refusal in {None, PACKET_MALFORMED, PROTOCOL_VERSION, BODY_TOO_LARGE}


def drain(splitter: Splitter) -> list[bytes]:
    packets = []
    while (packet := splitter.next_packet()) is not None:
        packets.append(packet)
    return packets


@given(st.binary(max_size=200), levels)
def test_nonsense_is_refused_and_nothing_else_happens(data: bytes, level: int) -> None:
    splitter = Splitter(100)
    splitter.receive_data(data)
    with read_or_refused():
        for packet in drain(splitter):
            level_of(packet)
            READERS[kind_of(packet)](packet, level)


@given(
    st.integers(1, 15),
    st.integers(0, 15),
    st.binary(max_size=60),
    st.sampled_from([4, 5]),
)
def test_a_packet_of_any_body_is_read_or_refused(
    kind: int, flags: int, body: bytes, level: int
) -> None:
    splitter = Splitter(LIMIT)
    splitter.receive_data(bytes((kind << 4 | flags, len(body))) + body)
    with read_or_refused():
        for packet in drain(splitter):
            READERS[kind_of(packet)](packet, level)


@given(connects(), st.data())
def test_a_damaged_connect_is_read_or_refused(
    connect: Connect, data: st.DataObject
) -> None:
    packet = bytearray(connect.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        packet[data.draw(st.integers(2, len(packet) - 1))] = data.draw(
            st.integers(0, 255)
        )
    with read_or_refused():
        Connect.parse(bytes(packet))


some_packets = st.one_of(
    connects().map(Connect.encode),
    st.just(PINGREQ),
    st.just(PINGRESP),
    st.binary(max_size=400).map(lambda p: build_publish("a/b", p, level=V311)),
    st.builds(lambda n: Ack(Kind.PUBACK, n).encode(V311), numbers),
)


@given(st.lists(some_packets, max_size=8), st.data())
def test_any_cut_of_the_stream_gives_the_same_packets(
    packets: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(packets)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    cuts = [0, *sorted(places), len(stream)]
    splitter = Splitter(LIMIT)
    got: list[bytes] = []
    for start, end in pairwise(cuts):
        splitter.receive_data(stream[start:end])
        if data.draw(st.booleans()):
            got += drain(splitter)
    got += drain(splitter)
    assert got == packets
    assert splitter.begun(10) == b""


def test_a_byte_at_a_time_gives_the_same_packets() -> None:
    packets = [build_publish("a", bytes(200), level=V5), PINGREQ, PINGREQ]
    splitter = Splitter(LIMIT)
    got: list[bytes] = []
    for octet in b"".join(packets):
        splitter.receive_data(bytes((octet,)))
        got += drain(splitter)
    assert got == packets


def test_a_packet_above_the_limit_is_refused_before_it_is_collected() -> None:
    splitter = Splitter(1000)
    splitter.receive_data(PINGREQ + b"\x30\xe6\x07")  # 998 + 3 octets: one too many
    assert splitter.next_packet() == PINGREQ
    with pytest.raises(PeerError) as refused:
        splitter.next_packet()
    assert refused.value.refusal is BODY_TOO_LARGE


def test_a_packet_at_the_limit_passes() -> None:
    packet = build_publish("t", bytes(1000 - 6), level=V311)
    assert len(packet) == 1000
    splitter = Splitter(1000)
    splitter.receive_data(packet)
    assert splitter.next_packet() == packet


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00",  # type 0
        b"\xc1\x00",  # PINGREQ with a flag
        b"\x60\x02\x00\x01",  # PUBREL without its flag
        b"\x36\x05\x00\x01a\x00\x01",  # QoS 3
        b"\x38\x03\x00\x01a",  # DUP at QoS 0
        b"\x30\xff\xff\xff\xff\x7f",  # a length of five bytes
    ],
)
def test_a_fixed_header_that_does_not_exist_is_refused(data: bytes) -> None:
    splitter = Splitter(LIMIT)
    splitter.receive_data(data)
    with pytest.raises(PeerError) as refused:
        splitter.next_packet()
    assert refused.value.refusal is PACKET_MALFORMED


def connect_with(head: bytes, rest: bytes = b"\x00\x00") -> bytes:
    body = head + rest
    return bytes((0x10, len(body))) + body


@pytest.mark.parametrize(
    "packet",
    [
        connect_with(b"\x00\x06MQIsdp\x03\x02\x00\x3c"),  # MQTT 3.1
        connect_with(b"\x00\x04MQTT\x03\x02\x00\x3c"),
        connect_with(b"\x00\x04MQTT\x06\x02\x00\x3c"),
        connect_with(b"\x00\x04MQTT\x84\x02\x00\x3c"),  # a bridge's level
        connect_with(b"\x00\x04mqtt\x04\x02\x00\x3c"),
    ],
)
def test_other_protocols_and_levels_are_refused_by_name(packet: bytes) -> None:
    with pytest.raises(PeerError) as refused:
        Connect.parse(packet)
    assert refused.value.refusal is PROTOCOL_VERSION


@pytest.mark.parametrize(
    "packet",
    [
        connect_with(b"\x00\x04MQTT\x04\x03\x00\x3c"),  # the reserved flag
        connect_with(b"\x00\x04MQTT\x04\x42\x00\x3c"),  # a password alone, 3.1.1
        connect_with(b"\x00\x04MQTT\x04\x0a\x00\x3c"),  # a will's QoS without a will
        connect_with(b"\x00\x04MQTT\x04\x1e\x00\x3c"),  # QoS 3
        connect_with(b"\x00\x04MQTT\x04\x02\x00\x3c", b"\x00\x01\x00"),  # U+0000
        connect_with(b"\x00\x04MQTT\x04\x02\x00\x3c", b"\x00\x03\xed\xa0\x80"),
        connect_with(b"\x00\x04MQTT\x04\x02\x00\x3c", b"\x00\x02\xc0\x80"),
        connect_with(b"\x00\x04MQTT\x04\x02\x00\x3c", b"\x00\x00x"),  # more follows
        connect_with(b"\x00\x04MQTT\x05\x02\x00\x3c\x03\x21\x00\x00"),  # 0 in flight
        connect_with(b"\x00\x04MQTT\x05\x02\x00\x3c\x02\x24\x01"),  # a server's own
        connect_with(b"\x00\x04MQTT\x05\x02\x00\x3c\x04\x17\x01\x17\x01"),  # twice
        connect_with(b"\x00\x04MQTT\x05\x02\x00\x3c\x80\x00"),  # a long nothing
    ],
)
def test_a_malformed_connect_is_refused(packet: bytes) -> None:
    with pytest.raises(PeerError) as refused:
        Connect.parse(packet)
    assert refused.value.refusal is PACKET_MALFORMED


def test_a_password_is_not_shown() -> None:
    connect = Connect("a", username="b", password=b"hunter2")
    assert "hunter2" not in repr(connect)


@pytest.mark.parametrize("refusal", TABLE.values(), ids=TABLE)
def test_a_reason_string_carries_the_refusal(refusal: object) -> None:
    text = reason_text(refusal)  # type: ignore[arg-type]  # pytest types no parameters
    assert read_reason_text(text) is refusal
    assert read_reason_text("Bad day") is None
