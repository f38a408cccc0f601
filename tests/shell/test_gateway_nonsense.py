"""Nonsense from the network at a running gateway: refused in words, and forgotten."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate, ocsp
from device_client import EST, NOTHING, WHOAMI, Answer, Device, Https, issued
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from provisioning.model.refusals import TABLE
from provisioning.tls.aio import HandshakeError
from provisioning.tls.context import ClientPsk

MALFORMED = ocsp.OCSPResponseStatus.MALFORMED_REQUEST
FULL = os.environ.get("BIRTHMARK_TORTURE") == "full"
"""Many more examples; then give pytest a longer --timeout, too."""
thrown = settings(
    max_examples=1_500 if FULL else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
headers = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"),
    max_size=600,
)


@pytest.fixture(autouse=True)
async def nothing_remains(gateway, field):
    """After each test: no bug was met, and the next device is served."""
    incidents = len(gateway.said("incident"))
    yield
    assert gateway.alive
    assert gateway.said("incident")[incidents:] == []
    assert (await field.whoami()).status == 200


def refused_in_words(answer: Answer) -> None:
    """A status of the client's fault, with a code that the table has."""
    assert 400 <= answer.status < 500, answer
    assert answer.code in TABLE
    assert answer.document["status"] == answer.status
    assert answer.document["detail"]


async def throw(gateway, listener: str, octets: bytes) -> bytes:
    """Send octets over TCP, say that there are no more, read what comes."""
    port = gateway.ready[listener]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    with contextlib.suppress(ConnectionError):
        writer.write(octets)
        writer.write_eof()
        async with asyncio.timeout(5):
            found = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return found


# TLS ------------------------------------------------------------------------------
records = st.builds(
    lambda kind, version, body: (
        bytes((kind, 3, version)) + len(body).to_bytes(2) + body
    ),
    st.sampled_from([20, 21, 22, 23, 24, 128]),
    st.integers(0, 4),
    st.binary(max_size=200),
)


@pytest.mark.parametrize("listener", ["https", "mqtts"])
@thrown
@given(octets=st.one_of(st.binary(max_size=400), st.lists(records).map(b"".join)))
@example(b"GET / HTTP/1.1\r\n\r\n")
@example(b"\x16\x03\x01\xff\xff" + bytes(200))
async def test_octets_that_are_no_tls(gateway, listener, octets):
    answered = await throw(gateway, listener, octets)
    # An alert record or nothing; never anything that only a peer could read.
    assert answered[:1] in (b"", b"\x15")


@pytest.mark.parametrize("newest", ["TLSv1.2", "TLSv1.3"])
@thrown
@given(
    identity=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
        st.from_regex(r"[A-Za-z0-9.\-]{1,40}#[0-9]{1,12}", fullmatch=True),
    ),
    key=st.binary(min_size=16, max_size=32),
)
@example(identity="pump#1", key=bytes(32))
@example(identity="#", key=bytes(32))
@example(identity="x" * 64 + "#999999999", key=bytes(32))
async def test_a_psk_that_nobody_made_proves_nobody(field, newest, identity, key):
    try:
        answer = await field.whoami(ClientPsk(identity, key), newest=newest)
    except (HandshakeError, ConnectionError):
        return
    # TLS 1.3 may go on without the PSK: then nothing is proven.
    assert answer.document["auth"] is None


# HTTP -----------------------------------------------------------------------------
lines = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda method, path, version, head, body: (
            f"{method} {path} {version}\r\n".encode("latin-1")
            + "".join(f"{k}: {v}\r\n" for k, v in head).encode("latin-1")
            + b"\r\n"
            + body
        ),
        st.sampled_from(
            ["GET", "POST", "PUT", "HEAD", "CONNECT", "PRI", "get", "\xff"]
        ),
        st.one_of(
            st.sampled_from([WHOAMI, f"{EST}/simpleenroll", "*", "//", "http://x/y"]),
            headers,
        ),
        st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]),
        st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        "Host",
                        "Content-Length",
                        "Transfer-Encoding",
                        "Content-Type",
                        "Content-Encoding",
                        "Expect",
                        "Upgrade",
                        "Connection",
                        "Accept",
                        "\x00",
                    ]
                ),
                st.one_of(
                    st.sampled_from(["-1", "5", "chunked", "gzip", "100-continue"]),
                    headers,
                ),
            ),
            max_size=6,
        ),
        st.binary(max_size=100),
    ),
)


@thrown
@given(octets=lines)
@example(b"CONNECT  \r\n\r\n")
@example(b"\r\n" * 200)
@example(b"GET /device/v1/whoami HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")
async def test_octets_that_are_no_http(field, octets):
    async with field.https() as http:
        with contextlib.suppress(ConnectionError):
            await http.stream.write(octets)
            # What is half a request is ended by this; what is whole is answered.
            await http.stream.write(b"\r\n\r\nX\r\n\r\n")
            async with asyncio.timeout(5):
                answer = await http.hear()
            assert answer.status < 500 or answer.status == 501


@thrown
@given(octets=lines)
async def test_octets_that_are_no_plain_http(gateway, octets):
    answered = await throw(gateway, "http", octets)
    assert b"HTTP/1.1 5" not in answered.replace(b"HTTP/1.1 501", b"")


@thrown
@given(path=st.text(max_size=200).map(lambda t: "/" + t))
@example("/.well-known/est/../est/simpleenroll")
@example("/.well-known/est/%2e%2e/cacerts")
@example("/crl/../../hsm/pin")
@example("/ca/..%2f..%2fhsm%2fpin.crt")
async def test_paths_lead_nowhere_that_is_not_there(gateway, field, path):
    raw = path.encode("utf-8", "surrogateescape" if path.isascii() else "replace")
    raw = bytes(b for b in raw if b > 0x20 and b != 0x7F)
    request = b"GET " + raw + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with field.https() as http:
        answer = await http.say(request)
        assert answer.status in (0, 200, 400, 401, 404, 405), (path, answer)
    answered = await throw(gateway, "http", request)
    pin = (gateway.data / "hsm" / "pin").read_bytes().strip()
    assert pin not in answer.body + answered


# Who is asking --------------------------------------------------------------------
@pytest.fixture
async def csr():
    return Device("nonsense").csr


@thrown
@given(value=headers)
@example("Basic")
@example("Basic =")
@example("Basic Og==")
@example("Bearer abc")
@example("Basic " + base64.b64encode(b"pump:").decode())
@example("Basic " + base64.b64encode(b":token").decode())
@example("Basic " + "A" * 599)
async def test_authorization_that_is_none(field, csr, value):
    async with field.https() as http:
        answer = await http.ask(
            "POST",
            f"{EST}/simpleenroll",
            base64.b64encode(csr),
            Content_Type="application/pkcs10",
            Authorization=value,
        )
    refused_in_words(answer)


@thrown
@given(pair=st.one_of(st.binary(max_size=300), st.binary().map(lambda b: b"pump:" + b)))
@example(b"a/../b:x")
@example(b"pump-1:" + b"\x00" * 40)
@example("pümp:x".encode())
async def test_tokens_that_nobody_made(field, csr, pair):
    async with field.https() as http:
        answer = await http.ask(
            "POST",
            f"{EST}/simpleenroll",
            base64.b64encode(csr),
            Content_Type="application/pkcs10",
            Authorization="Basic " + base64.b64encode(pair).decode(),
        )
    refused_in_words(answer)


# EST bodies -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def mutants(gateway):
    """A request that would do, and what admits it any number of times."""
    token = gateway.token_now("mutant", uses=100_000)
    return Device("mutant").csr, ("mutant", token)


def mutated(data, der: bytes) -> bytes:
    """The DER with a few octets changed, cut out, put in, or the end cut off."""
    found = bytearray(der)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(found) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert", "end"])):
            case "flip" if found:
                found[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set" if found:
                found[at] = data.draw(st.integers(0, 255))
            case "cut":
                del found[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                found[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                del found[at:]
    return bytes(found)


@thrown
@given(data=st.data())
async def test_a_request_changed_on_its_way_gets_no_certificate(field, mutants, data):
    der, basic = mutants
    changed = mutated(data, der)
    async with field.https() as http:
        answer = await http.enroll(changed, basic=basic)
        if changed == der:
            issued(answer)
        else:
            refused_in_words(answer)
            assert answer.status == 400


@thrown
@given(body=st.one_of(st.binary(max_size=500), st.text(max_size=500).map(str.encode)))
@example(b"")
@example(b"\x30\x80")
@example(b"=" * 64)
@example(base64.b64encode(b"\x30\x84\xff\xff\xff\xff"))
@example(base64.b64encode(b"\x30" * 400))
async def test_a_body_that_is_no_request(field, mutants, body):
    _, basic = mutants
    pair = base64.b64encode(":".join(basic).encode()).decode()
    async with field.https() as http:
        answer = await http.ask(
            "POST",
            f"{EST}/simpleenroll",
            body,
            Content_Type="application/pkcs10",
            Authorization=f"Basic {pair}",
        )
    refused_in_words(answer)


# OCSP -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def question(gateway):
    """A request about the issuing CA's first certificate that comes to hand."""
    issuing = load_der_x509_certificate(gateway.certificate("issuing").read_bytes())
    root = load_der_x509_certificate(gateway.certificate("root").read_bytes())
    builder = ocsp.OCSPRequestBuilder()
    return builder.add_certificate(issuing, root, hashes.SHA1()).build()  # noqa: S303 - what is asked by


@contextlib.asynccontextmanager
async def plain(gateway):
    """An HTTP connection to the listener that has no TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ready["http"])

    class Plain:
        """What `Https` needs of a stream."""

        async def read(self) -> bytes:
            return await reader.read(65_536)

        async def write(self, octets: bytes) -> None:
            writer.write(octets)
            await writer.drain()

    try:
        yield Https(Plain())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def understood(answer: Answer) -> ocsp.OCSPResponse | None:
    """An OCSP response, of whatever status; None where HTTP itself refused."""
    assert answer.status in (200, 400, 404, 405, 413, 414), answer
    if answer.status != 200:
        return None
    assert answer.headers["content-type"] == "application/ocsp-response"
    return ocsp.load_der_ocsp_response(answer.body)


@thrown
@given(data=st.data())
async def test_ocsp_requests_changed_on_their_way(gateway, question, data):
    der = question.public_bytes(Encoding.DER)
    changed = mutated(data, der)
    async with plain(gateway) as http:
        answer = await http.ask(
            "POST", "/ocsp", changed, Content_Type="application/ocsp-request"
        )
        response = understood(answer)
        assert response is not None
        # What can still be read is answered; nothing is said to be good but what was
        # asked about.
        if response.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL:
            for one in response.responses:
                if one.serial_number != question.serial_number:
                    assert one.certificate_status is not ocsp.OCSPCertStatus.GOOD


@thrown
@given(body=st.binary(max_size=300))
async def test_ocsp_requests_that_are_none(gateway, body):
    async with plain(gateway) as http:
        answer = await http.ask(
            "POST", "/ocsp", body, Content_Type="application/ocsp-request"
        )
        assert understood(answer).response_status is MALFORMED


@thrown
@given(
    path=st.one_of(
        st.binary(max_size=200).map(lambda b: base64.b64encode(b).decode()),
        st.binary(max_size=200).map(lambda b: base64.urlsafe_b64encode(b).decode()),
        st.text("%/=+-_aA0.?#&", max_size=100),
    )
)
@example("A" * 7_000)
@example("%")
@example("%00" * 30)
@example("../../hsm/pin")
async def test_ocsp_questions_in_a_path_that_are_none(gateway, path):
    async with plain(gateway) as http:
        answer = await http.ask("GET", f"/ocsp/{path}")
        if answer != NOTHING:
            understood(answer)


async def test_an_ocsp_request_too_large_is_answered(gateway):
    async with plain(gateway) as http:
        answer = await http.ask(
            "POST", "/ocsp", b"\x30" * 60_000, Content_Type="application/ocsp-request"
        )
        assert understood(answer).response_status is MALFORMED
        answer = await http.ask("POST", "/ocsp", b"\x30" * 70_000)
        assert answer.status == 413


# MQTT -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def talker(gateway, field):
    return asyncio.run(field.enrolled("talker")).proof


@thrown
@given(packets=st.lists(st.binary(max_size=60), max_size=5), connected=st.booleans())
@example(packets=[b"\x10\xff\xff\xff\xff\x7f"], connected=False)
@example(packets=[b"\x00\x00"], connected=True)
async def test_octets_that_are_no_mqtt(field, talker, packets, connected):
    async with field.mqtt(talker) as mqtt:
        if connected:
            assert (await mqtt.connect()).code == 0
        with contextlib.suppress(ConnectionError):
            for packet in packets:
                await mqtt.stream.write(packet)
            # Whatever was begun ends in these (no packet may be longer), and then
            # comes a packet type that nobody may use.
            await mqtt.stream.write(bytes(262_400))
            async with asyncio.timeout(5):
                while await mqtt.stream.read():
                    pass
