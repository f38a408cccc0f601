"""Enrolment at a running gateway: one request, one certificate, come what may."""

from __future__ import annotations

import asyncio
import base64

import pytest
from device_client import EST, WHOAMI, Device, issued

from gateway.operators import actions


async def known(gateway, name):
    """What the registry holds of a device, as `devices show` tells it."""
    return await gateway.operate(lambda desk: actions.show_device(desk, name))


async def test_the_ready_line_names_each_listener(gateway):
    ready = gateway.ready
    assert ready["event"] == "ready"
    assert ready["pid"] == gateway.process.pid
    assert {"https", "mqtts", "coaps", "http", "operator"} < set(ready)
    assert ready["coaps"] is None
    assert ready["operator"] is None
    for listener in ("https", "mqtts", "http"):
        _, writer = await asyncio.open_connection("127.0.0.1", ready[listener])
        writer.close()
        await writer.wait_closed()


async def test_a_factory_certificate_admits_to_an_operational_one(field):
    board = await field.enrolled("board-1", profile="idevid")
    assert board.certificate.not_valid_after_utc.year == 9999
    pump = Device("board-1")
    async with field.https(board.proof) as http:
        pump.certificate = issued(await http.enroll(pump.csr))
    assert pump.certificate.issuer != board.certificate.issuer
    for device in (board, pump):
        told = (await field.whoami(device.proof)).document
        assert (told["device"], told["serial"]) == ("board-1", device.serial)


async def test_a_psk_admits_to_a_certificate(field):
    psk = await field.psk_of((await field.enrolled("by-psk")).proof)
    pump = Device("by-psk")
    async with field.https(psk) as http:
        pump.certificate = issued(await http.enroll(pump.csr))
    told = (await field.whoami(pump.proof)).document
    assert (told["auth"], told["serial"]) == ("certificate", pump.serial)


async def test_a_psk_has_nothing_to_reenrol(field):
    """RFC 7030, 4.2.2: what is renewed is the connection's certificate."""
    psk = await field.psk_of((await field.enrolled("psk-again")).proof)
    async with field.https(psk) as http:
        answer = await http.enroll(Device("psk-again").csr, operation="simplereenroll")
    assert (answer.status, answer.code) == (403, "profile_not_allowed")


async def test_reenrolment_asked_again_gives_the_same_until_it_is_proven(field):
    old = await field.enrolled("asks-again")
    new = Device("asks-again")
    csr = new.csr
    async with field.https(old.proof) as http:
        first = issued(await http.enroll(csr, operation="simplereenroll"))
        second = issued(await http.enroll(csr, operation="simplereenroll"))
        assert first == second
        new.certificate = first
        assert (await field.whoami(new.proof)).status == 200
        third = issued(await http.enroll(csr, operation="simplereenroll"))
        assert third != first


async def test_a_token_repeats_its_answer_until_it_is_proven_and_then_refuses(
    field, gateway
):
    pump = Device("token-repeats")
    csr = pump.csr
    token = await gateway.token("token-repeats")
    async with field.https() as http:
        answers = [
            await http.enroll(csr, basic=("token-repeats", token)) for _ in range(3)
        ]
        assert len({issued(answer) for answer in answers}) == 1
        pump.certificate = issued(answers[0])
        assert (await field.whoami(pump.proof)).status == 200
        refused = await http.enroll(csr, basic=("token-repeats", token))
    assert (refused.status, refused.code) == (401, "token_refused")
    assert "Basic" in refused.headers["www-authenticate"]


async def test_identical_requests_at_once_are_one(field, gateway):
    pump = Device("all-at-once")
    csr, token = pump.csr, await gateway.token("all-at-once")

    async def ask():
        async with field.https() as http:
            return issued(await http.enroll(csr, basic=("all-at-once", token)))

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask()) for _ in range(12)]
    (certificate,) = {task.result() for task in asked}
    held = (await known(gateway, "all-at-once"))["credentials"]
    assert [one["serial"] for one in held] == [f"{certificate.serial_number:x}"]


async def test_a_lost_answer_is_found_when_the_device_asks_again(field, gateway):
    """The device goes away at once; the work goes on and is there for its retry."""
    pump = Device("hangs-up")
    csr, token = pump.csr, await gateway.token("hangs-up")
    body = base64.b64encode(csr)
    pair = base64.b64encode(f"hangs-up:{token}".encode()).decode()
    stream = await field.dial()
    await stream.write(
        f"POST {EST}/simpleenroll HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/pkcs10\r\nAuthorization: Basic {pair}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await stream.close()
    async with field.https() as http:
        pump.certificate = issued(await http.enroll(csr, basic=("hangs-up", token)))
    held = (await known(gateway, "hangs-up"))["credentials"]
    assert [one["serial"] for one in held] == [pump.serial]


async def test_two_requests_with_a_one_use_token_give_one_device_one_certificate(
    field, gateway
):
    """Two keys, one token: whichever comes first has it, the other is told so."""
    token = await gateway.token("one-use")

    async def ask():
        async with field.https() as http:
            return await http.enroll(Device("one-use").csr, basic=("one-use", token))

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask()) for _ in range(6)]
    statuses = sorted(task.result().status for task in asked)
    assert statuses == [200, 401, 401, 401, 401, 401]


async def test_a_key_of_another_device_is_refused(field, gateway):
    one = await field.enrolled("key-owner")
    two = Device("key-thief", one.key)
    token = await gateway.token("key-thief")
    async with field.https() as http:
        answer = await http.enroll(two.csr, basic=("key-thief", token))
        assert (answer.status, answer.code) == (403, "key_in_use")
        # The refusal has not used the token up.
        honest = Device("key-thief")
        issued(await http.enroll(honest.csr, basic=("key-thief", token)))


@pytest.mark.parametrize(
    ("label", "operation", "status", "code"),
    [
        ("", "simpleenrol", 404, "operation_unknown"),
        ("nobody/", "simpleenroll", 404, "profile_unknown"),
        ("ldevid/x/", "simpleenroll", 404, "operation_unknown"),
        ("", "fullcmc", 501, "operation_not_built"),
        ("", "serverkeygen", 501, "operation_not_built"),
        ("", "cacerts", 405, "method_not_allowed"),
    ],
)
async def test_what_est_does_not_have_is_told_apart(
    field, label, operation, status, code
):
    async with field.https() as http:
        answer = await http.ask("POST", f"{EST}/{label}{operation}", b"")
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize("label", ["", "/idevid", "/ldevid"])
async def test_cacerts_and_csrattrs_need_no_credential(field, label):
    async with field.https() as http:
        for operation in ("cacerts", "csrattrs"):
            answer = await http.ask("GET", f"{EST}{label}/{operation}")
            assert answer.status == 200
            assert b"\n" not in answer.body.strip()  # FACTS: strongSwan
            base64.b64decode(answer.body, validate=True)


async def test_who_asks_for_nothing_is_told_in_a_sentence(field):
    """STANDARDS: text for those that ask for nothing, problem details for the rest."""
    async with field.https() as http:
        plain = await http.say(
            f"POST {EST}/simpleenroll HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Length: 0\r\n\r\n".encode()
        )
        assert plain.headers["content-type"].startswith("text/plain")
        assert plain.body.decode().endswith("\n")
        told = await http.ask("POST", f"{EST}/simpleenroll", b"")
        assert told.headers["content-type"] == "application/problem+json"
        assert told.document["detail"].encode() == plain.body.strip()
        assert told.document["retryable"] is False
        assert told.document["status"] == 401


async def test_whoami_without_a_credential_says_nobody(field):
    told = (await field.whoami()).document
    assert (told["device"], told["auth"], told["serial"]) == (None, None, None)
    async with field.https() as http:
        refused = await http.ask("GET", "/device/v1/config")
        assert (refused.status, refused.code) == (401, "credential_missing")
        refused = await http.ask("POST", "/device/v1/psk", b"")
        assert (refused.status, refused.code) == (401, "credential_missing")
        refused = await http.ask("DELETE", WHOAMI)
        assert (refused.status, refused.code) == (405, "method_not_allowed")


async def test_psk_generations_go_up_only_when_proven(field):
    proof = (await field.enrolled("generations")).proof
    first = await field.psk_of(proof)
    assert first == await field.psk_of(proof)
    assert first.identity == "generations#1"
    told = (await field.whoami(first)).document
    assert (told["auth"], told["generation"]) == ("psk", 1)
    second = await field.psk_of(first)
    assert second.identity == "generations#2"
    assert second.key != first.key
