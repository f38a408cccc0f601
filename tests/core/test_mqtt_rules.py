"""Who a client may call itself, and the branch it cannot leave."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.mqtt.rules import (
    Aliases,
    Branch,
    client_id,
    judge_connect,
    judge_publish,
    may_be_answered,
    may_publish,
    may_subscribe,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import (
    AUTH_METHOD,
    CLIENT_ID_NOT_ALLOWED,
    PROTOCOL_ERROR,
    TOPIC_NOT_ALLOWED,
)
from provisioning.wire.mqtt import V5, Connect, Prop, Publish, Will, build_publish

PUMP = DeviceId.parse("pump-7")
BRANCH = Branch.of(PUMP)

levels = st.sampled_from(
    [
        *("devices", "pump-7", "pump-8", "pump-", "down", "up", "+", "#", "", "a"),
        *("$share", "$SYS", "a+", "#b", "$share/g"),
    ]
)
filters = st.one_of(
    st.lists(levels, min_size=1, max_size=8).map("/".join),
    st.lists(levels, min_size=1, max_size=4).map(
        lambda more: "/".join(("devices", "pump-7", "down", *more))
    ),
)
topics = st.lists(
    st.sampled_from(["devices", "pump-7", "pump-8", "down", "up", "", "a", "$SYS"]),
    min_size=1,
    max_size=6,
).map("/".join)


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT 5, 4.7, written from its text, not from ours."""
    wanted, there = topic_filter.split("/"), topic.split("/")
    if there[0].startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for place, level in enumerate(wanted):
        if level == "#":
            return True  # what follows, and the parent level itself
        if place >= len(there) or level not in {"+", there[place]}:
            return False
    return len(wanted) == len(there)


def unshared(topic_filter: str) -> str:
    """MQTT 5, 4.8.2: the filter inside of a shared subscription."""
    if topic_filter.startswith("$share/"):
        return topic_filter.split("/", 2)[2] if topic_filter.count("/") > 1 else ""
    return topic_filter


@given(filters, topics)
def test_no_allowed_filter_matches_a_topic_outside_of_the_branch(
    topic_filter: str, topic: str
) -> None:
    assume(may_subscribe(topic_filter, BRANCH))
    if matches(unshared(topic_filter), topic):
        assert topic.startswith("devices/pump-7/down")
        assert topic[len("devices/pump-7/down") :][:1] in {"", "/"}


@given(topics)
def test_a_topic_is_allowed_exactly_where_a_subscriber_of_the_branch_gets_it(
    topic: str,
) -> None:
    inside = matches("devices/pump-7/up/#", topic) and topic not in {
        "devices/pump-7/up",
        "devices/pump-7/up/",
    }
    assert may_publish(topic, BRANCH) == inside


@pytest.mark.parametrize(
    "topic_filter",
    [
        "devices/pump-7/down/#",
        "devices/pump-7/down/+",
        "devices/pump-7/down/credential",
        "devices/pump-7/down/+/x/#",
        "$share/workers/devices/pump-7/down/#",
    ],
)
def test_filters_below_the_own_branch_are_allowed(topic_filter: str) -> None:
    assert may_subscribe(topic_filter, BRANCH)


@pytest.mark.parametrize(
    "topic_filter",
    [
        *("#", "+/#", "devices/#", "devices/+/down/#", "devices/pump-7/#"),
        *("devices/pump-7/down", "devices/pump-7/down/", "devices/pump-7/up/#"),
        *("devices/pump-70/down/#", "devices/PUMP-7/down/#", "/devices/pump-7/down/a"),
        *("$SYS/#", "$share/g/#", "$share/g", "$share//devices/pump-7/down/#"),
        *("$share/+/devices/pump-7/down/#", "$share/devices/pump-7/down/#"),
        *("$share/a/$share/b/devices/pump-7/down/#", "$queue/devices/pump-7/down/#"),
        *(
            "devices/pump-7/down/a#",
            "devices/pump-7/down/#/a",
            "devices/pump-7/down/a+",
        ),
    ],
)
def test_filters_elsewhere_are_not_allowed(topic_filter: str) -> None:
    assert not may_subscribe(topic_filter, BRANCH)


@pytest.mark.parametrize(
    "topic",
    [
        *("devices/pump-7/up", "devices/pump-7/up/", "devices/pump-7/down/a"),
        *("devices/pump-8/up/a", "devices/pump-7/up/+", "devices/pump-7/up/a/#"),
        *("$SYS/x", "", "devices/pump-7/upper/a", "$share/g/devices/pump-7/up/a"),
    ],
)
def test_publications_elsewhere_are_not_allowed(topic: str) -> None:
    assert not may_publish(topic, BRANCH)
    assert may_publish("devices/pump-7/up/a", BRANCH)


@pytest.mark.parametrize("asked", ["pump-7", "pump-7:agent", "pump-7:" + "a" * 32])
def test_a_client_is_the_device_or_a_part_of_it(asked: str) -> None:
    assert client_id(asked, PUMP) == asked
    assert client_id("", PUMP) == "pump-7"


@pytest.mark.parametrize(
    "asked",
    [
        *("pump-8", "pump-7:", "pump-7:a:b", "pump-7:a_b", "pump-7:" + "a" * 33),
        *("pump-70", "pump-7\n", "pump-7:a\n", ":gateway", "pump-7:ä", "PUMP-7"),
    ],
)
def test_any_other_client_identifier_is_refused(asked: str) -> None:
    with pytest.raises(PeerError) as refused:
        client_id(asked, PUMP)
    assert refused.value.refusal is CLIENT_ID_NOT_ALLOWED


@given(st.text(max_size=12))
def test_no_identifier_of_another_device_is_allowed(text: str) -> None:
    try:
        allowed = client_id(text, PUMP)
    except PeerError:
        return
    assert allowed.partition(":")[0] == "pump-7"


def test_a_response_topic_is_where_the_device_listens() -> None:
    # Free, it would have a service write into another device's branch.
    assert may_be_answered("devices/pump-7/down/answers/1", BRANCH)
    for topic in ("devices/pump-8/down/a", "devices/pump-7/up/a", "x", "", "#"):
        assert not may_be_answered(topic, BRANCH)


@pytest.mark.parametrize(
    "will",
    [
        Will("devices/pump-8/up/a", b""),
        Will("devices/pump-7/down/a", b""),
        Will(
            "devices/pump-7/up/a",
            b"",
            properties=((Prop.RESPONSE_TOPIC, "devices/pump-8/down/a"),),
        ),
    ],
)
def test_a_will_obeys_the_rules_of_publications(will: Will) -> None:
    with pytest.raises(PeerError) as refused:
        judge_connect(Connect("", will=will), PUMP, BRANCH)
    assert refused.value.refusal is TOPIC_NOT_ALLOWED
    allowed = Will(
        "devices/pump-7/up/a",
        b"",
        properties=((Prop.RESPONSE_TOPIC, "devices/pump-7/down/a"),),
    )
    assert judge_connect(Connect("", will=allowed), PUMP, BRANCH) == "pump-7"


def test_another_authentication_is_not_passed_to_the_broker() -> None:
    connect = Connect("", properties=((Prop.AUTH_METHOD, "SCRAM-SHA-256"),))
    with pytest.raises(PeerError) as refused:
        judge_connect(connect, PUMP, BRANCH)
    assert refused.value.refusal is AUTH_METHOD


def published(topic: str, alias: int, response: str | None = None) -> Publish:
    properties: tuple[tuple[int, int | str], ...] = ((Prop.TOPIC_ALIAS, alias),)
    if response is not None:
        properties += ((Prop.RESPONSE_TOPIC, response),)
    packet = build_publish(topic, b"", level=V5, properties=properties)
    return Publish.parse(packet, V5)


def test_an_alias_is_judged_by_what_it_means() -> None:
    aliases = Aliases(2)
    judge_publish(published("devices/pump-7/up/a", 1), BRANCH, aliases)
    judge_publish(published("", 1), BRANCH, aliases)
    for topic in ("devices/pump-8/up/a", ""):
        with pytest.raises(PeerError) as refused:
            judge_publish(published(topic, 1), BRANCH, aliases)
        assert refused.value.refusal is TOPIC_NOT_ALLOWED


def test_an_alias_that_came_with_a_refused_message_is_not_set() -> None:
    aliases = Aliases(2)
    message = published("devices/pump-7/up/b", 1, response="devices/pump-8/down/a")
    for publish in (message, published("", 1)):
        with pytest.raises(PeerError) as refused:
            judge_publish(publish, BRANCH, aliases)
        assert refused.value.refusal is TOPIC_NOT_ALLOWED


@pytest.mark.parametrize("publish", [published("", 1), published("a", 3)])
def test_an_alias_never_set_or_above_the_limit_breaks_the_protocol(
    publish: Publish,
) -> None:
    with pytest.raises(PeerError) as refused:
        judge_publish(publish, BRANCH, Aliases(2))
    assert refused.value.refusal is PROTOCOL_ERROR


@given(st.lists(st.tuples(topics | st.just(""), st.integers(1, 4)), max_size=12))
def test_whatever_aliases_do_only_the_branch_is_reached(
    sent: list[tuple[str, int]],
) -> None:
    aliases = Aliases(4)
    broker: dict[int, str] = {}
    for topic, alias in sent:
        publish = published(topic, alias)
        try:
            judge_publish(publish, BRANCH, aliases)
        except PeerError:
            continue
        # What a broker does with those that pass:
        if topic:
            broker[alias] = topic
        assert broker[alias].startswith("devices/pump-7/up/")
