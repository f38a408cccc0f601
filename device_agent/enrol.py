"""The first credential, and one rotation: a command's whole life."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from device_agent import keys, plan
from device_agent.carry import Carrier, FirstProof, held_psk
from device_agent.dial import Dialer, unverified
from device_agent.failures import (
    Failure,
    NotNowError,
    RefusedError,
    UntrustedError,
)
from device_agent.home import LONGEST_DETAIL, Belonging, Home, Last
from device_agent.slots import write_psk
from provisioning.model.errors import Unusable
from provisioning.tls.context import ClientPsk

if TYPE_CHECKING:
    from collections.abc import Callable

    from device_agent.clock import Clock

LOCK_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Wish:
    """What `enroll` was told.

    anchors_pem: whom to trust, or None when `pin` says it: SHA-256 of the root's DER.
    """

    to: Belonging
    proof: FirstProof
    anchors_pem: bytes | None
    pin: bytes | None = field(default=None)


def already(home: Home) -> plan.Held | None:
    """The active credential, if there is one: enrolment is done."""
    if not home.check():
        return None
    found = home.slots.find()
    return next((held for held in found.held if held.slot == found.active), None)


async def enrol(home: Home, wish: Wish, roll: Callable[[], float]) -> plan.Held:
    """Get the first credential, or go on where an earlier try ended.

    Raises RefusedError, NotNowError, UntrustedError, Unusable.
    """
    home.open()
    take_lock(home)
    try:
        clock = home.clock()
        anchors = wish.anchors_pem
        if anchors is None:
            anchors = await fetch_pinned(wish, clock)
        _begin(home, wish, anchors)
        dialer = Dialer(anchors, home.clock(), home.sessions())
        carrier = Carrier(home, wish.to, dialer, roll, proof=wish.proof)
        state = await _first(home, wish, carrier, clock, roll)
        return _outcome(home, carrier, state, "enroll", clock)
    finally:
        home.lock.release()


async def rotate(home: Home, roll: Callable[[], float]) -> plan.Held:
    """Get the next credential, prove it, and live with it. The lock must be ours.

    A rotation that was cut off is finished, which is what was asked for. Raises
    RefusedError, NotNowError, UntrustedError, Unusable.
    """
    carrier, clock = compose(home, roll)
    state, commands = plan.resume(home.slots.find(), carrier.rule, clock.now())
    finishing = bool(commands) and plan.active(state) is not None
    state = await carrier.drive(state, commands)
    if isinstance(state, plan.Enrolled) and not finishing and not carrier.failure:
        now = clock.now()
        state, commands = plan.step(state, plan.Asked(now), now)
        state = await carrier.drive(state, commands)
    held = _outcome(home, carrier, state, "rotate", clock)
    try:
        # The second connection with the new one ends the old one (DESIGN, Rotation).
        await carrier.look(held)
    except (NotNowError, RefusedError, UntrustedError):
        return held  # it is proven and active; the grace period ends the old one
    return held


def compose(
    home: Home,
    roll: Callable[[], float],
    tell: Callable[[plan.Tell], None] | None = None,
) -> tuple[Carrier, Clock]:
    """The parts of an agent that enrolled before. Raises Unusable."""
    belonging = home.belonging() if home.check() else None
    if belonging is None:
        raise not_enrolled(home)
    home.open()
    clock = home.clock()
    dialer = Dialer(home.anchors(), clock, home.sessions())
    return Carrier(home, belonging, dialer, roll, tell=tell), clock


def not_enrolled(home: Home) -> Unusable:
    """What to say where there is no credential yet."""
    return Unusable(str(home.folder), "it holds no credential; run `enroll` first")


def take_lock(home: Home) -> None:
    """Have the folder for ourselves. Raises Unusable."""
    if not home.lock.take():
        why = "another birthmark-agent is at work in it; wait for it, or stop it"
        raise Unusable(str(home.folder), why)


async def wait_for_lock(home: Home, longest_s: float) -> None:
    """Have the folder as soon as another command is done. Raises Unusable."""
    try:
        async with asyncio.timeout(longest_s):
            while not home.lock.take():  # noqa: ASYNC110 - another process holds it
                await asyncio.sleep(LOCK_LOOK_S)
    except TimeoutError:
        take_lock(home)


async def fetch_pinned(wish: Wish, clock: Clock) -> bytes:
    """The trust anchor with the pinned digest, from a server not trusted yet.

    Whatever else it offers is ignored. Raises UntrustedError when it has none such.
    """
    async with unverified(wish.to.gateway, clock) as gateway:
        offered = await gateway.cacerts()
    for der in offered:
        digest = hashlib.sha256(der).digest()
        if wish.pin is not None and hmac.compare_digest(digest, wish.pin):
            try:
                return keys.ders_to_pem([der])
            except ValueError as error:
                raise UntrustedError("the pinned certificate is damaged") from error
    raise UntrustedError(
        f"none of the certificates at {wish.to.gateway} has that SHA-256; "
        "compare it with what `birthmark ca show` prints"
    )


def note(
    home: Home, clock: Clock, action: str, failure: Failure | None, detail: str | None
) -> None:
    """Remember an outcome for `status`; not worth failing for."""
    outcome = "done"
    if failure is not None:
        outcome = "refused" if isinstance(failure, RefusedError) else "failed"
        if isinstance(failure, NotNowError):
            outcome = "later"
        detail = str(failure)
    at = clock.now().isoformat(timespec="seconds").replace("+00:00", "Z")
    detail = None if detail is None else detail[:LONGEST_DETAIL]
    try:
        home.note(Last(at, action, outcome, detail))
    except OSError:
        return


def _begin(home: Home, wish: Wish, anchors: bytes) -> None:
    """Note whose this device is to be; what an other enrolment left is dropped."""
    try:
        known = home.belonging()
        if known is not None and _same(known, wish.to):
            home.trust(anchors)
            return
        for slot in ("a", "b"):
            home.slots.discard(slot)
        home.trust(anchors)
        home.belong(wish.to)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise Unusable(str(home.folder), why) from error


def _same(known: Belonging, to: Belonging) -> bool:
    return replace(known, mqtts=to.mqtts, rule=to.rule) == to


async def _first(
    home: Home,
    wish: Wish,
    carrier: Carrier,
    clock: Clock,
    roll: Callable[[], float],
) -> plan.State:
    state, commands = plan.resume(home.slots.find(), carrier.rule, clock.now())
    if isinstance(state, plan.Proving):
        state = await carrier.drive(state, commands)
        if not isinstance(state, plan.Fresh):
            return state
        carrier.failure = None  # what was left is of no use: begin anew
        commands = []
    if isinstance(state, plan.Fresh):
        now = clock.now()
        event: plan.Event = plan.Asked(now)
        if wish.to.mode == "psk":
            event = _given(wish.proof, roll)
        state, commands = plan.step(state, event, now)
    return await carrier.drive(state, commands)


def _given(proof: FirstProof, roll: Callable[[], float]) -> plan.Event:
    if not isinstance(proof.credential, ClientPsk):
        raise TypeError("PSK mode needs a PSK; the command line sees to it")
    held = held_psk(proof.credential, "a", 1, roll())
    return plan.Given(held, write_psk(proof.credential))


def _outcome(
    home: Home, carrier: Carrier, state: plan.State, action: str, clock: Clock
) -> plan.Held:
    """The credential to live with, or the failure that stands in the way."""
    if carrier.failure is None and isinstance(state, plan.Enrolled):
        held = state.held
        note(home, clock, action, None, held.serial or held.identity)
        return held
    failure = carrier.failure or not_enrolled(home)
    note(home, clock, action, failure, None)
    raise failure
