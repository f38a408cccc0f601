"""How little a slow, silent or greedy client can take from a running gateway.

The gateway of these tests gives one second to a handshake, a header and a body, and
has room for 4 handshakes and 24 connections at a time.
"""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from device_client import EST, WHOAMI, Device, issued

DEADLINE_S = 1.0
LATE_S = 3.0
"""Until when a deadline of a second must have bitten, on a busy machine too."""
HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(32)
"""The beginning of a ClientHello."""
HEAD = f"GET {WHOAMI} HTTP/1.1\r\nHost: localhost\r\n".encode()
POST = (
    f"POST {EST}/simpleenroll HTTP/1.1\r\nHost: localhost\r\n"
    "Accept: application/problem+json\r\nContent-Type: application/pkcs10\r\n"
).encode()


@asynccontextmanager
async def raw(gateway, listener="https"):
    """A TCP connection, without TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ready[listener])
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def end_of(reader, within=LATE_S):
    """Wait until the other side has ended the connection; the seconds it took."""
    start = time.monotonic()
    async with asyncio.timeout(within):
        try:
            while await reader.read(65_536):
                pass
        except ConnectionError:
            pass
    return time.monotonic() - start


async def drip(write, piece=b"x"):
    """An octet every tenth of a second, until the connection refuses more."""
    while True:
        await asyncio.sleep(0.1)  # this is what the client does, not a wait for it
        await write(piece)


@pytest.mark.parametrize("listener", ["https", "mqtts"])
@pytest.mark.parametrize("said", [b"", HELLO], ids=["nothing", "half a hello"])
async def test_a_half_open_client_is_cut_at_the_deadline(
    narrow_gateway, listener, said
):
    async with raw(narrow_gateway, listener) as (reader, writer):
        writer.write(said)
        took = await end_of(reader)
    assert took > DEADLINE_S / 2


async def test_dripping_a_hello_buys_no_time(narrow_gateway):
    async with raw(narrow_gateway) as (reader, writer):
        writer.write(HELLO)

        async def write(piece):
            writer.write(piece)
            await writer.drain()

        dripping = asyncio.create_task(drip(write))
        await end_of(reader)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


@asynccontextmanager
async def crowd(gateway, size, said):
    """That many connections that have said so much and say no more."""
    async with AsyncExitStack() as stack:
        for _ in range(size):
            _, writer = await stack.enter_async_context(raw(gateway))
            writer.write(said)
        yield


async def test_a_full_house_of_handshakes_makes_others_wait_not_fail(
    narrow_gateway, narrow_field
):
    async with crowd(narrow_gateway, 4, HELLO):
        device = asyncio.create_task(narrow_field.whoami())
        done, _ = await asyncio.wait([device], timeout=0.3)
        assert not done  # it waits its turn
    assert (await device).status == 200


async def test_silent_connections_take_no_turn_of_others(narrow_gateway, narrow_field):
    """The twin: who has said nothing costs no handshake."""
    async with crowd(narrow_gateway, 8, b""):
        async with asyncio.timeout(DEADLINE_S / 2):
            assert (await narrow_field.whoami()).status == 200


async def test_one_connection_too_many_is_closed_at_once_and_room_comes_back(
    narrow_gateway, narrow_field
):
    async with crowd(narrow_gateway, 24, b""):
        async with raw(narrow_gateway) as (reader, writer):
            writer.write(HELLO)
            assert await end_of(reader) < DEADLINE_S / 2
        # The other listener has room of its own.
        async with narrow_field.mqtt() as mqtt:
            assert (await mqtt.connect()).code == 0x87
    for _ in range(30):
        assert (await narrow_field.whoami()).status == 200


async def test_a_header_that_never_ends_is_cut(narrow_field):
    async with narrow_field.https() as http:
        await http.stream.write(HEAD)
        assert await http.ended(LATE_S) == b""


async def test_dripping_a_header_buys_no_time(narrow_field):
    async with narrow_field.https() as http:
        await http.stream.write(HEAD + b"X-Slow: ")
        dripping = asyncio.create_task(drip(http.stream.write))
        await http.ended(LATE_S)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def test_a_connection_on_which_nothing_is_asked_is_cut(narrow_field):
    async with narrow_field.https() as http:
        assert await http.ended(LATE_S) == b""


async def test_a_kept_connection_is_not_kept_for_ever(narrow_field):
    async with narrow_field.https() as http:
        assert (await http.whoami()).status == 200
        assert (await http.whoami()).status == 200
        assert await http.ended(2 + LATE_S) == b""


async def test_a_body_that_never_ends_is_told_so(narrow_field):
    async with narrow_field.https() as http:
        answer = await http.say(POST + b"Content-Length: 100\r\n\r\nMIIB")
        assert (answer.status, answer.code) == (408, "request_slow")
        assert answer.document["retryable"] is True
        await http.ended(2 + LATE_S)


async def test_dripping_a_body_buys_no_time(narrow_field):
    async with narrow_field.https() as http:
        await http.stream.write(POST + b"Content-Length: 1000\r\n\r\nMIIB")
        dripping = asyncio.create_task(drip(http.stream.write))
        async with asyncio.timeout(LATE_S):
            answer = await http.hear()
        assert (answer.status, answer.code) == (408, "request_slow")
        await http.ended(2 + LATE_S)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def test_a_body_that_nobody_reads_does_not_hold_the_connection(narrow_field):
    """`whoami` takes no body; that one is promised and never comes changes nothing."""
    async with narrow_field.https() as http:
        answer = await http.say(HEAD + b"Content-Length: 100000\r\n\r\nx")
        assert answer.status == 200
        await http.ended(2 + LATE_S)


@pytest.mark.parametrize(
    "begun",
    [
        (b"Content-Length: 1000\r\n", b"MIIB"),
        (b"Transfer-Encoding: chunked\r\n", b"4\r\nMIIB\r\n"),
        (b"Transfer-Encoding: chunked\r\n", b"no number\r\nMIIB\r\n"),
    ],
    ids=["of a length", "chunked", "chunked wrongly"],
)
async def test_a_client_that_hangs_up_in_its_body_is_no_incident(
    narrow_gateway, narrow_field, begun
):
    """It is the client's doing, or its radio's: no stack in the log, no alarm."""
    before = len(narrow_gateway.said("incident"))
    header, body = begun
    async with narrow_field.https() as http:
        await http.stream.write(POST + header + b"Expect: 100-continue\r\n\r\n")
        assert b"100 Continue" in await http.stream.read()  # it waits for the body
        await http.stream.write(body)
    # The next one's answer comes after what the gateway made of the first.
    assert (await narrow_field.whoami()).status == 200
    assert narrow_gateway.said("incident")[before:] == []


@pytest.mark.parametrize(
    "declared",
    [
        b"Content-Length: 100000000\r\n\r\n",
        b"Content-Length: 65537\r\n\r\n" + b"A" * 99,
    ],
    ids=["a hundred megabytes", "one octet too many"],
)
async def test_a_body_too_large_is_refused_before_it_is_sent(narrow_field, declared):
    async with narrow_field.https() as http:
        answer = await http.say(POST + declared)
        assert (answer.status, answer.code) == (413, "body_too_large")


async def test_a_body_of_unknown_length_is_refused_when_it_is_too_large(narrow_field):
    """Chunked: only counting shows it."""
    chunk = b"4000\r\n" + b"A" * 0x4000 + b"\r\n"
    async with narrow_field.https() as http:
        answer = await http.say(
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5 + b"0\r\n\r\n"
        )
        assert (answer.status, answer.code) == (413, "body_too_large")


async def test_a_body_at_the_limit_is_judged_by_its_content(narrow_field):
    """The twin: it is large, it is read, and it is no CSR."""
    pair = base64.b64encode(b"big:x").decode()
    async with narrow_field.https() as http:
        answer = await http.ask(
            "POST",
            f"{EST}/simpleenroll",
            b"A" * 65_536,
            Content_Type="application/pkcs10",
            Authorization=f"Basic {pair}",
        )
    assert (answer.status, answer.code) == (400, "csr_malformed")


@pytest.mark.parametrize(
    "extra",
    [b"X-Long: " + b"x" * 20_000 + b"\r\n", b"X-Many: x\r\n" * 2_000],
    ids=["one long header", "many headers"],
)
async def test_headers_too_large_are_refused(narrow_field, extra):
    async with narrow_field.https() as http:
        answer = await http.say(HEAD + extra + b"\r\n")
        assert answer.status in (0, 400, 431)
    assert (await narrow_field.whoami()).status == 200


async def test_an_mqtt_client_that_says_nothing_is_cut(narrow_field):
    async with narrow_field.mqtt() as mqtt, asyncio.timeout(LATE_S):
        assert await mqtt.hear() is None


async def test_a_client_that_asks_and_never_reads_does_not_grow_the_gateway(
    narrow_gateway, narrow_field
):
    """Pipelined requests pile up at the client, not in the gateway's memory."""
    before = resident_kib(narrow_gateway.process.pid)
    request = f"GET {EST}/cacerts HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    async with narrow_field.https() as http:
        piece, sent = request * 500, 0
        http.stream._transport.pause_reading()
        try:
            async with asyncio.timeout(5):
                while sent < 48 << 20:
                    await http.stream.write(piece)
                    sent += len(piece)
        except (TimeoutError, ConnectionError):
            pass  # held back, or cut: both are right
        grown = resident_kib(narrow_gateway.process.pid) - before
    assert grown < 16 << 10, f"{grown} KiB for {sent >> 10} KiB sent"


def resident_kib(pid: int) -> int:
    """VmRSS of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123 - proc
        for line in status:
            if line.startswith("VmRSS"):
                return int(line.split()[1])
    raise AssertionError("no VmRSS")


async def test_plenty_of_enrolments_after_all_that(narrow_gateway, narrow_field):
    """Whatever the clients above did, nothing of it is left."""
    for n in range(3):
        device = Device(f"after-all-{n}")
        token = await narrow_gateway.token(device.name)
        async with narrow_field.https() as http:
            issued(await http.enroll(device.csr, basic=(device.name, token)))
