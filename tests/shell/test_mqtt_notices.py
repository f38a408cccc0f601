"""Rotation notices reach devices, and their answers reach us, over a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiomqtt
import pytest

from gateway.mqtt.broker import Mosquitto
from gateway.mqtt.notices import Notices, RotationAnswer
from provisioning.model.ids import DeviceId, Serial

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PUMP = DeviceId.parse("pump-7")
BY = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


class Told:
    """What notices told their gateway."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[RotationAnswer] = asyncio.Queue()
        self.events: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    def event(self, name: str, fields: Any) -> None:
        self.events.put_nowait((name, dict(fields)))


@pytest.fixture
async def mosquitto(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    task = asyncio.create_task(broker.run())
    await broker.ready()
    yield broker
    task.cancel()
    await asyncio.wait([task])


@asynccontextmanager
async def running(broker: Mosquitto, told: Told) -> AsyncIterator[Notices]:
    notices = Notices(broker.address, told.answers.put, told.event)
    task = asyncio.create_task(notices.run())
    try:
        yield notices
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def device(broker: Mosquitto, name: str = "pump-7") -> aiomqtt.Client:
    assert broker.address.path is not None
    return aiomqtt.Client(broker.address.path, transport="unix", identifier=name)


async def test_a_notice_goes_out_and_an_answer_comes_back(
    mosquitto: Mosquitto,
) -> None:
    told = Told()
    async with running(mosquitto, told) as notices, device(mosquitto) as client:
        await notices.linked()
        await client.subscribe("devices/pump-7/down/#", qos=1)
        notices.ask_rotation(PUMP, BY, "spring")
        message = await anext(client.messages)
        assert message.topic.value == "devices/pump-7/down/credential"
        assert (message.qos, message.retain) == (1, False)
        assert json.loads(message.payload) == {
            "action": "rotate",
            "by": "2030-01-02T03:04:05Z",
            "campaign": "spring",
        }
        await client.publish(
            "devices/pump-7/up/credential", b'{"action":"rotated","serial":"0a"}', 1
        )
        assert await told.answers.get() == RotationAnswer(
            PUMP, "rotated", Serial(10), None, None
        )


async def test_an_answer_that_makes_no_sense_is_noted_and_the_next_is_read(
    mosquitto: Mosquitto,
) -> None:
    told = Told()
    async with running(mosquitto, told) as notices, device(mosquitto) as client:
        await notices.linked()
        topic = "devices/pump-7/up/credential"
        await client.publish(topic, b"\xff" * 5_000, 1)
        await client.publish(topic, b'{"action":"failed","reason":"disk full"}', 1)
        answer = await told.answers.get()
        assert (answer.action, answer.reason) == ("failed", "disk full")
        name, fields = await told.events.get()
        assert (name, fields["code"], fields["device"]) == (
            "refused",
            "request_malformed",
            "pump-7",
        )


async def test_a_notice_waits_for_a_broker_that_is_away(mosquitto: Mosquitto) -> None:
    told = Told()
    async with running(mosquitto, told) as notices:
        await notices.linked()
        assert mosquitto.pid is not None
        os.kill(mosquitto.pid, signal.SIGSTOP)
        notices.ask_rotation(PUMP, BY, "old")
        notices.ask_rotation(PUMP, BY, "new")
        os.kill(mosquitto.pid, signal.SIGKILL)
        assert (await told.events.get())[0] == "broker_link_away"
        await mosquitto.ready()
        assert (await told.events.get())[0] == "broker_link_back"
        notices.ask_rotation(PUMP, BY, "newest")
        async with device(mosquitto) as client:
            await client.subscribe("devices/pump-7/down/#", qos=1)
            notices.ask_rotation(PUMP, BY, "last")
            seen = ""
            while seen != "last":
                message = await anext(client.messages)
                seen = json.loads(message.payload)["campaign"]


async def test_a_device_that_is_away_finds_the_notice_in_its_session(
    mosquitto: Mosquitto,
) -> None:
    assert mosquitto.address.path is not None

    def kept() -> aiomqtt.Client:
        return aiomqtt.Client(
            mosquitto.address.path or "",
            transport="unix",
            identifier="pump-7",
            clean_session=False,
        )

    told = Told()
    async with running(mosquitto, told) as notices:
        await notices.linked()
        async with kept() as client:
            await client.subscribe("devices/pump-7/down/#", qos=1)
        async with device(mosquitto, "pump-7:app") as other:
            await other.subscribe("devices/pump-7/down/#", qos=1)
            notices.ask_rotation(PUMP, BY)
            await anext(other.messages)
        async with kept() as client:
            message = await anext(client.messages)
            assert json.loads(message.payload)["action"] == "rotate"


async def test_only_the_newest_notices_are_kept_for_a_broker_that_is_away(
    mosquitto: Mosquitto,
) -> None:
    notices = Notices(mosquitto.address, Told().answers.put, waiting=3)
    for number in (9, *range(10)):
        notices.ask_rotation(DeviceId.parse(f"d{number}"), BY)
    async with device(mosquitto) as client:
        await client.subscribe("devices/+/down/credential", qos=1)
        task = asyncio.create_task(notices.run())
        topics = [(await anext(client.messages)).topic.value for _ in range(3)]
        task.cancel()
        await asyncio.wait([task])
    assert topics == [f"devices/d{number}/down/credential" for number in (7, 8, 9)]
