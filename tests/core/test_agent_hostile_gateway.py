"""A gateway that answers nonsense: refused in words, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from device_agent.est import Gateway
from device_agent.failures import NotNowError, RefusedError
from device_agent.http import LONGEST_BODY, LONGEST_HEAD, HttpConnection
from device_agent.mqtt import LARGEST_PACKET, MqttLink, Notice, read_notice
from provisioning.model import refusals
from provisioning.model.ids import DeviceId
from provisioning.wire import mqtt
from provisioning.wire.problems import problem, problem_body

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PUMP = DeviceId.parse("pump-7")


class Scripted:
    """A stream that says what it was given, then ends, or stays silent, or goes on."""

    def __init__(self, *says: bytes, endless: bytes = b"", silent: bool = False):
        self.says = list(says)
        self.endless = endless
        self.silent = silent
        self.heard = b""
        self.given = 0
        self.closed = False

    async def read(self, limit: int = 65_536) -> bytes:
        piece = self.says.pop(0) if self.says else self.endless
        if not piece and self.silent:
            await asyncio.Event().wait()
        if piece[limit:]:
            self.says.insert(0, piece[limit:])
        self.given += len(piece[:limit])
        return piece[:limit]

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def close(self) -> None:
        self.closed = True


def gateway(*says, deadline_s=5.0, **how):
    stream = Scripted(*says, **how)
    http = HttpConnection(stream, "localhost:8443", lambda: NOW, deadline_s)
    return Gateway(http), stream


def answer(status, body, *headers):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(method, *says):
    """Ask by the name of the method; the refusal is the result."""

    async def run():
        made, _ = gateway(*says)
        arguments = {
            "simple_enroll": (b"0", (PUMP, "t")),
            "simple_reenroll": (b"0",),
        }
        try:
            return await getattr(made, method)(*arguments.get(method, ()))
        except (NotNowError, RefusedError) as error:
            return error

    return asyncio.run(run())


QUESTIONS = [
    "cacerts",
    "simple_enroll",
    "simple_reenroll",
    "next_psk",
    "whoami",
    "config",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("device", "auth", "serial", "generation", "not_after", "rotate"),
                    *("endpoints", "mqtts", "renew", "at", "jitter", "time"),
                    *("identity", "key", "code", "detail", "retryable"),
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(QUESTIONS), st.binary(max_size=300))
@example("cacerts", b"")
@example("whoami", b"HTTP/1.1 200 OK\r\n\r\n")
def test_octets_that_are_no_http_are_come_back_later(method, octets):
    told = asked(method, octets)
    assert isinstance(told, NotNowError)


@given(st.sampled_from(QUESTIONS), st.integers(200, 599), st.binary(max_size=200), JSON)
@example("next_psk", 200, b"", {"identity": "pump-7#1", "key": "zz"})
@example("config", 200, b"", {"endpoints": {"mqtts": "mqtts://[::1"}})
def test_any_body_and_status_end_in_an_answer_or_a_sentence(
    method, status, octets, document
):
    for body in (octets, json.dumps(document).encode()):
        told = asked(method, answer(status, body))
        if isinstance(told, NotNowError | RefusedError):
            assert str(told).isprintable()


@pytest.mark.parametrize("method", QUESTIONS)
@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 20_000, b"9" * 100_000, b'{"rotate":' + b"1" * 5000],
    ids=["nested lists", "nested objects", "a long number", "a longer number"],
)
def test_bodies_made_to_exhaust_a_parser_are_nonsense(method, body):
    assert isinstance(asked(method, answer(200, body)), NotNowError)
    assert isinstance(asked(method, answer(400, body)), RefusedError)


async def test_headers_without_end_are_cut_off():
    made, stream = gateway(b"HTTP/1.1 200 OK\r\n", endless=b"X-More: yes\r\n" * 100)
    with pytest.raises(NotNowError):
        await made.whoami()
    assert stream.given < 2 * LONGEST_HEAD


async def test_a_body_without_end_is_cut_off():
    chunk = b"400\r\n" + b"a" * 1024 + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    made, stream = gateway(head, endless=chunk)
    with pytest.raises(NotNowError, match="too long"):
        await made.whoami()
    assert stream.given < 2 * LONGEST_BODY


async def test_interim_answers_without_end_are_cut_off():
    made, _ = gateway(endless=b"HTTP/1.1 103 Early Hints\r\n\r\n")
    with pytest.raises(NotNowError, match="without end"):
        await made.whoami()


async def test_a_silent_gateway_is_left_after_the_deadline():
    made, _ = gateway(silent=True, deadline_s=0.05)
    with pytest.raises(NotNowError, match="too slow"):
        await made.whoami()


async def test_a_redirect_is_not_followed():
    made, stream = gateway(answer(302, b"", "Location: https://elsewhere/"))
    with pytest.raises(NotNowError, match="302"):
        await made.simple_enroll(b"0", (PUMP, "t"))
    assert stream.heard.count(b"POST") == 1


@pytest.mark.parametrize("status", [202, 503, 429])
async def test_told_to_wait_it_waits_as_long_as_it_was_told(status):
    made, _ = gateway(answer(status, b"", "Retry-After: 17"))
    with pytest.raises(NotNowError) as later:
        await made.simple_reenroll(b"0")
    assert later.value.retry_after == timedelta(seconds=17)


@pytest.mark.parametrize("refusal", refusals.TABLE.values(), ids=lambda r: r.code)
async def test_every_refusal_of_the_table_is_told_apart_by_whether_a_retry_helps(
    refusal,
):
    made, _ = gateway(answer(refusal.http, problem_body(problem(refusal))))
    kind = NotNowError if refusal.retryable else RefusedError
    with pytest.raises(kind) as told:
        await made.simple_reenroll(b"0")
    assert str(told.value) == refusal.sentence


async def test_a_sentence_cannot_drive_the_terminal():
    body = json.dumps({"code": "x", "detail": "\x1b[2Jgone\n", "retryable": False})
    made, _ = gateway(answer(403, body.encode()))
    with pytest.raises(RefusedError) as told:
        await made.whoami()
    assert str(told.value).isprintable()


async def test_the_token_is_in_the_login_and_nowhere_else():
    made, stream = gateway(answer(401, b""))
    with pytest.raises(RefusedError):
        await made.simple_enroll(b"0", (PUMP, "the-token"))
    assert b"the-token" not in stream.heard
    assert b"Authorization: Basic cHVtcC03OnRoZS10b2tlbg==" in stream.heard


async def test_one_connection_carries_several_questions():
    made, _ = gateway(
        answer(200, b'{"device": "pump-7", "auth": "psk", "generation": 1}'),
        answer(200, b'{"endpoints": {"mqtts": "mqtts://localhost:8883"}}'),
    )
    assert (await made.whoami()).auth == "psk"
    assert (await made.config()).mqtts == "mqtts://localhost:8883"


# MQTT -------------------------------------------------------------------------------
GREETING = mqtt.Connack().encode(mqtt.V5)
SUBSCRIBED = mqtt.Suback(1, b"\1").encode(mqtt.V5)


async def opened(*says, **how):
    notices: list[Notice] = []
    stream = Scripted(*says, **how)
    link = MqttLink(stream, PUMP, notices.append)
    await link.open()
    return link, stream, notices


def notice(payload=b'{"action": "rotate", "by": "2030"}', topic=None, qos=1):
    return mqtt.build_publish(
        topic or "devices/pump-7/down/credential",
        payload,
        level=mqtt.V5,
        qos=qos,
        packet_id=9 if qos else None,
    )


@given(st.binary(max_size=200), st.sampled_from([b"", GREETING, GREETING + SUBSCRIBED]))
def test_a_broker_that_speaks_nonsense_is_left(octets, before):
    async def run():
        link, _, _ = await opened(before + octets)
        await link.serve()

    with pytest.raises((NotNowError, RefusedError)):
        asyncio.run(run())


async def test_what_waited_for_the_device_comes_before_the_suback_and_is_taken():
    _, stream, notices = await opened(GREETING + notice() + SUBSCRIBED)
    assert notices == [Notice("2030", None)]
    assert mqtt.Ack(mqtt.Kind.PUBACK, 9).encode(mqtt.V5) in stream.heard


async def test_a_message_on_another_topic_is_no_notice():
    link, _, notices = await opened(
        GREETING + SUBSCRIBED + notice(topic="devices/pump-7/down/credentials")
    )
    with pytest.raises(NotNowError, match="ended"):
        await link.serve()
    assert notices == []


async def test_a_packet_larger_than_agreed_ends_the_connection():
    huge = notice(b"x" * LARGEST_PACKET)
    link, _, _ = await opened(GREETING + SUBSCRIBED + huge)
    with pytest.raises(NotNowError):
        await link.serve()


async def test_a_refused_connack_tells_the_gateways_reason():
    text = mqtt.reason_text(refusals.DEVICE_REVOKED)
    properties = ((mqtt.Prop.REASON_STRING, text),)
    with pytest.raises(RefusedError) as told:
        await opened(mqtt.Connack(0x87, properties=properties).encode(mqtt.V5))
    assert told.value.code == "device_revoked"


@pytest.mark.parametrize("code", [0x88, 0x97, 0x9F])
async def test_a_broker_that_is_away_is_come_back_to(code):
    with pytest.raises(NotNowError):
        await opened(mqtt.Connack(code).encode(mqtt.V5))


async def test_a_refused_subscription_is_a_refusal():
    with pytest.raises(RefusedError):
        await opened(GREETING + mqtt.Suback(1, b"\x87").encode(mqtt.V5))


async def test_a_silent_connection_is_pinged_and_then_left():
    quick = mqtt.Connack(properties=((mqtt.Prop.SERVER_KEEP_ALIVE, 1),))
    link, stream, _ = await opened(quick.encode(mqtt.V5) + SUBSCRIBED, silent=True)
    with pytest.raises(NotNowError, match="silent"):
        await link.serve()
    assert mqtt.PINGREQ in stream.heard


async def test_an_answer_that_is_not_allowed_is_said_to_be():
    refused = mqtt.Ack(mqtt.Kind.PUBACK, 2, 0x87).encode(mqtt.V5)
    link, _, _ = await opened(GREETING + SUBSCRIBED, refused, silent=True)
    serving = asyncio.create_task(link.serve())
    with pytest.raises(RefusedError):
        await link.publish({"action": "rotated"})
    serving.cancel()
    await asyncio.wait([serving])


@given(st.binary(max_size=200) | JSON.map(lambda told: json.dumps(told).encode()))
@example(b"[" * 100_000)
def test_any_payload_is_a_notice_or_none(payload):
    told = read_notice(payload)
    assert told is None or isinstance(told, Notice)
