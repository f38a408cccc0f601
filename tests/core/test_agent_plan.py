"""What the agent does next: the promise that no device is stranded, step by step."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.plan import (
    HANDSHAKES_BEFORE_GIVING_UP,
    Activate,
    Asked,
    Connected,
    ConnectWith,
    CouldNotSave,
    Discard,
    Enrolled,
    Enrolling,
    Failed,
    Found,
    Fresh,
    Given,
    Held,
    Issued,
    Look,
    MakeKeyAndCsr,
    Preparing,
    Proving,
    Refused,
    Renewing,
    RequestFirst,
    RequestRenewal,
    Save,
    Saved,
    Tell,
    Tick,
    Told,
    Unsure,
    active,
    resume,
    step,
    wake,
)
from device_agent.schedule import RenewRule
from provisioning.model.credentials import CredentialKind

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
RULE = RenewRule()
MONTH = timedelta(days=30)


def certificate(slot="a", number=1, began=NOW):
    return Held(
        slot,
        number,
        CredentialKind.CERTIFICATE,
        f"{number:02x}",
        None,
        began,
        began + MONTH,
        0.5,
    )


def psk(slot="a", number=1):
    name = f"pump-7#{number}"
    return Held(slot, number, CredentialKind.PSK, None, name, None, None, 0.5)


OLD, NEW = certificate("a", 1), certificate("b", 2)
RENEW_AT = NOW + MONTH * RULE.at
SETTLED = Enrolled(OLD, NOW, RENEW_AT)


# Stories ----------------------------------------------------------------------------
def test_given_nothing_when_asked_then_key_and_request_are_saved_before_they_are_sent():
    state, commands = step(Fresh(), Asked(NOW), NOW)
    assert commands == [MakeKeyAndCsr("a", 1)]
    state, commands = step(state, Saved(), NOW)
    assert (state, commands) == (Enrolling("a", 1), [RequestFirst("a", 1)])


def test_given_an_answer_then_it_is_saved_before_it_is_tried():
    state, commands = step(Enrolling("a", 1), Issued(OLD, b"pem"), NOW)
    assert commands == [Save(OLD, b"pem"), ConnectWith(OLD)]
    state, commands = step(state, Connected(RULE), NOW)
    assert commands == [Activate(OLD)]
    assert active(state) == OLD


def test_given_a_psk_by_hand_then_it_is_proven_before_it_is_active():
    state, commands = step(Fresh(), Given(psk(), b"json"), NOW)
    assert commands == [Save(psk(), b"json"), ConnectWith(psk())]
    assert active(state) is None
    state, commands = step(state, Connected(RULE), NOW)
    assert commands == [Activate(psk())]


def test_given_enrolled_when_two_thirds_are_over_then_it_prepares_in_the_other_slot():
    assert wake(SETTLED) == RENEW_AT
    early = RENEW_AT - timedelta(seconds=1)
    assert step(SETTLED, Tick(), early) == (SETTLED, [])
    state, commands = step(SETTLED, Tick(), RENEW_AT)
    assert state == Preparing(OLD, "b", 2)
    assert commands == [MakeKeyAndCsr("b", 2)]


def test_given_proving_then_the_old_one_stays_active_until_the_new_one_connected():
    state, commands = step(Renewing(OLD), Issued(NEW, b"pem"), NOW)
    assert active(state) == OLD
    assert commands == [Save(NEW, b"pem"), ConnectWith(NEW)]
    state, commands = step(state, Connected(RULE), NOW)
    assert active(state) == NEW
    assert commands == [Activate(NEW), Tell("rotated", NEW)]


def test_given_proving_when_the_power_came_back_then_the_new_one_is_tried_first():
    found = Found("a", held=(OLD, NEW))
    assert resume(found, RULE, NOW) == (Proving(OLD, NEW), [ConnectWith(NEW)])


def test_given_a_request_on_disk_when_the_power_came_back_then_that_one_is_sent():
    found = Found("a", held=(OLD,), asked=(("b", 2),))
    assert resume(found, RULE, NOW) == (Renewing(OLD), [RequestRenewal(OLD)])
    found = Found(None, asked=(("a", 1),))
    assert resume(found, RULE, NOW) == (Enrolling("a", 1), [RequestFirst("a", 1)])


def test_given_a_stale_request_beside_a_newer_active_one_then_it_is_not_sent():
    found = Found("b", held=(NEW,), asked=(("a", 1),))
    state, commands = resume(found, RULE, NOW)
    assert (active(state), commands) == (NEW, [])


def test_given_an_old_one_beside_the_active_one_then_it_is_the_spare():
    state, commands = resume(Found("b", held=(OLD, NEW)), RULE, NOW)
    assert isinstance(state, Enrolled)
    assert (state.held, state.spare, commands) == (NEW, OLD, [])


def test_given_a_damaged_active_slot_then_the_other_is_lived_with():
    state, commands = resume(Found("a", held=(NEW,)), RULE, NOW)
    assert (active(state), commands) == (NEW, [])


def test_given_no_active_file_but_two_credentials_then_neither_is_given_up():
    state, _ = resume(Found(None, held=(OLD, NEW)), RULE, NOW)
    assert state == Proving(OLD, NEW)


def test_given_an_empty_disk_then_fresh():
    assert resume(Found(), RULE, NOW) == (Fresh(), [])


def test_when_the_gateway_is_away_then_the_same_request_is_made_later():
    failed = Failed(0.5, timedelta(seconds=30))
    state, commands = step(Renewing(OLD), failed, NOW)
    at = wake(state)
    assert commands == []
    assert at is not None
    assert at >= NOW + timedelta(seconds=30), "Retry-After is obeyed"
    assert step(state, Tick(), at - timedelta(seconds=1)) == (state, [])
    state, commands = step(state, Tick(), at)
    assert commands == [RequestRenewal(OLD)]


def test_when_it_stays_away_then_the_pauses_grow_to_an_hour_and_no_more():
    state, pauses = Renewing(OLD), []
    for _ in range(40):
        state, _ = step(state, Failed(1.0), NOW)
        pauses.append(state.retry_at - NOW)
    assert pauses == sorted(pauses)
    assert pauses[-1] == timedelta(hours=1)


def test_when_asked_while_waiting_then_it_tries_at_once():
    waiting = Renewing(OLD, 3, NOW + timedelta(hours=1))
    assert step(waiting, Asked(NOW), NOW)[1] == [RequestRenewal(OLD)]
    waiting = Proving(OLD, NEW, 3, NOW + timedelta(hours=1))
    assert step(waiting, Asked(NOW), NOW)[1] == [ConnectWith(NEW)]


def test_when_asked_before_the_last_rotation_then_that_one_was_the_answer():
    earlier = NOW - timedelta(seconds=1)
    assert step(SETTLED, Asked(earlier), NOW) == (SETTLED, [])


def test_when_a_renewal_is_refused_then_it_says_so_and_asks_again_much_later():
    state, commands = step(Renewing(OLD), Refused("device_revoked", 0.0), NOW)
    assert active(state) == OLD
    assert commands == [Tell("failed", OLD, "device_revoked")]
    at = wake(state)
    assert at is not None
    assert at >= NOW + timedelta(minutes=10)


def test_when_the_new_one_is_refused_then_the_old_one_is_lived_with():
    state, commands = step(Proving(OLD, NEW), Refused("credential_revoked", 0.0), NOW)
    assert active(state) == OLD
    assert commands == [Tell("failed", OLD, "credential_revoked")]


def test_when_handshakes_with_the_new_one_keep_failing_then_it_gives_up_in_the_end():
    state = Proving(OLD, NEW)
    for _ in range(HANDSHAKES_BEFORE_GIVING_UP - 1):
        state, commands = step(state, Failed(0.0, handshake=True), NOW)
        assert (type(state), commands) == (Proving, [])
    state, commands = step(state, Failed(0.0, handshake=True), NOW)
    assert active(state) == OLD
    assert commands == [Tell("failed", OLD, "handshake_failed")]


def test_when_the_gateway_is_not_there_then_the_new_one_is_never_given_up():
    state = Proving(OLD, NEW)
    for _ in range(3 * HANDSHAKES_BEFORE_GIVING_UP):
        state, _ = step(state, Failed(0.0), NOW)
    assert isinstance(state, Proving)


def test_a_refused_token_leaves_the_request_for_a_better_one():
    state, commands = step(Enrolling("a", 1), Refused("token_refused", 0.0), NOW)
    assert (state, commands) == (Fresh(), [])
    state, commands = step(Enrolling("a", 1), Refused("key_in_use", 0.0), NOW)
    assert (state, commands) == (Fresh(), [Discard("a")])


def test_a_psk_renews_without_a_request_of_its_own():
    settled = Enrolled(psk(), NOW, None)
    assert step(settled, Asked(NOW), NOW) == (
        Renewing(psk()),
        [RequestRenewal(psk())],
    )


def test_a_psk_with_an_end_is_renewed_in_time_too():
    held = replace(psk(), not_before=NOW)
    state, _ = step(Enrolled(held, NOW, None), Told(False, NOW, NOW + MONTH, RULE), NOW)
    assert wake(state) == RENEW_AT


def test_a_wish_seen_in_whoami_is_obeyed():
    state, commands = step(SETTLED, Told(True, NOW, None, RULE), NOW)
    assert commands == [MakeKeyAndCsr("b", 2)]
    assert active(state) == OLD


def test_an_unsure_link_makes_it_look_but_only_for_the_present_credential():
    assert step(SETTLED, Unsure(1), NOW) == (SETTLED, [Look(OLD)])
    assert step(SETTLED, Unsure(0), NOW) == (SETTLED, [])


def test_a_superseded_active_one_gives_way_to_the_spare():
    settled = replace(SETTLED, held=NEW, spare=OLD)
    state, commands = step(settled, Refused("credential_superseded", 0.0), NOW)
    assert (state, commands) == (Proving(NEW, OLD), [ConnectWith(OLD)])
    assert step(SETTLED, Refused("credential_superseded", 0.0), NOW) == (SETTLED, [])
    assert step(settled, Refused("device_revoked", 0.0), NOW) == (settled, [])


def test_an_expired_one_takes_the_way_back_once():
    expired = Refused("credential_expired", 0.0)
    _, commands = step(SETTLED, expired, NOW)
    assert commands == [MakeKeyAndCsr("b", 2)]
    refused = replace(SETTLED, refused=True)
    assert step(refused, expired, NOW) == (refused, [])


def test_a_full_disk_asks_again_for_what_it_could_not_keep():
    state, commands = step(Proving(OLD, NEW), CouldNotSave(0.5), NOW)
    assert isinstance(state, Renewing)
    assert (active(state), commands) == (OLD, [])
    state, _ = step(Proving(None, OLD), CouldNotSave(0.5), NOW)
    assert isinstance(state, Enrolling)


# The whole table --------------------------------------------------------------------
LATER = NOW + timedelta(hours=1)
STATES = [
    Fresh(),
    Preparing(None, "a", 1),
    Preparing(OLD, "b", 2),
    Enrolling("a", 1),
    Enrolling("a", 1, 1, NOW),
    Renewing(OLD),
    Renewing(OLD, 1, NOW),
    Renewing(psk(), 1, NOW),
    Proving(None, OLD),
    Proving(None, psk(), 1, NOW),
    Proving(OLD, NEW),
    Proving(OLD, NEW, 1, NOW),
    SETTLED,
    replace(SETTLED, renew_at=NOW),
    Enrolled(NEW, NOW, RENEW_AT, spare=OLD),
    Enrolled(psk(), NOW, None),
]
EVENTS = [
    Asked(NOW),
    Given(psk(), b"json"),
    Tick(),
    Saved(),
    Issued(NEW, b"pem"),
    Connected(RULE),
    Told(False, NOW, None, RULE),
    Told(True, NOW, None, RULE),
    Unsure(1),
    Refused("token_refused", 0.5),
    Refused("credential_superseded", 0.5),
    Failed(0.5),
    Failed(0.5, timedelta(seconds=5), handshake=True),
    CouldNotSave(0.5),
]
MEANT = {
    Fresh: {Asked, Given},
    Preparing: {Saved, CouldNotSave},
    Enrolling: {Asked, Tick, Issued, Failed, Refused, CouldNotSave},
    Renewing: {Asked, Tick, Issued, Failed, Refused, CouldNotSave},
    Proving: {Connected, Asked, Tick, Failed, Refused, CouldNotSave},
    Enrolled: {Asked, Tick, Told, Unsure, Refused},
}
"""What each state answers to; every other pair changes nothing and does nothing."""


@pytest.mark.parametrize(("state", "event"), list(product(STATES, EVENTS)))
def test_every_pair_keeps_the_promise(state, event):
    after, commands = step(state, event, NOW)
    if type(event) not in MEANT[type(state)]:
        assert (after, commands) == (state, [])
    before = active(state)
    if before is not None:
        assert active(after) is not None, "a device with a credential keeps one"
    for command in commands:
        if isinstance(command, Activate):
            assert isinstance(event, Connected), "only what has connected is activated"
        if isinstance(command, Discard):
            assert before is None, "an enrolled device discards nothing"
        if isinstance(command, MakeKeyAndCsr) and before is not None:
            assert command.slot == before.other_slot, "never over the active one"
        if isinstance(command, Save) and before is not None:
            assert command.new.slot == before.other_slot, "never over the active one"


@pytest.mark.parametrize("kind", [type(state) for state in STATES])
def test_every_state_answers_to_everything_it_is_meant_to(kind):
    moved = {
        type(event)
        for state, event in product(STATES, EVENTS)
        if type(state) is kind and step(state, event, NOW) != (state, [])
    }
    assert moved == MEANT[kind]


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_no_sequence_of_events_takes_the_last_credential_away(events):
    state = SETTLED
    for number, drawn in enumerate(events):
        event = drawn
        if isinstance(drawn, Issued):
            event = Issued(replace(NEW, slot=active(state).other_slot), b"pem")
        state, commands = step(state, event, NOW + timedelta(seconds=number))
        assert active(state) is not None
        assert not any(isinstance(command, Discard) for command in commands)


def test_secrets_do_not_show():
    for shown in (Issued(NEW, b"SECRET"), Save(NEW, b"SECRET"), Given(NEW, b"SECRET")):
        assert "SECRET" not in repr(shown)
