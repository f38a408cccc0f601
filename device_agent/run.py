"""The running agent: connected by MQTT, renewing in time, obeying rotation."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from device_agent import control, enrol, plan
from device_agent.failures import DONE, WRONG_USAGE, exit_code
from device_agent.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable

    from device_agent.dial import Dialer
    from device_agent.home import Home

LONGEST_SLEEP: Final = timedelta(minutes=10)
"""The wall clock may jump while the loop's clock sleeps: look at it this often."""


@dataclass(frozen=True, slots=True)
class Item:
    """An event for the plan, and who waits for what comes of it."""

    event: plan.Event
    outcome: asyncio.Future[control.Reply] | None = None


class Life:
    """Owns the plan's state; one event after the other. Others only `put`."""

    def __init__(self, home: Home, roll: Callable[[], float]) -> None:
        self._home = home
        self._carrier, self._clock = enrol.compose(home, roll, self._on_tell)
        self._inbox: asyncio.Queue[Item] = asyncio.Queue()
        now = self._clock.now()
        found = home.slots.find()
        self._state, self._commands = plan.resume(found, self._carrier.rule, now)
        if isinstance(self._state, plan.Fresh | plan.Enrolling):
            raise enrol.not_enrolled(home)
        self._on_change: Callable[[], None] = lambda: None
        self.tells: list[plan.Tell] = []  # owned by the link once they are in

    @property
    def dialer(self) -> Dialer:
        """How to connect: with the same sessions and the same clock."""
        return self._carrier.dialer

    @property
    def held(self) -> plan.Held | None:
        """The credential to connect with now."""
        return plan.active(self._state)

    def when_changed(self, call: Callable[[], None]) -> None:
        """Call this when `held` or `tells` is another."""
        self._on_change = call

    def put(self, event: plan.Event) -> None:
        """Something happened."""
        self._inbox.put_nowait(Item(event))

    async def rotate(self) -> control.Reply:
        """Rotate now, and say how it went."""
        outcome: asyncio.Future[control.Reply]
        outcome = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(Item(plan.Asked(self._clock.now()), outcome))
        return await outcome

    async def live(self) -> None:
        """Until cancelled."""
        await self._advance(self._commands)
        while True:
            item = await self._next()
            now = self._clock.now()
            before = self._state
            self._carrier.failure = None
            self._state, commands = plan.step(before, item.event, now)
            await self._advance(commands)
            if item.outcome is not None and not item.outcome.done():
                item.outcome.set_result(self._reply())

    async def _advance(self, commands: list[plan.Command]) -> None:
        before = self.held
        rotating = not isinstance(self._state, plan.Enrolled)
        self._state = await self._carrier.drive(self._state, commands)
        held, failure = self.held, self._carrier.failure
        if held != before:
            self._on_change()
        if held is not None and (before is None or held.number != before.number):
            what = held.serial or held.identity
            say(f"rotated: lives with {what} now")
            enrol.note(self._home, self._clock, "rotate", None, what)
        elif failure is not None:
            say(str(failure))
            if rotating:
                enrol.note(self._home, self._clock, "rotate", failure, None)

    async def _next(self) -> Item:
        """The next event, or a Tick when the plan wants one."""
        wake = plan.wake(self._state)
        longest = LONGEST_SLEEP
        if wake is not None:
            longest = min(max(wake - self._clock.now(), timedelta(0)), longest)
        try:
            async with asyncio.timeout(longest.total_seconds()):
                return await self._inbox.get()
        except TimeoutError:
            return Item(plan.Tick())

    def _reply(self) -> control.Reply:
        failure = self._carrier.failure
        if failure is not None:
            return control.Reply(exit_code(failure), str(failure))
        held = self.held
        what = (held.serial or held.identity) if held else None
        return control.Reply(DONE, f"rotated: lives with {what} now")

    def _on_tell(self, tell: plan.Tell) -> None:
        self.tells.append(tell)
        self._on_change()


async def run(home: Home, roll: Callable[[], float]) -> int:
    """Run until SIGTERM or SIGINT. Raises Unusable."""
    if not home.check():
        raise enrol.not_enrolled(home)
    enrol.take_lock(home)
    try:
        life = Life(home, roll)
        link = Link(home, life, roll, say)
        life.when_changed(link.on_change)

        async def answer(command: str) -> control.Reply:
            if command == "rotate":
                return await life.rotate()
            if command == "status":
                return control.Reply(DONE, link.said, link.connected)
            return control.Reply(WRONG_USAGE, "there is no such command")

        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(
                    control.listening(home.control_path, answer)
                )
            except OSError as error:
                # Worse than being deaf to `rotate` would be not to run at all.
                say(f"{home.control_path} cannot be made: {error.strerror}")
            await _until_told(life, link)
    finally:
        home.lock.release()
    return DONE


class _Stopped(Exception):  # noqa: N818 - it is no error
    """A signal came."""


async def _until_told(life: Life, link: Link) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def stopper() -> None:
        await stop.wait()
        raise _Stopped

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(life.live())
            group.create_task(link.hold())
            group.create_task(stopper())
    except* _Stopped:
        say("stopped")


def say(text: str) -> None:
    """One line for whoever reads the journal."""
    print(f"birthmark-agent: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the journal
