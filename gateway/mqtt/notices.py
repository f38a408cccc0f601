"""The gateway's own messages: rotation notices to devices, their answers back.

`devices/ID/down/credential` and `devices/ID/up/credential`, both QoS 1, never retained:
a device that is away learns from its session, or from `whoami`.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from datetime import UTC
from typing import TYPE_CHECKING, Literal, cast

import aiomqtt

from provisioning.model.errors import PeerError
from provisioning.model.events import BROKER_LINK_AWAY, BROKER_LINK_BACK, REFUSED
from provisioning.model.ids import DeviceId, Serial
from provisioning.model.refusals import REQUEST_MALFORMED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from gateway.mqtt.broker import BrokerAddress

MAX_ANSWER = 2_048
"""Octets that a device's answer may have."""

_MAX_REASON = 256
_MOST_GENERATION = 999_999_999
_TOPIC = re.compile(r"devices/([^/]+)/up/credential")
_ANSWERS = "devices/+/up/credential"
_KEEP_ALIVE_S = 30
_MOST_INCOMING = 1_000


@dataclass(frozen=True, slots=True)
class RotationAnswer:
    """What a device says about the rotation it was asked for.

    serial or generation: the credential it now uses, or, when it failed, may be None
    both. reason: in its own words, printable, at most 256 characters.
    """

    device: DeviceId
    action: Literal["rotated", "failed"]
    serial: Serial | None
    generation: int | None
    reason: str | None


def credential_notice(by: datetime, campaign: str | None) -> bytes:
    """The payload that asks a device to rotate by then."""
    text = by.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return json.dumps({"action": "rotate", "by": text, "campaign": campaign}).encode()


def read_answer(topic: str, payload: bytes) -> RotationAnswer:
    """Read what came on `devices/ID/up/credential`.

    The relay lets nobody but the device publish there, so the topic says who it is.
    Members that are not known are passed over. Raises PeerError(request_malformed |
    device_id_malformed | serial_malformed).
    """
    match = _TOPIC.fullmatch(topic)
    if match is None or len(payload) > MAX_ANSWER:
        raise PeerError(REQUEST_MALFORMED)
    device = DeviceId.parse(match[1])
    try:
        said = json.loads(payload)
    except (ValueError, RecursionError):
        raise PeerError(REQUEST_MALFORMED) from None
    if not isinstance(said, dict) or said.get("action") not in ("rotated", "failed"):
        raise PeerError(REQUEST_MALFORMED)
    action = cast("Literal['rotated', 'failed']", said["action"])
    serial, generation = said.get("serial"), said.get("generation")
    if serial is not None and not isinstance(serial, str):
        raise PeerError(REQUEST_MALFORMED)
    if generation is not None and not _is_generation(generation):
        raise PeerError(REQUEST_MALFORMED)
    if action == "rotated" and (serial is None) == (generation is None):
        raise PeerError(REQUEST_MALFORMED)
    parsed = None if serial is None else Serial.parse(serial)
    return RotationAnswer(
        device, action, parsed, generation, _printable(said.get("reason"))
    )


def _is_generation(value: object) -> bool:
    # A bool is an int in Python, and no generation.
    return type(value) is int and 1 <= value <= _MOST_GENERATION


def _printable(reason: object) -> str | None:
    if not isinstance(reason, str):
        return None
    return "".join(c if c.isprintable() else " " for c in reason[:_MAX_REASON])


def _no_event(_name: str, _fields: Mapping[str, object]) -> None:
    return None


@dataclass(slots=True)
class Notices:
    """The gateway's own MQTT client; `run` is the task that owns it.

    on_answer: given each answer that makes sense; it must not raise, or the task ends.
    name: the client identifier. It begins with what no device ID can begin with, and
    must differ between gateways that share a broker. waiting: notices kept while the
    broker is away; above that the oldest are dropped, since `whoami` tells, too.
    """

    address: BrokerAddress
    on_answer: Callable[[RotationAnswer], Awaitable[None]]
    on_event: Callable[[str, Mapping[str, object]], None] = _no_event
    name: str = ":gateway"
    waiting: int = 1_000
    backoff_s: float = 0.2
    backoff_most_s: float = 10.0
    _queue: dict[str, bytes] = field(init=False, default_factory=dict)
    _some: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _linked: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _was_away: bool = field(init=False, default=False)

    def ask_rotation(
        self, device: DeviceId, by: datetime, campaign: str | None = None
    ) -> None:
        """Have the device told to rotate; a newer notice replaces a waiting one."""
        topic = f"devices/{device}/down/credential"
        self._queue.pop(topic, None)
        if len(self._queue) >= self.waiting:
            del self._queue[next(iter(self._queue))]
        self._queue[topic] = credential_notice(by, campaign)
        self._some.set()

    async def linked(self) -> None:
        """Wait until it is connected and subscribed."""
        await self._linked.wait()

    async def run(self) -> None:
        """Stay connected, until cancelled."""
        backoff_s = self.backoff_s
        while True:
            try:
                async with self._client() as client:
                    await client.subscribe(_ANSWERS, qos=1)
                    backoff_s = self.backoff_s
                    self._note_link()
                    await self._talk(client)
            except aiomqtt.MqttError as error:
                self._note_loss(error, backoff_s)
            finally:
                self._linked.clear()
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, self.backoff_most_s)

    def _client(self) -> aiomqtt.Client:
        path = self.address.path
        return aiomqtt.Client(
            self.address.host if path is None else path,
            self.address.port,
            transport="tcp" if path is None else "unix",
            identifier=self.name,
            protocol=aiomqtt.ProtocolVersion.V311,
            timeout=10.0,
            keepalive=_KEEP_ALIVE_S,
            max_queued_incoming_messages=_MOST_INCOMING,
        )

    async def _talk(self, client: aiomqtt.Client) -> None:
        # No TaskGroup: that of Python 3.11 forgets a cancellation that comes just when
        # a child fails, as both do when the broker and the gateway end together.
        tasks = [
            asyncio.create_task(self._send(client)),
            asyncio.create_task(self._receive(client)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, client: aiomqtt.Client) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._queue:
                topic, payload = next(iter(self._queue.items()))
                await client.publish(topic, payload, qos=1)
                # aiomqtt waits by asyncio.wait_for, which in Python 3.11 forgets a
                # cancellation that comes together with what it waits for.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError
                # Only now: a notice whose acknowledgement is lost is sent again. It
                # may have been replaced meanwhile.
                if self._queue.get(topic) is payload:
                    del self._queue[topic]

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = message.topic.value
            try:
                answer = read_answer(topic, message.payload)
            except PeerError as error:
                self.on_event(
                    REFUSED,
                    {
                        "code": error.refusal.code,
                        "operation": "rotation answer",
                        "device": topic.split("/")[1] if "/" in topic else None,
                    },
                )
            else:
                await self.on_answer(answer)

    def _note_link(self) -> None:
        # What was left waiting when the link was lost goes out first.
        if self._queue:
            self._some.set()
        self._linked.set()
        if self._was_away:
            self._was_away = False
            self.on_event(BROKER_LINK_BACK, {})

    def _note_loss(self, why: BaseException, retry_after_s: float) -> None:
        if not self._was_away:
            self._was_away = True
            self.on_event(
                BROKER_LINK_AWAY, {"why": str(why), "retry_after_s": retry_after_s}
            )
