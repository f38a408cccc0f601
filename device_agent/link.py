"""Keeps the device connected with whatever credential is the one to live with."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

from device_agent import dial, plan
from device_agent.failures import NotNowError, RefusedError, UntrustedError
from device_agent.mqtt import MqttLink, Notice
from device_agent.schedule import LINK, LINK_REFUSED
from provisioning.model.credentials import CredentialKind
from provisioning.model.errors import Unusable
from provisioning.model.ids import PskIdentity

if TYPE_CHECKING:
    from collections.abc import Callable

    from device_agent.address import Endpoint
    from device_agent.dial import Dialer
    from device_agent.home import Home

LOOK_EVERY: Final = timedelta(minutes=15)
"""Where there is no MQTT, how often the gateway is asked whether it wants something."""

STEADY_S: Final = 60.0
"""A connection that held this long was no failed attempt."""

_NO_LINK = (NotNowError, RefusedError, UntrustedError, Unusable)


class Owner(Protocol):
    """What the link needs of whoever owns the plan."""

    tells: list[plan.Tell]

    @property
    def dialer(self) -> Dialer:
        """How to connect."""
        ...

    @property
    def held(self) -> plan.Held | None:
        """The credential to connect with now."""
        ...

    def put(self, event: plan.Event) -> None:
        """Something happened."""
        ...


class _Moved(Exception):  # noqa: N818 - it is no error
    """There is another credential to connect with."""


class Link:
    """The MQTT connection, made again whenever it ends.

    connected: whether it is up. said: the last thing to say about it.
    """

    def __init__(
        self,
        home: Home,
        owner: Owner,
        roll: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._home = home
        self._owner = owner
        self._dialer = owner.dialer
        self._roll = roll
        self._say = say
        self._changed = asyncio.Event()
        self._obeyed: Notice | None = None
        self.connected = False
        self.said = "not connected yet"

    def on_change(self) -> None:
        """There may be another credential, or something to tell."""
        self._changed.set()

    async def hold(self) -> None:
        """Until cancelled."""
        attempt, pace = 0, LINK
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            held = self._owner.held
            if held is None:
                await self._changed.wait()
                continue
            started = loop.time()
            try:
                await self._once(held)
            except _Moved:
                attempt = 0
                continue
            except _NO_LINK as error:
                self._tell_state(str(error))
                pace = LINK
                if isinstance(error, RefusedError):
                    self._owner.put(plan.Unsure(held.number))
                    pace = LINK_REFUSED
            attempt = 1 if loop.time() - started > STEADY_S else attempt + 1
            await self._pause(held, pace.pause(attempt, self._roll()))

    async def _once(self, held: plan.Held) -> None:
        """One connection, from its first byte to its last. Raises what ended it."""
        known = self._home.belonging()
        broker = known.broker if known is not None else None
        if known is None or broker is None:
            self._owner.put(plan.Unsure(held.number))
            await self._pause(held, LOOK_EVERY + LOOK_EVERY * self._roll())
            raise _Moved
        credential = self._home.slots.credential(held)
        stream = await self._dialer.open(broker, credential, dial.MQTT)
        mqtt = MqttLink(stream, known.device, self._on_notice)
        try:
            await mqtt.open()
            self._dialer.keep_session(broker, credential, stream)
            self.connected = True
            self._tell_state(self._greeting(broker, held, stream.established.resumed))
            await self._live(mqtt, held)
        finally:
            self.connected = False
            await mqtt.close()

    async def _live(self, mqtt: MqttLink, held: plan.Held) -> None:
        # No TaskGroup: until 3.13 it loses a cancellation that comes in the moment in
        # which a child fails, and SIGTERM would find nobody.
        tasks = [
            asyncio.ensure_future(mqtt.serve()),
            asyncio.ensure_future(self._talk(mqtt, held)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        failures = [task.exception() for task in tasks if not task.cancelled()]
        for task in ended:
            task.result()
        for failure in failures:
            if failure is not None:
                raise failure

    async def _talk(self, mqtt: MqttLink, held: plan.Held) -> None:
        """Tell what there is to tell; ask how things stand; leave when we move."""
        await self._tell(mqtt, held)
        self._owner.put(plan.Unsure(held.number))
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self._is_current(held):
                raise _Moved
            await self._tell(mqtt, held)

    async def _tell(self, mqtt: MqttLink, held: plan.Held) -> None:
        while self._owner.tells and self._is_current(held):
            tell = self._owner.tells[0]
            try:
                await mqtt.publish(answer_of(tell))
            except RefusedError as error:
                self._say(f"{tell.action} could not be told: {error}")
            if self._owner.tells and self._owner.tells[0] is tell:
                del self._owner.tells[0]

    def _is_current(self, held: plan.Held) -> bool:
        now = self._owner.held
        return now is not None and now.number == held.number

    def _on_notice(self, notice: Notice) -> None:
        if notice == self._obeyed and notice.by is not None:
            return  # QoS 1: it may come twice
        self._obeyed = notice
        self._say("the gateway asks for a rotation")
        self._owner.put(plan.Asked(self._dialer.clock.now()))

    async def _pause(self, held: plan.Held, pause: timedelta) -> None:
        """Wait, unless there is another credential to try."""
        try:
            async with asyncio.timeout(pause.total_seconds()):
                while self._is_current(held):
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            return

    def _greeting(self, broker: Endpoint, held: plan.Held, resumed: bool) -> str:
        how = "resumed" if resumed else "connected"
        return f"{how} to {broker} with {held.serial or held.identity}"

    def _tell_state(self, text: str) -> None:
        if text != self.said:
            self._say(text)
        self.said = text


def answer_of(tell: plan.Tell) -> dict[str, object]:
    """How a rotation ended, as `devices/ID/up/credential` carries it."""
    generation = None
    if tell.held.kind is CredentialKind.PSK and tell.held.identity is not None:
        generation = PskIdentity.parse(tell.held.identity).generation
    return {
        "action": tell.action,
        "serial": tell.held.serial,
        "generation": generation,
        "reason": tell.reason,
    }
