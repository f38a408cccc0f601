"""What the agent does next, and nothing done: states, events, commands, one step.

A credential is got in four moves, each safe to lose power after: its key and request
are saved, it is asked for, it is saved, it is proven by a connection. Only then is it
activated; until then the old one stays. The shell (`carry`) does what commands say and
tells what came of it; the clock and randomness are in what it tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from device_agent.schedule import (
    RENEWAL,
    RenewRule,
    pause_after_refusal,
    renewal_time,
)
from provisioning.model.credentials import CredentialKind

if TYPE_CHECKING:
    from datetime import datetime, timedelta

Slot = Literal["a", "b"]

HANDSHAKES_BEFORE_GIVING_UP = 6
"""How often a new credential may fail its handshake while an old one works."""

_OTHER: dict[Slot, Slot] = {"a": "b", "b": "a"}
_GONE_BUT_NOT_THE_DEVICE = frozenset(
    {"credential_superseded", "credential_expired", "credential_revoked"}
)
_ABOUT_THE_REQUEST = frozenset(
    {"csr_malformed", "csr_signature", "key_not_allowed", "key_in_use"}
    | {"name_not_allowed", "profile_not_allowed", "profile_unknown"}
)


@dataclass(frozen=True, slots=True)
class Held:
    """A whole credential in a slot.

    number: one more than its predecessor's; tells newer from older at start.
    jitter: 0 to 1, drawn when the slot was made; spreads renewals.
    """

    slot: Slot
    number: int
    kind: CredentialKind
    serial: str | None
    identity: str | None
    not_before: datetime | None
    not_after: datetime | None
    jitter: float

    @property
    def other_slot(self) -> Slot:
        """Where the next one goes."""
        return _OTHER[self.slot]


# States -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Fresh:
    """Nothing yet."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """A key and a request are being made and saved. old: None at first enrolment."""

    old: Held | None
    slot: Slot
    number: int


@dataclass(frozen=True, slots=True)
class Enrolling:
    """The first credential was asked for, with a request that is on disk.

    attempt: how many failed. retry_at: when to ask again; None while asking.
    """

    slot: Slot
    number: int
    attempt: int = 0
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Renewing:
    """The next credential was asked for. attempt, retry_at: as in Enrolling."""

    old: Held
    attempt: int = 0
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Proving:
    """The new credential is on disk and tried. attempt, retry_at: as in Enrolling."""

    old: Held | None
    new: Held
    attempt: int = 0
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Enrolled:
    """One credential is active.

    since: what was asked before is fulfilled. renew_at: None for never. refused: the
    last renewal was, and `renew_at` is when to ask again. spare: the whole credential
    in the other slot.
    """

    held: Held
    since: datetime
    renew_at: datetime | None
    refused: bool = False
    spare: Held | None = None


State = Fresh | Preparing | Enrolling | Renewing | Proving | Enrolled


# Events -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants a new credential: the gateway, or whoever holds the device."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Given:
    """A PSK came by hand. material: what the slot's file will hold."""

    new: Held
    material: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Key and request are on disk: now it may be sent."""


@dataclass(frozen=True, slots=True)
class Issued:
    """The gateway answered. material: what the slot's file will hold."""

    new: Held
    material: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Connected:
    """The credential under proof was accepted; the rule came over that connection."""

    rule: RenewRule


@dataclass(frozen=True, slots=True)
class Told:
    """The gateway said how things stand with the active credential.

    wish: it wants it rotated. not_after: of a PSK's generation; certificates know.
    """

    wish: bool
    at: datetime
    not_after: datetime | None
    rule: RenewRule


@dataclass(frozen=True, slots=True)
class Unsure:
    """A connection with this credential came up or was turned down: look why."""

    number: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The gateway will not, and a retry does not help. roll: 0 to 1, at random."""

    code: str
    roll: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Not reachable, told to wait, or the handshake failed.

    handshake: the gateway was there but did not take the credential. roll: as above.
    """

    roll: float
    retry_after: timedelta | None = None
    handshake: bool = False


@dataclass(frozen=True, slots=True)
class CouldNotSave:
    """The disk refused. roll: as above."""

    roll: float


Event = (
    Asked
    | Given
    | Tick
    | Saved
    | Issued
    | Connected
    | Told
    | Unsure
    | Refused
    | Failed
    | CouldNotSave
)


# Commands ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class MakeKeyAndCsr:
    """Make both, and have them on disk. Answered by Saved."""

    slot: Slot
    number: int


@dataclass(frozen=True, slots=True)
class RequestFirst:
    """Send the slot's request with the proof that enrolment was given."""

    slot: Slot
    number: int


@dataclass(frozen=True, slots=True)
class RequestRenewal:
    """Ask for the next one with the old one: the other slot's request, or a PSK."""

    old: Held


@dataclass(frozen=True, slots=True)
class Save:
    """Have the new credential on disk before anything else is done with it."""

    new: Held
    material: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ConnectWith:
    """Prove this credential by a connection. Answered by Connected."""

    held: Held


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the gateway how things stand with this credential. Answered by Told."""

    held: Held


@dataclass(frozen=True, slots=True)
class Activate:
    """From now on this is the credential."""

    held: Held


@dataclass(frozen=True, slots=True)
class Discard:
    """What is in this slot will never be of use."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the gateway how a rotation ended."""

    action: Literal["rotated", "failed"]
    held: Held
    reason: str | None = None


Command = (
    MakeKeyAndCsr
    | RequestFirst
    | RequestRenewal
    | Save
    | ConnectWith
    | Look
    | Activate
    | Discard
    | Tell
)
Next = tuple[State, list[Command]]


@dataclass(frozen=True, slots=True)
class Found:
    """What the disk holds at start.

    active: the slot named as such. held: the whole credentials. asked: slot and number
    of saved requests that have no answer yet.
    """

    active: Slot | None = None
    held: tuple[Held, ...] = ()
    asked: tuple[tuple[Slot, int], ...] = ()


def resume(  # noqa: PLR0911 - one return for each thing a disk can hold
    found: Found, rule: RenewRule, now: datetime
) -> Next:
    """Where the agent stands when the power comes back, and what it does first.

    A newer credential beside the active one was never proven, or proven and not noted:
    the gateway may have seen it, so it is tried, and the old one is still there.
    """
    by_age = sorted(found.held, key=lambda held: held.number)
    active = next((held for held in by_age if held.slot == found.active), None)
    if active is None and by_age:
        newest = by_age[-1]
        if found.active is not None:  # its slot is damaged: live with the other
            return _enrolled(newest, rule, now, spare=None), []
        old = by_age[-2] if len(by_age) > 1 else None
        return Proving(old, newest), [ConnectWith(newest)]
    if active is None:
        if found.asked:
            slot, number = max(found.asked, key=lambda asked: asked[1])
            return Enrolling(slot, number), [RequestFirst(slot, number)]
        return Fresh(), []
    newest = by_age[-1]
    if newest is not active:
        return Proving(active, newest), [ConnectWith(newest)]
    if any(number > active.number for _, number in found.asked):
        return Renewing(active), [RequestRenewal(active)]
    spare = next((held for held in by_age if held is not active), None)
    return _enrolled(active, rule, now, spare=spare), []


def step(state: State, event: Event, now: datetime) -> Next:
    """The state after an event, and what is to be done about it."""
    match state:
        case Fresh():
            return _fresh(state, event)
        case Preparing():
            return _preparing(state, event, now)
        case Enrolling():
            return _enrolling(state, event, now)
        case Renewing():
            return _renewing(state, event, now)
        case Proving():
            return _proving(state, event, now)
        case Enrolled():
            return _settled(state, event, now)


def wake(state: State) -> datetime | None:
    """When a Tick would do something; None when only other events can."""
    match state:
        case Enrolling() | Renewing() | Proving():
            return state.retry_at
        case Enrolled():
            return state.renew_at
        case _:
            return None


def active(state: State) -> Held | None:
    """The credential to live with in this state."""
    match state:
        case Enrolled(held=held):
            return held
        case Preparing(old=old) | Renewing(old=old) | Proving(old=old):
            return old
        case _:
            return None


def _fresh(state: Fresh, event: Event) -> Next:
    match event:
        case Asked():
            return Preparing(None, "a", 1), [MakeKeyAndCsr("a", 1)]
        case Given(new, material):
            return Proving(None, new), [Save(new, material), ConnectWith(new)]
        case _:
            return state, []


def _preparing(state: Preparing, event: Event, now: datetime) -> Next:
    match event, state.old:
        case Saved(), None:
            first = RequestFirst(state.slot, state.number)
            return Enrolling(state.slot, state.number), [first]
        case Saved(), Held() as old:
            return Renewing(old), [RequestRenewal(old)]
        case CouldNotSave(), None:
            return Fresh(), []
        case CouldNotSave(roll), Held() as old:
            return _later(old, now, roll), [Tell("failed", old, "could_not_save")]
        case _:
            return state, []


def _enrolling(  # noqa: PLR0911 - one return for each event
    state: Enrolling, event: Event, now: datetime
) -> Next:
    again = RequestFirst(state.slot, state.number)
    match event:
        case Asked():
            return replace(state, retry_at=None), [again]
        case Tick() if _due(state.retry_at, now):
            return replace(state, retry_at=None), [again]
        case Issued(new, material):
            return Proving(None, new), [Save(new, material), ConnectWith(new)]
        case Failed(roll, retry_after):
            attempt = state.attempt + 1
            at = now + RENEWAL.pause(attempt, roll, retry_after)
            return replace(state, attempt=attempt, retry_at=at), []
        case Refused(code):
            # A refused request is dropped; a refused proof may be followed by a better
            # one, and if an answer was lost before, only this request brings it again.
            dropped: list[Command] = [Discard(state.slot)]
            return Fresh(), dropped if code in _ABOUT_THE_REQUEST else []
        case CouldNotSave():
            return Fresh(), []
        case _:
            return state, []


def _renewing(  # noqa: PLR0911 - one return for each event
    state: Renewing, event: Event, now: datetime
) -> Next:
    again = RequestRenewal(state.old)
    match event:
        case Asked() if state.retry_at is not None:
            return replace(state, retry_at=None), [again]
        case Tick() if _due(state.retry_at, now):
            return replace(state, retry_at=None), [again]
        case Issued(new, material):
            commands: list[Command] = [Save(new, material), ConnectWith(new)]
            return Proving(state.old, new), commands
        case Failed(roll, retry_after):
            attempt = state.attempt + 1
            at = now + RENEWAL.pause(attempt, roll, retry_after)
            return replace(state, attempt=attempt, retry_at=at), []
        case Refused(code, roll):
            later = _later(state.old, now, roll)
            return later, [Tell("failed", state.old, code)]
        case CouldNotSave(roll):
            later = _later(state.old, now, roll)
            return later, [Tell("failed", state.old, "could_not_save")]
        case _:
            return state, []


def _proving(state: Proving, event: Event, now: datetime) -> Next:
    old, new = state.old, state.new
    match event:
        case Connected(rule):
            commands: list[Command] = [Activate(new)]
            if old is not None:
                commands.append(Tell("rotated", new))
            return _enrolled(new, rule, now, spare=old), commands
        case Asked() if state.retry_at is not None:
            return replace(state, retry_at=None), [ConnectWith(new)]
        case Tick() if _due(state.retry_at, now):
            return replace(state, retry_at=None), [ConnectWith(new)]
        case Failed() | Refused() | CouldNotSave() if old is None:
            return _first_unproven(state, event, now)
        case Failed() | Refused() | CouldNotSave() if old is not None:
            return _next_unproven(state, old, event, now)
        case _:
            return state, []


def _first_unproven(
    state: Proving, event: Failed | Refused | CouldNotSave, now: datetime
) -> Next:
    """The first credential did not get through; there is nothing to fall back on."""
    new, attempt = state.new, state.attempt + 1
    match event:
        case Failed(roll, retry_after, handshake=False):
            at = now + RENEWAL.pause(attempt, roll, retry_after)
            return replace(state, attempt=attempt, retry_at=at), []
        case CouldNotSave(roll) if new.kind is CredentialKind.CERTIFICATE:
            at = now + RENEWAL.pause(attempt, roll)
            return Enrolling(new.slot, new.number, attempt, at), []
        case CouldNotSave():
            return Fresh(), []
        case _:
            return Fresh(), [Discard(new.slot)]


def _next_unproven(
    state: Proving, old: Held, event: Failed | Refused | CouldNotSave, now: datetime
) -> Next:
    """The next credential did not get through; the old one is still there."""
    attempt = state.attempt + 1
    match event:
        case Refused(code, roll):
            return _later(old, now, roll), [Tell("failed", old, code)]
        case CouldNotSave(roll):  # the same request brings the same answer
            return Renewing(old, attempt, now + RENEWAL.pause(attempt, roll)), []
        case Failed(roll, _, True) if attempt >= HANDSHAKES_BEFORE_GIVING_UP:
            return _later(old, now, roll), [Tell("failed", old, "handshake_failed")]
        case Failed(roll, retry_after):
            at = now + RENEWAL.pause(attempt, roll, retry_after)
            return replace(state, attempt=attempt, retry_at=at), []


def _settled(  # noqa: PLR0911 - one return for each event
    state: Enrolled, event: Event, now: datetime
) -> Next:
    held = state.held
    match event:
        case Asked(at) if at >= state.since:
            return _renew(held)
        case Tick() if _due(state.renew_at, now):
            return _renew(held)
        case Unsure(number) if number == held.number:
            return state, [Look(held)]
        case Told(wish, at) if wish and at >= state.since:
            return _renew(held)
        case Told(_, _, not_after, rule):
            if held.kind is CredentialKind.PSK:
                held = replace(held, not_after=not_after)
            if state.refused:  # a refused renewal waits for its own time
                return replace(state, held=held), []
            renew_at = _renew_at(held, rule)
            return replace(state, held=held, renew_at=renew_at), []
        case Refused(code) if state.spare and code in _GONE_BUT_NOT_THE_DEVICE:
            # A restored backup, or an `active` that never reached the disk.
            return Proving(held, state.spare), [ConnectWith(state.spare)]
        case Refused("credential_expired") if not state.refused:
            return _renew(held)  # the way back, though our clock saw no need
        case _:
            return state, []


def _renew(held: Held) -> Next:
    if held.kind is CredentialKind.PSK:
        return Renewing(held), [RequestRenewal(held)]
    number = held.number + 1
    preparing = Preparing(held, held.other_slot, number)
    return preparing, [MakeKeyAndCsr(held.other_slot, number)]


def _enrolled(
    held: Held, rule: RenewRule, now: datetime, *, spare: Held | None
) -> Enrolled:
    return Enrolled(held, now, _renew_at(held, rule), spare=spare)


def _renew_at(held: Held, rule: RenewRule) -> datetime | None:
    return renewal_time(held.not_before, held.not_after, rule, held.jitter)


def _later(old: Held, now: datetime, roll: float) -> Enrolled:
    """Back to the old one; a refused renewal is tried again, rarely."""
    return Enrolled(old, now, now + pause_after_refusal(roll), refused=True)


def _due(at: datetime | None, now: datetime) -> bool:
    return at is not None and now >= at
