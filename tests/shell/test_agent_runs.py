"""The running agent: connected, renewing in time, obeying, and never in two minds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from stub_gateway import serving

from device_agent import control, enrol
from device_agent.carry import FirstProof
from device_agent.failures import DONE
from device_agent.home import Belonging, Home
from device_agent.run import run
from device_agent.status import document
from provisioning.model import refusals
from provisioning.model.errors import Unusable
from provisioning.model.ids import DeviceId
from provisioning.tls.context import ClientPsk

SESAME = "open-sesame"


def roll():
    return 0.01


@pytest.fixture
async def stub():
    async with serving() as made:
        yield made


async def enrolled(stub, folder, device="pump-7"):
    stub.tokens[SESAME] = device
    to = Belonging(stub.url, DeviceId.parse(device), "cert")
    wish = enrol.Wish(to, FirstProof(token=SESAME), stub.authority.pem, None)
    home = Home(folder)
    await enrol.enrol(home, wish, roll)
    stub.seen.clear()
    return home


@asynccontextmanager
async def running(home):
    """The agent in this loop, ended as SIGTERM ends it."""
    task = asyncio.create_task(run(home, roll))
    try:
        yield task
    finally:
        if not task.done():
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)
        assert await task == DONE


def live(stub):
    return [link for link in stub.links if link.alive and link.subscribed]


async def connected(stub):
    await stub.until(lambda: live(stub) and "config" in stub.seen)


async def test_it_connects_as_itself_and_keeps_its_mqtt_session(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home):
        await connected(stub)
        assert live(stub)[0].client_id == "pump-7:agent"
        assert "mqtt pump-7:agent clean=False" in stub.seen
        told = await control.ask(home.control_path, "status", 5)
        assert told is not None
        assert told.connected
    assert not home.control_path.exists()


async def test_a_notice_is_obeyed_and_the_gateway_told(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    before = document(home)["serial"]
    async with running(home):
        await connected(stub)
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        await stub.until(lambda: stub.notes)
        told = stub.notes[0]
        assert told["topic"] == "devices/pump-7/up/credential"
        assert told["action"] == "rotated"
        assert told["serial"] == document(home)["serial"] != before
        assert stub.records[before].gone is refusals.CREDENTIAL_SUPERSEDED


async def test_the_same_notice_twice_is_one_rotation(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home):
        await connected(stub)
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        await stub.until(lambda: stub.notes)
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        live(stub)[0].cut()
        await stub.until(lambda: len(stub.links) == 3 and live(stub))
        assert stub.seen.count("simplereenroll") == 1


async def test_a_wish_that_was_missed_is_seen_at_the_next_connection(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    stub.wishes.add("pump-7")
    async with running(home):
        await stub.until(lambda: stub.notes)
        assert stub.notes[0]["action"] == "rotated"
    assert stub.seen.count("simplereenroll") == 1


async def test_a_failed_rotation_is_told_and_the_old_one_stays(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    before = document(home)["serial"]
    stub.refuse["simplereenroll"] = refusals.KEY_NOT_ALLOWED
    async with running(home):
        await connected(stub)
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        await stub.until(lambda: stub.notes)
        told = stub.notes[0]
        assert (told["action"], told["reason"]) == ("failed", "key_not_allowed")
        assert told["serial"] == document(home)["serial"] == before
        assert live(stub), "and it is still connected"


async def test_it_renews_by_itself_when_it_is_time(stub, tmp_path):
    stub.lifetime = timedelta(seconds=-200)  # began 300 s ago, two thirds are over
    home = await enrolled(stub, tmp_path / "s")
    stub.lifetime = timedelta(days=30)
    async with running(home):
        await stub.until(lambda: stub.notes)
        assert stub.notes[0]["action"] == "rotated"


async def test_a_psk_device_runs_and_rotates(stub, tmp_path):
    identity, key = stub.make_psk("pump-8")
    to = Belonging(stub.url, DeviceId.parse("pump-8"), "psk")
    proof = FirstProof(credential=ClientPsk(identity, key))
    home = Home(tmp_path / "s")
    await enrol.enrol(home, enrol.Wish(to, proof, stub.authority.pem, None), roll)
    stub.seen.clear()
    async with running(home):
        await connected(stub)
        live(stub)[0].notify("2030-01-01T00:00:00Z")
        await stub.until(lambda: stub.notes)
        told = stub.notes[0]
        assert (told["serial"], told["generation"]) == (None, 2)


async def test_rotate_asks_the_one_that_runs_and_waits(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    before = document(home)["serial"]
    async with running(home):
        await connected(stub)
        assert not Home(home.folder).lock.take()
        reply = await control.ask(home.control_path, "rotate", 15)
        assert reply is not None
        assert reply.exit_code == DONE
        assert document(home)["serial"] != before


async def test_rotate_by_control_says_how_it_failed(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    stub.refuse["simplereenroll"] = refusals.DEVICE_REVOKED
    async with running(home):
        await connected(stub)
        reply = await control.ask(home.control_path, "rotate", 15)
        assert reply is not None
        assert (reply.exit_code, reply.text) == (3, refusals.DEVICE_REVOKED.sentence)


async def test_a_long_state_path_has_a_control_socket_too(stub, tmp_path):
    folder = tmp_path.joinpath(*["a-folder-with-a-rather-long-name"] * 4)
    home = await enrolled(stub, folder)
    async with running(home):
        await connected(stub)
        told = await control.ask(home.control_path, "status", 5)
        assert told is not None


async def test_a_restart_resumes_its_tls_session(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home):
        await connected(stub)
    stub.seen.clear()
    stub.resumed.clear()
    async with running(Home(home.folder)):
        await stub.until(lambda: live(stub) and "config" in stub.seen)
    assert stub.resumed == [True, True]


async def test_a_session_is_never_offered_beside_another_credential(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    sessions = home.sessions()
    content = json.loads((home.folder / "session").read_bytes())
    content["credential"] = "0" * 64
    (home.folder / "session").write_bytes(json.dumps(content).encode())
    assert sessions is not home.sessions()
    stub.resumed.clear()
    async with running(home):
        await connected(stub)
    assert stub.resumed[0] is False


async def test_a_lost_connection_is_made_again(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home):
        await connected(stub)
        first = live(stub)[0]
        first.cut()
        await stub.until(lambda: live(stub) and live(stub)[0] is not first)


async def test_an_unproven_new_one_is_tried_at_start(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    before = document(home)["serial"]
    (home.folder / "active").write_bytes(b"a\n")
    await enrol.rotate(home, roll)
    (home.folder / "active").write_bytes(b"a\n")  # the power went before `active` did
    assert document(home)["state"] == "proving"
    async with running(home):
        await connected(stub)
        assert document(home)["serial"] != before
        assert document(home)["state"] == "enrolled"


async def test_a_superseded_active_one_gives_way_to_the_other_slot(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    first = document(home)["serial"]
    await enrol.rotate(home, roll)
    second = document(home)["serial"]
    # As after a restored backup of the registry: the older one is the good one.
    stub.records[second].gone = refusals.CREDENTIAL_SUPERSEDED
    stub.records[first].gone = None
    stub.seen.clear()
    async with running(home):
        await stub.until(lambda: live(stub) and "config" in stub.seen)
        await stub.until(lambda: document(home)["serial"] == first)


async def test_sigterm_at_the_moment_when_the_connection_breaks_is_not_lost(
    stub, tmp_path
):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home) as task:
        await connected(stub)
        live(stub)[0].cut()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(task, 5) == DONE


async def test_two_never_run_in_one_folder(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    async with running(home):
        await connected(stub)
        with pytest.raises(Unusable, match="another birthmark-agent"):
            await run(Home(home.folder), roll)


async def test_sigterm_ends_a_real_process_with_0(stub, tmp_path):
    home = await enrolled(stub, tmp_path / "s")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "device_agent.cli"),
        *("--state", str(home.folder), "run"),
        stderr=asyncio.subprocess.PIPE,
    )
    await connected(stub)
    process.send_signal(signal.SIGTERM)
    _, said = await process.communicate()
    assert process.returncode == 0, said
    assert b"Traceback" not in said
