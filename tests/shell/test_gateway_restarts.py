"""A gateway that is killed, stopped, started again, or started twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from device_client import EST, NOTHING, Device, Field, issued
from gateway_process import GatewayProcess, missing

from gateway.operators import actions
from provisioning.tls.aio import HandshakeError
from provisioning.wire.mqtt import Kind

FLEET = 24
GOODBYE_S = 10.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data directory for these tests, initialised once."""
    if lacking := missing():
        pytest.skip(lacking)
    gateway = GatewayProcess(tmp_path_factory.mktemp("restarts"))
    gateway.initialise()
    yield gateway
    if gateway.alive:
        gateway.stop(signal.SIGKILL)


@pytest.fixture
def mortal(made):
    """The gateway of that directory, running when the test begins."""
    if not made.alive:
        made.start()
    return made


async def enrol(field, device, csr, token):
    """The certificate, or None where the gateway was gone first."""
    try:
        async with field.https() as http:
            answer = await http.enroll(csr, basic=(device.name, token))
    except (OSError, TimeoutError, HandshakeError):
        return None
    return None if answer == NOTHING else issued(answer)


@pytest.mark.parametrize("answered", [0, 5])
async def test_a_kill_loses_no_certificate_and_makes_none_twice(mortal, answered):
    """Killed when that many of the fleet have their answer, the rest under way."""
    field = Field(mortal)
    fleet = [Device(f"killed-{answered}-{n}") for n in range(FLEET)]
    asked = [(one, one.csr, await mortal.token(one.name)) for one in fleet]
    enough = asyncio.Event()
    got = 0

    async def first(device, csr, token):
        nonlocal got
        certificate = await enrol(field, device, csr, token)
        got += certificate is not None
        if got >= answered:
            enough.set()
        return certificate

    async with asyncio.TaskGroup() as tasks:
        under_way = [tasks.create_task(first(*one)) for one in asked]
        if answered:
            await enough.wait()
        else:
            await asyncio.wait(under_way, timeout=0.05)
        mortal.stop(signal.SIGKILL)
    before = [task.result() for task in under_way]
    await asyncio.to_thread(mortal.start)
    after = [await enrol(field, *one) for one in asked]
    assert None not in after
    for device, was, now in zip(fleet, before, after, strict=True):
        assert was in (None, now), device.name
        shown = await mortal.operate(
            lambda desk, name=device.name: actions.show_device(desk, name)
        )
        serials = [one["serial"] for one in shown["credentials"]]
        assert serials == [f"{now.serial_number:x}"]
        device.certificate = now
    assert len({one.serial_number for one in after}) == FLEET
    for device in fleet[:: FLEET // 4]:
        assert (await field.whoami(device.proof)).document["serial"] == device.serial


async def test_a_proven_certificate_is_known_after_a_kill(mortal):
    field = Field(mortal)
    pump = await field.enrolled("killed-proven")
    assert (await field.whoami(pump.proof)).status == 200
    mortal.stop(signal.SIGKILL)
    await asyncio.to_thread(mortal.start)
    shown = await mortal.operate(
        lambda desk: actions.show_device(desk, "killed-proven")
    )
    assert shown["state"] == "enrolled"
    assert [one["state"] for one in shown["credentials"]] == ["active"]
    assert (await field.whoami(pump.proof)).document["serial"] == pump.serial
    async with field.mqtt(pump.proof) as mqtt:
        assert (await mqtt.connect()).code == 0


async def revoke(gateway, name):
    """As `devices revoke`."""
    return await gateway.operate(
        lambda desk: actions.revoke_device(
            desk, name, serial=None, reason="unspecified"
        )
    )


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name
)
async def test_a_gateway_that_is_gone_is_not_waited_for(mortal, how):
    """Its successor holds the lock of the data directory: the other one is no more."""
    await Field(mortal).enrolled(f"gone-{how}")
    mortal.stop(how)
    await asyncio.to_thread(mortal.start)
    assert (await revoke(mortal, f"gone-{how}"))["not_applied"] == []


async def test_what_was_revoked_while_the_gateway_was_down_is_out(mortal):
    field = Field(mortal)
    pump = await field.enrolled("revoked-meanwhile")
    async with field.https(pump.proof) as http:
        assert (await http.whoami()).status == 200
    mortal.stop()
    await revoke(mortal, "revoked-meanwhile")
    await asyncio.to_thread(mortal.start)
    refused = await field.whoami(pump.proof)
    assert (refused.status, refused.code) == (403, "device_revoked")


async def test_a_ticket_of_an_earlier_life_costs_a_full_handshake_only(mortal):
    field = Field(mortal)
    pump = await field.enrolled("old-ticket")
    async with field.https(pump.proof) as http:
        assert (await http.whoami()).status == 200
        session = http.stream.session()
    mortal.stop()
    await asyncio.to_thread(mortal.start)
    async with field.https(pump.proof, session=session) as http:
        told = (await http.whoami()).document
    assert (told["device"], told["resumed"]) == ("old-ticket", False)


async def test_sigterm_ends_it_whoever_is_connected(mortal):
    """Idle, half open, in the middle of a body, MQTT: 0 within ten seconds."""
    field = Field(mortal)
    pump = await field.enrolled("says-goodbye")
    port = mortal.ready["https"]
    async with (
        field.https(pump.proof) as idle,
        field.mqtt(pump.proof) as mqtt,
        field.https() as halfway,
    ):
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        assert (await idle.whoami()).status == 200
        assert (await mqtt.connect()).code == 0
        await halfway.stream.write(
            f"POST {EST}/simpleenroll HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/pkcs10\r\n"
            "Content-Length: 1000\r\n\r\nMIIB".encode()
        )
        start = time.monotonic()
        code = await asyncio.to_thread(mortal.stop)
        assert code == 0
        assert time.monotonic() - start < GOODBYE_S
        # MQTT 5 says goodbye in words: server shutting down.
        packet = await mqtt.hear()
        assert packet is not None
        assert (packet[0] >> 4, packet[2]) == (Kind.DISCONNECT, 0x8B)
        await idle.ended()
        silent.close()
    assert mortal.said("stopped")
    assert mortal.said("incident") == []


async def test_sigterm_in_the_middle_of_enrolments_loses_none(mortal):
    field = Field(mortal)
    asked = []
    for n in range(8):
        device = Device(f"stopped-{n}")
        asked.append((device, device.csr, await mortal.token(device.name)))
    async with asyncio.TaskGroup() as tasks:
        under_way = [tasks.create_task(enrol(field, *one)) for one in asked]
        await asyncio.wait(under_way, timeout=0.03)
        code = await asyncio.to_thread(mortal.stop)
    assert code == 0
    before = [task.result() for task in under_way]
    await asyncio.to_thread(mortal.start)
    after = [await enrol(field, *one) for one in asked]
    assert None not in after
    assert all(was in (None, now) for was, now in zip(before, after, strict=True))


def test_a_second_gateway_on_the_same_data_is_refused_and_harms_nothing(mortal):
    done = mortal.run("gateway", "--json")
    assert done.returncode == 1
    assert "another gateway" in done.stderr
    assert "Traceback" not in done.stderr
    assert '"code": "unusable"' in done.stdout
    assert mortal.alive
    assert asyncio.run(Field(mortal).whoami()).status == 200


def test_its_broker_does_not_outlive_it(mortal):
    """Also when it is killed: the next start would find the socket taken."""
    pid = mortal.said("broker_started")[-1]["pid"]
    assert os.path.exists(f"/proc/{pid}")  # noqa: PTH110 - the kernel's files
    mortal.stop(signal.SIGKILL)
    mortal.start()
    assert mortal.said("broker_started")[-1]["pid"] != pid
    field = Field(mortal)

    async def connects():
        pump = await field.enrolled("after-the-broker")
        async with field.mqtt(pump.proof) as mqtt:
            return (await mqtt.connect()).code

    assert asyncio.run(connects()) == 0
