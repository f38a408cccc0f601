"""A conversation's packets: what passes, what is changed, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mqtt.session import (
    MqttLimits,
    Session,
    connack_refusal,
    disconnect,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import (
    AWAY,
    BODY_TOO_LARGE,
    CREDENTIAL_MISSING,
    PACKET_MALFORMED,
    PROTOCOL_ERROR,
    PROTOCOL_VERSION,
    TOO_MANY_REQUESTS,
    TOPIC_NOT_ALLOWED,
)
from provisioning.wire.mqtt import (
    V5,
    V311,
    Ack,
    Connack,
    Connect,
    Farewell,
    Kind,
    Prop,
    Publish,
    Splitter,
    Suback,
    Subscribe,
    Value,
    build_publish,
    number_of,
    text_of,
)

PUMP = DeviceId.parse("pump-7")
LIMITS = MqttLimits()


def opened(level: int = V5, *properties: tuple[int, Value]) -> Session:
    session = Session(Connect("", level, properties=properties), PUMP, LIMITS)
    aliases = ((Prop.TOPIC_ALIAS_MAXIMUM, 10),) if level == V5 else ()
    session.accepted(Connack(properties=aliases).encode(level))
    return session


def refused_publish(session: Session, topic: str = "elsewhere") -> Ack:
    answer = session.up(build_publish(topic, b"", level=V5, qos=1, packet_id=3))
    assert answer is not None
    assert not answer.on
    return Ack.parse(answer.back, V5)


def test_the_broker_gets_the_device_as_user_and_no_password() -> None:
    connect = Connect("pump-7:app", username="root", password=b"hunter2")
    told = Connect.parse(Session(connect, PUMP, LIMITS).for_broker)
    assert (told.client_id, told.username, told.password) == (
        "pump-7:app",
        "pump-7",
        None,
    )


def test_the_broker_is_told_the_smaller_of_the_largest_packets() -> None:
    for asked, told in ((100, 100), (1 << 30, LIMITS.max_delivery_bytes)):
        connect = Connect("", properties=((Prop.MAXIMUM_PACKET_SIZE, asked),))
        passed = Connect.parse(Session(connect, PUMP, LIMITS).for_broker)
        assert number_of(passed.properties, Prop.MAXIMUM_PACKET_SIZE) == told


def test_the_device_is_told_the_gateway_s_own_limits() -> None:
    session = Session(Connect(""), PUMP, LIMITS)
    theirs = ((Prop.MAXIMUM_PACKET_SIZE, 1 << 20), (Prop.TOPIC_ALIAS_MAXIMUM, 99))
    connack = Connack.parse(session.accepted(Connack(properties=theirs).encode(V5)), V5)
    told = connack.properties
    assert number_of(told, Prop.MAXIMUM_PACKET_SIZE) == LIMITS.max_packet_bytes
    assert number_of(told, Prop.TOPIC_ALIAS_MAXIMUM) == LIMITS.max_topic_aliases
    assert text_of(told, Prop.ASSIGNED_CLIENT_ID) == "pump-7"


def test_a_broker_s_refusal_passes_and_ends_the_conversation() -> None:
    session = Session(Connect(""), PUMP, LIMITS)
    refusal = Connack(0x89).encode(V5)
    assert session.accepted(refusal) == refusal
    assert session.ended


def test_the_sentence_is_left_out_where_the_client_does_not_want_it() -> None:
    assert refused_publish(opened()).properties
    quiet = opened(V5, (Prop.REQUEST_PROBLEM_INFO, 0))
    assert refused_publish(quiet) == Ack(Kind.PUBACK, 3, 0x87)


def test_the_sentence_is_left_out_where_the_client_has_no_room_for_it() -> None:
    small = opened(V5, (Prop.MAXIMUM_PACKET_SIZE, 30))
    assert refused_publish(small) == Ack(Kind.PUBACK, 3, 0x87)


def test_a_partly_refused_subscribe_is_put_together_again() -> None:
    session = opened()
    asked = (("#", 0), ("devices/pump-7/down/a", 1), ("devices/pump-7/down/b", 2))
    answer = session.up(Subscribe(5, asked).encode(V5))
    assert answer is not None
    assert Subscribe.parse(answer.on, V5).filters == asked[1:]
    other = Suback(6, b"\x00").encode(V5)
    assert session.down(other) == other
    merged = Suback.parse(session.down(Suback(5, b"\x01\x02").encode(V5)), V5)
    assert merged.codes == b"\x87\x01\x02"
    again = Suback(5, b"\x01\x02").encode(V5)
    assert session.down(again) == again, "it is forgotten"


def test_subscribes_under_way_are_counted_and_bounded() -> None:
    session = opened()
    asked = (("#", 0), ("devices/pump-7/down/a", 1))
    for number in range(1, LIMITS.max_open_subscribes + 1):
        assert session.up(Subscribe(number, asked).encode(V5)) is not None
    with pytest.raises(PeerError) as refused:
        session.up(Subscribe(1, asked).encode(V5))
    assert refused.value.refusal is PROTOCOL_ERROR
    with pytest.raises(PeerError) as refused:
        session.up(Subscribe(9_999, asked).encode(V5))
    assert refused.value.refusal is TOO_MANY_REQUESTS


def test_a_suback_that_does_not_fit_is_the_broker_s_fault() -> None:
    session = opened()
    asked = (("#", 0), ("devices/pump-7/down/a", 1))
    session.up(Subscribe(1, asked).encode(V5))
    with pytest.raises(PeerError):
        session.down(Suback(1, b"\x00\x00").encode(V5))


@pytest.mark.parametrize("level", [V311, V5])
def test_goodbye_is_the_last_that_passes(level: int) -> None:
    answer = opened(level).up(Farewell().encode(level))
    assert answer is not None
    assert answer.last
    assert answer.on == Farewell().encode(level)


def test_a_refusal_takes_the_form_of_the_version() -> None:
    assert Connack.parse(connack_refusal(V311, CREDENTIAL_MISSING), V311).code == 5
    five = Connack.parse(connack_refusal(V5, CREDENTIAL_MISSING), V5)
    assert five.code == 0x87
    # 3.1.1 closes in silence where the packet is wrong (3.1.4).
    for refusal in (PACKET_MALFORMED, PROTOCOL_ERROR, BODY_TOO_LARGE):
        assert connack_refusal(V311, refusal) == b""
    assert connack_refusal(3, PROTOCOL_VERSION) == b"\x20\x02\x00\x01"
    assert connack_refusal(0, PROTOCOL_VERSION) == b""
    assert disconnect(V311, TOPIC_NOT_ALLOWED) == b""
    # "Server unavailable" has no place in DISCONNECT.
    assert Farewell.parse(disconnect(V5, AWAY), V5).code == 0x8B


topics = st.sampled_from(
    ["devices/pump-7/up/a", "devices/pump-8/up/a", "devices/pump-7/down/a", "#", ""]
)
filters = st.sampled_from(
    ["devices/pump-7/down/#", "devices/pump-8/down/#", "#", "$SYS/#", "$share/g/#"]
)


@st.composite
def sayings(draw: st.DrawFn, level: int) -> bytes:
    """Packets that are well-formed, and some that are not."""
    qos = draw(st.integers(0, 2))
    properties = (
        ((Prop.TOPIC_ALIAS, draw(st.integers(1, 9))),)
        if level == V5 and draw(st.booleans())
        else ()
    )
    return draw(
        st.one_of(
            st.builds(
                build_publish,
                topics,
                st.binary(max_size=9),
                level=st.just(level),
                qos=st.just(qos),
                packet_id=st.integers(1, 9) if qos else st.none(),
                properties=st.just(properties),
            ),
            st.builds(
                lambda number, asked: Subscribe(number, tuple(asked)).encode(level),
                st.integers(1, 9),
                st.lists(st.tuples(filters, st.integers(0, 2)), min_size=1, max_size=4),
            ),
            st.builds(
                lambda first, body: bytes((first, len(body))) + body,
                st.integers(16, 255),
                st.binary(max_size=40),
            ),
        )
    )


@pytest.mark.parametrize("level", [V311, V5])
@given(data=st.data())
def test_whatever_a_device_says_only_its_branch_reaches_the_broker(
    level: int, data: st.DataObject
) -> None:
    session = opened(level)
    for packet in data.draw(st.lists(sayings(level), max_size=12)):
        splitter = Splitter(LIMITS.max_packet_bytes)
        splitter.receive_data(packet)
        try:
            whole = splitter.next_packet()
            if whole is None:
                continue
            answer = session.up(whole)
        except PeerError:
            return  # the connection ends here
        passed = whole if answer is None else answer.on
        if not passed:
            continue
        if passed[0] >> 4 == Kind.PUBLISH:
            topic = Publish.parse(passed, level).topic
            assert topic == "" or topic.startswith("devices/pump-7/up/")
        elif passed[0] >> 4 == Kind.SUBSCRIBE:
            for topic_filter, _ in Subscribe.parse(passed, level).filters:
                assert topic_filter.startswith("devices/pump-7/down/")
        else:
            assert passed[0] >> 4 not in {Kind.CONNECT, Kind.AUTH}
