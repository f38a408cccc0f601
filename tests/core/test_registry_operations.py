"""The operations on a page, without a database: a device is never stranded.

A page that knows everything needs no look-up, so whole lives run in microseconds.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioning.model.credentials import (
    CREDENTIAL_MOVES,
    AuthMethod,
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.errors import OutcomeUnknown, PeerError
from provisioning.model.ids import DeviceId, Serial
from provisioning.registry.enrolments import Admit, Finish, Void
from provisioning.registry.orders import AskRotate, MoveDevice, Revoke
from provisioning.registry.page import Page, Wants
from provisioning.registry.proofs import Connect, EndIfDue, NextPsk, Rotated
from provisioning.registry.records import Ask, NewIntent

START = datetime(2030, 1, 1, tzinfo=UTC)
PUMP = DeviceId("pump-7")
GRACE = timedelta(hours=1)
LIFETIME = timedelta(days=30)
WORKING = {CredentialState.PENDING, CredentialState.ACTIVE}


@dataclass
class Life:
    """One device's page and clock, and every state that its credentials had."""

    page: Page = field(default_factory=Page)
    now: datetime = START
    issued: list[int] = field(default_factory=list)
    states: dict[int, CredentialState] = field(default_factory=dict)

    def run(self, operation):
        """As the writer does it; what is not known is known not to be there."""
        wants = Wants()
        operation.want(wants)
        known = self.page.known
        for name in wants.devices | wants.live | wants.ended | wants.generations:
            known.devices.setdefault(name, None)
        for key in wants.spkis:
            known.owners.setdefault(key, set())
            known.open_keys.setdefault(key, [])
        for key in wants.requests:
            known.requests.setdefault(key, None)
            known.open_requests.setdefault(key, None)
        for serial in wants.serials:
            known.serials.setdefault(serial, None)
        for number in wants.credentials | wants.live_beside:
            known.credentials.setdefault(number, None)
        for number in wants.intents | wants.finished:
            known.intents.setdefault(number, None)
        result = operation.apply(self.page)
        self.watch()
        self.page.settled()
        return result

    def watch(self):
        """No credential ever makes a move that the design does not have."""
        for row in self.page.known.credentials.values():
            if row is None:
                continue
            before = self.states.get(row.id)
            if before is not None and before is not row.state:
                assert row.state in CREDENTIAL_MOVES[before]
            self.states[row.id] = row.state

    def intend(self, key: bytes, line: str = "ldevid") -> NewIntent:
        number = len(self.page.known.intents) + 1
        intent = NewIntent(
            request_key=key,
            device=PUMP,
            line=line,
            profile=line,
            issuer="issuing",
            serial=Serial(number),
            not_before=self.now,
            not_after=self.now + LIFETIME,
            spki_sha256=key,
            csr_der=b"",
            token_id=None,
            auth=AuthMethod.CERTIFICATE,
            created_at=self.now,
        )
        ask = Ask(key, PUMP, None, None, key, line, self.now)
        return self.run(Admit(ask, lambda _facts: intent))

    def issue(self, key: bytes = b"", line: str = "ldevid") -> int:
        key = key or len(self.issued).to_bytes(32)
        intent = self.intend(key, line)
        number = self.run(Finish(intent, b"", self.now)).id
        self.issued.append(number)
        return number

    def connect(self, number: int):
        return self.run(Connect(number, self.now, GRACE))[0]

    def row(self, number: int):
        return self.page.known.credentials[number]


ANY = st.integers(0, 30)
STEP = st.one_of(
    st.tuples(st.just("issue"), ANY),
    st.tuples(st.just("connect"), ANY),
    st.tuples(st.just("rotated"), ANY),
    st.tuples(st.just("sweep"), ANY),
    st.tuples(st.just("wait"), ANY),
    st.tuples(st.just("begin"), ANY),
    st.tuples(st.just("psk"), ANY),
    st.tuples(st.just("ask"), ANY),
)


def step(life: Life, what: str, which: int) -> None:
    number = life.issued[which % len(life.issued)]
    match what:
        case "issue":
            life.issue()
        case "begin":
            intent = life.intend(b"begun" + len(life.states).to_bytes(27))
            life.run(Void(intent.id, "test", life.now))
        case "connect":
            life.connect(number)
        case "rotated":
            with suppress(PeerError):
                life.run(Rotated(PUMP, life.row(number).serial, life.now))
        case "sweep":
            for one in list(life.states):
                life.run(EndIfDue(one, life.now))
        case "wait":
            life.now += timedelta(minutes=10 * which)
        case "psk":
            life.run(NextPsk(PUMP, "certificate", "device", life.now))
        case _:
            life.run(AskRotate(PUMP, life.now + GRACE, life.now, "op"))


@settings(max_examples=300)
@given(st.lists(STEP, max_size=40))
def test_whatever_happens_the_newest_proven_credential_works_until_it_expires(steps):
    life = Life()
    life.issue()
    for what, which in steps:
        step(life, what, which)
        rows = [life.row(number) for number in life.issued]
        proven = [row for row in rows if row.first_seen is not None]
        if proven:
            newest = proven[-1]
            assert newest.state in {CredentialState.ACTIVE, CredentialState.EXPIRED}
            if newest.state is CredentialState.EXPIRED:
                assert newest.not_after < (life.now - START) // timedelta(
                    microseconds=1
                ) + (START - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
                    microseconds=1
                )
        # Of those that were never proven, at most one waits for it.
        assert [row.state for row in rows].count(CredentialState.PENDING) <= 1


@settings(max_examples=200)
@given(st.lists(STEP, max_size=30), st.integers(0, 29))
def test_after_revocation_nothing_works_and_nothing_new_begins(steps, when):
    life = Life()
    life.issue()
    for what, which in steps[:when]:
        step(life, what, which)
    open_intent = life.intend(b"open")
    life.run(Revoke(PUMP, None, RevocationReason.UNSPECIFIED, life.now, "op"))
    with pytest.raises(PeerError):
        life.run(Finish(open_intent, b"", life.now))
    for number in life.issued:
        standing = life.connect(number)
        assert standing.device_state is DeviceState.REVOKED
        assert standing.credential.state not in WORKING
    with pytest.raises(PeerError):
        life.run(NextPsk(PUMP, "operator", "op", life.now))


def test_an_operation_that_is_refused_leaves_the_page_as_it_was():
    life = Life()
    old = life.issue()
    life.connect(old)
    new = life.issue()
    for operation in (
        Rotated(PUMP, life.row(new).serial, life.now),
        Rotated(PUMP, Serial(999), life.now),
        Revoke(PUMP, Serial(999), RevocationReason.UNSPECIFIED, life.now, "op"),
        MoveDevice(
            PUMP,
            DeviceState.SUSPENDED,
            DeviceState.REGISTERED,
            "resumed",
            life.now,
            "op",
        ),
        NextPsk(DeviceId("PUMP-7"), "operator", "op", life.now),
    ):
        with pytest.raises(PeerError):
            life.run(operation)
        assert life.page.work.nothing()


def test_a_void_that_names_another_serial_leaves_the_intent_alone():
    life = Life()
    intent = life.intend(b"key")
    assert life.run(Void(intent.id, "lost", life.now, serial=Serial(999))) is False
    assert life.run(Void(intent.id, "lost", life.now, serial=intent.serial)) is True
    with pytest.raises(OutcomeUnknown):
        life.run(Finish(intent, b"", life.now))


def test_a_group_that_only_looks_writes_nothing():
    page = Page()
    page.saw(START)
    assert page.work.nothing()
    page.tell("device", PUMP, {"state": "revoked"}, page.saw(START))
    assert not page.work.nothing()
    (change,) = page.work.changes
    assert json.loads(str(change["detail"])) == {"state": "revoked"}
    assert change["seq"] == 1
