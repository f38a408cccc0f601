"""Our own mosquitto: reachable by us alone, kept running, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import gateway
from gateway.mqtt.broker import (
    BrokerAddress,
    Mosquitto,
    MosquittoLimits,
    configuration,
    find_mosquitto,
)
from provisioning.model.errors import Unavailable, Unusable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Events = list[tuple[str, dict[str, Any]]]

GATEWAY_TO_BE_KILLED = """
import asyncio, sys
from pathlib import Path
from gateway.mqtt.broker import Mosquitto

async def main():
    broker = Mosquitto(Path(sys.argv[1]))
    task = asyncio.create_task(broker.run())
    await broker.ready()
    print(broker.pid, flush=True)
    await task

asyncio.run(main())
"""


@asynccontextmanager
async def running(broker: Mosquitto) -> AsyncIterator[Mosquitto]:
    task = asyncio.create_task(broker.run())
    try:
        yield broker
    finally:
        task.cancel()
        await asyncio.wait([task])


async def ended(pid: int) -> None:
    """Wait until a process, which need not be our child, has ended."""
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    seen = asyncio.Event()
    loop.add_reader(descriptor, seen.set)
    try:
        await seen.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def tcp_sockets_of(pid: int) -> set[str]:
    """The inodes of a process's TCP sockets."""
    targets = (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {t[8:-1] for t in targets if t.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return sockets & {
        row.split()[9] for table in tables for row in table.splitlines()[1:]
    }


def loose_folder(path: Path) -> Path:
    folder = path / "run"
    folder.mkdir()
    folder.chmod(0o750)  # whatever the umask
    return folder


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def there(path: str | Path) -> bool:
    return Path(path).exists()


async def test_it_listens_where_only_its_user_may_go(tmp_path: Path) -> None:
    folder = loose_folder(tmp_path)
    assert mode_of(folder) != 0o700
    async with running(Mosquitto(folder)) as broker:
        await broker.ready()
        assert mode_of(folder) == 0o700
        assert broker.address.path == str(folder / "mosquitto.sock")
        assert broker.pid is not None
        assert tcp_sockets_of(broker.pid) == set()


async def test_it_is_started_again_when_it_ends(tmp_path: Path) -> None:
    events: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    async def next_event() -> tuple[str, dict[str, Any]]:
        while (event := await events.get())[0] == "broker_said":
            pass
        return event

    broker = Mosquitto(
        tmp_path, lambda name, said: events.put_nowait((name, dict(said)))
    )
    async with running(broker):
        name, said = await next_event()
        assert name == "broker_started"
        os.kill(said["pid"], signal.SIGKILL)
        assert await next_event() == (
            "broker_ended",
            {"code": -signal.SIGKILL, "retry_after_s": 0.1},
        )
        name, again = await next_event()
        assert name == "broker_started"
        assert again["pid"] == broker.pid != said["pid"]


async def test_it_ends_with_us_and_leaves_no_socket(tmp_path: Path) -> None:
    async with running(Mosquitto(tmp_path)) as broker:
        await broker.ready()
        pid = broker.pid
        assert pid is not None
    assert not there(f"/proc/{pid}")
    assert not there(tmp_path / "mosquitto.sock")


async def test_a_killed_gateway_leaves_no_broker_and_the_next_one_starts(
    tmp_path: Path,
) -> None:
    root = Path(gateway.__file__).parents[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        GATEWAY_TO_BE_KILLED,
        str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    waiting = asyncio.create_task(ended(pid))
    await asyncio.sleep(0)  # it has opened its descriptor
    process.kill()
    await process.wait()
    await waiting
    assert there(tmp_path / "mosquitto.sock"), "a killed broker leaves its socket"
    async with running(Mosquitto(tmp_path)) as broker:
        await broker.ready()


async def test_a_folder_too_deep_for_a_socket_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    async with running(Mosquitto(deep)) as broker:
        await broker.ready()
        assert broker.address.path is not None
        short = Path(broker.address.path).parent
        assert mode_of(short) == 0o700
    assert not there(short)


async def test_one_that_does_not_start_is_away_and_tried_less_and_less_often(
    tmp_path: Path,
) -> None:
    events: Events = []
    broker = Mosquitto(
        tmp_path,
        lambda name, said: events.append((name, dict(said))),
        program="false",
        backoff_s=0.01,
        backoff_most_s=0.04,
    )
    async with running(broker):
        with pytest.raises(Unavailable):
            await broker.ready(timeout_s=0.5)
    waits = [said["retry_after_s"] for name, said in events if name == "broker_ended"]
    assert waits[:4] == [0.01, 0.02, 0.04, 0.04]


async def test_one_that_hangs_at_its_start_is_killed_and_tried_again(
    tmp_path: Path,
) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o700)
    events: asyncio.Queue[str] = asyncio.Queue()
    broker = Mosquitto(
        tmp_path,
        lambda name, _: events.put_nowait(name),
        program=str(hanging),
        start_s=0.1,
        backoff_s=0.01,
    )
    async with running(broker):
        assert [await events.get() for _ in range(2)] == ["broker_ended"] * 2


def test_a_machine_without_mosquitto_is_told_what_to_install() -> None:
    with pytest.raises(Unusable) as unusable:
        find_mosquitto("mosquitto-that-is-nowhere")
    assert "apt install mosquitto" in unusable.value.why


def test_root_stays_root_and_nothing_is_written_to_disk() -> None:
    text = configuration("/run/x", True, MosquittoLimits())
    assert "\nuser root\n" in text
    assert "persistence false" in text
    assert "user" not in configuration("/run/x", False, MosquittoLimits())


async def test_a_full_backlog_is_waited_for_not_taken_for_a_connection(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "busy")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    first = socket.socket(socket.AF_UNIX)
    first.connect(path)  # what a backlog of 0 takes
    waiting = asyncio.create_task(BrokerAddress(path=path).connect(asyncio.Protocol))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    accepted = [listener.accept()[0]]
    transport, _ = await waiting
    accepted.append(listener.accept()[0])
    transport.write(b"x")
    assert accepted[1].recv(1) == b"x"
    transport.abort()
    for sock in (*accepted, first, listener):
        sock.close()
