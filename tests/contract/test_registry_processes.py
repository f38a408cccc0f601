"""Several processes on one registry: each hears of the others, and may be killed."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest
from registry_kit import (
    DAY,
    HOUR,
    NOW,
    OPERATOR,
    PUMP,
    Request,
    admit,
    connect,
    facts_of,
    issue,
    new_database,
    new_token,
    opened,
)

from provisioning.model.credentials import (
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import DEVICE_REVOKED


@pytest.fixture
async def two(tmp_path):
    """A gateway's registry and, on the same file, a command's."""
    url = await new_database(tmp_path)
    async with opened(url) as gateway, opened(url) as command:
        yield gateway, command


async def follow(registry, seq: int) -> int:
    for change in await registry.changes_after(seq):
        registry.apply_change(change)
        seq = change.seq
    return seq


async def test_a_revocation_by_another_process_is_seen_when_its_change_is_applied(two):
    gateway, command = two
    credential = await issue(gateway, Request())
    await connect(gateway, credential, times=3)
    seq = await gateway.latest_seq()
    await command.revoke_device(PUMP, RevocationReason.UNSPECIFIED, NOW, OPERATOR)

    # The twin: without the change, memory would still let it in.
    standing = await gateway.standing_of_certificate(credential.serial)
    assert standing.device_state is DeviceState.ENROLLED
    assert await follow(gateway, seq) == await command.latest_seq()
    standing = await gateway.standing_of_certificate(credential.serial)
    assert standing.device_state is DeviceState.REVOKED
    assert standing.credential.state is CredentialState.REVOKED
    assert (await connect(gateway, credential)).device_state is DeviceState.REVOKED


async def test_a_wish_to_rotate_by_another_process_is_seen_when_applied(two):
    gateway, command = two
    credential = await issue(gateway, Request())
    standing = await connect(gateway, credential, times=3)
    assert standing.rotate_by is None
    await command.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR)
    await follow(gateway, 0)
    assert (await connect(gateway, credential)).rotate_by == NOW + DAY


async def test_a_decision_is_never_made_on_what_another_process_has_changed(two):
    """What a writer keeps in memory between its transactions counts no longer."""
    gateway, command = two
    token = await new_token(gateway, uses=3)
    await issue(gateway, Request(key=1, token=token))
    await issue(command, Request(DeviceId.parse("valve-2"), key=2, token=token))
    facts = await facts_of(gateway, Request(key=3, token=token))
    assert facts.token.used == 2

    intent = await admit(gateway, Request(key=3, token=token))
    await command.revoke_device(PUMP, RevocationReason.UNSPECIFIED, NOW, OPERATOR)
    with pytest.raises(PeerError) as caught:
        await gateway.finish(intent, b"certificate", NOW)
    assert caught.value.refusal is DEVICE_REVOKED


async def test_two_processes_write_at_once_and_nothing_is_lost_or_numbered_twice(two):
    devices = [DeviceId.parse(f"pump-{n}") for n in range(60)]
    credentials = await asyncio.gather(
        *(
            issue(two[number % 2], Request(device, key=device))
            for number, device in enumerate(devices)
        )
    )
    assert len({credential.id for credential in credentials}) == 60
    page = await two[0].list_devices(limit=100)
    assert len(page.devices) == 60
    changes = await two[1].changes_after(0)
    assert [change.seq for change in changes] == list(range(1, 61))
    assert Counter(change.device for change in changes) == Counter(devices)


async def test_a_follower_misses_nothing_while_two_write(two):
    gateway, command = two
    for number in range(10):
        await command.create_psk(DeviceId.parse(f"d-{number}"), NOW, OPERATOR)
    done = asyncio.Event()

    async def write(registry, first):
        for number in range(first, 10, 2):
            device = DeviceId.parse(f"d-{number}")
            for _ in range(5):
                await registry.ask_rotate(device, NOW + HOUR, NOW, OPERATOR)

    async def read():
        seen, seq = [], 0
        while not done.is_set() or seq < await gateway.latest_seq():
            for change in await gateway.changes_after(seq, 7):
                seen.append(change.seq)
                seq = change.seq
        return seen

    reading = asyncio.create_task(read())
    await asyncio.gather(write(gateway, 0), write(command, 1))
    done.set()
    assert await reading == list(range(1, 51))


ENROLLER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from registry_kit import Request, admit, certificate, connect, opened
from provisioning.model.ids import DeviceId

async def line(registry, station, token, start):
    number = start
    while True:
        device = DeviceId.parse(f"s{station}-{number}")
        request = Request(device, key=str(device), token=token)
        intent = await admit(registry, request)
        credential = await registry.finish(intent, certificate(request), request.now)
        print("issued", device, credential.serial.hex, flush=True)
        await connect(registry, credential)
        print("proven", device, credential.serial.hex, flush=True)
        number += 1

async def main():
    async with opened(sys.argv[1]) as registry:
        token = bytes.fromhex(sys.argv[3])
        stations = (line(registry, n, token, int(sys.argv[4])) for n in range(8))
        await asyncio.gather(*stations)

asyncio.run(main())
"""


async def enrol_until_killed(url: str, token: bytes, start: int, lines: int):
    """What a child process said it had on disk before it was killed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        ENROLLER,
        url,
        str(Path(__file__).parent),
        token.hex(),
        str(start),
        stdout=asyncio.subprocess.PIPE,
    )
    said = []
    try:
        while len(said) < lines:
            line = await child.stdout.readline()
            assert line, "the child ended by itself"
            said.append(line)
    finally:
        child.kill()
    said += (await child.stdout.read()).splitlines(keepends=True)
    await child.wait()
    # A line that was cut short was not said.
    return [line.decode().split() for line in said if line.endswith(b"\n")]


async def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path):
    url = await new_database(tmp_path)
    async with opened(url) as registry:
        token = await new_token(registry, uses=100_000)
    said = []
    for start, lines in ((0, 30), (10_000, 75), (20_000, 111)):
        said += await enrol_until_killed(url, token, start, lines)

    async with opened(url) as registry:
        devices = {}
        cursor = ""
        while cursor is not None:
            page = await registry.list_devices(cursor, 500)
            devices |= {view.id.text: view for view in page.devices}
            cursor = page.next
        for what, device, serial in said:
            held = [
                one for one in devices[device].credentials if one.serial.hex == serial
            ]
            assert len(held) == 1
            if what == "proven":
                assert held[0].state is CredentialState.ACTIVE
                assert devices[device].state is DeviceState.ENROLLED

        # What was begun and not finished is found, and costs the token nothing.
        unfinished = await registry.unresolved_intents()
        assert len(unfinished) <= 3 * 8
        for intent in unfinished:
            assert await registry.void(intent.id, "found at start", NOW)
        (row,) = await registry.list_tokens()
        assert row.used == sum(len(view.credentials) for view in devices.values())
        serials = [one.serial for view in devices.values() for one in view.credentials]
        assert len(set(serials)) == len(serials)
        changes = await registry.changes_after(0, 100_000)
        assert [one.seq for one in changes] == list(range(1, len(changes) + 1))
