"""Standings in memory: bounded, forgotten in time, and never older than a change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from provisioning.model.credentials import (
    CredentialKind,
    CredentialState,
    DeviceState,
)
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.registry.rows import CredentialRow, DeviceRow
from provisioning.registry.schema import (
    end_to_us,
    from_us,
    maybe_from_us,
    to_us,
)
from provisioning.registry.standings import Held, Standings, held

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def entry(number: int, device: str = "pump-7", **changes) -> Held:
    row = CredentialRow(
        id=number,
        device=1,
        kind=CredentialKind.CERTIFICATE,
        line="ldevid",
        state=CredentialState.ACTIVE,
        serial=Serial(number),
        generation=None,
        issuer="issuing",
        not_before=0,
        not_after=to_us(NOW) + 10,
        spki_sha256=None,
        request_key=None,
        first_seen=None,
        connections=2,
        ends_at=None,
        revoked_at=None,
        reason=None,
        created_at=0,
    )
    for name, value in changes.items():
        setattr(row, name, value)
    return held(row, DeviceRow(1, DeviceId(device), DeviceState.ENROLLED, None, 0))


def test_the_least_recently_used_goes_first():
    standings = Standings(2)
    standings.put(entry(1))
    standings.put(entry(2))
    assert standings.get(Serial(1)) is not None
    standings.put(entry(3))
    assert standings.get(Serial(2)) is None
    assert standings.of_credential(2) is None
    assert standings.get(Serial(1)) is not None
    assert len(standings) == 2


def test_a_device_is_forgotten_with_all_its_credentials():
    standings = Standings(9)
    standings.put(entry(1))
    psk = entry(2, kind=CredentialKind.PSK, serial=None, generation=3)
    standings.put(psk)
    standings.put(entry(3, "valve-2"))
    assert standings.get(PskIdentity(DeviceId("pump-7"), 3)) is psk
    standings.drop("pump-7")
    assert standings.get(psk.key) is None
    assert standings.get(Serial(1)) is None
    assert standings.of_credential(1) is None
    assert standings.get(Serial(3)) is not None


def test_what_was_read_before_a_change_is_not_kept_after_it():
    standings = Standings(9)
    with standings.reading() as reading:
        old = entry(1)
        standings.drop("pump-7")  # a revocation, while the answer is on its way
        reading.put(old)
        reading.put(entry(2, "valve-2"))
    assert standings.get(Serial(1)) is None
    assert standings.get(Serial(2)) is not None


def test_what_is_read_after_a_change_is_kept():
    standings = Standings(9)
    standings.drop("pump-7")
    with standings.reading() as reading:
        reading.put(entry(1))
    assert standings.get(Serial(1)) is not None


def test_what_was_read_before_everything_was_forgotten_is_not_kept():
    standings = Standings(9)
    with standings.reading() as reading:
        standings.clear()
        reading.put(entry(1))
    assert len(standings) == 0


def test_a_newer_entry_takes_the_place_of_an_older_one():
    standings = Standings(1)
    standings.put(entry(1, connections=0))
    standings.put(entry(1, connections=2))
    assert standings.of_credential(1).connections == 2
    assert len(standings) == 1


def test_a_grace_that_is_over_counts_although_no_sweep_saw_it():
    over = entry(1, ends_at=to_us(NOW))
    before = NOW - timedelta(microseconds=1)
    assert over.at(to_us(before)).credential.state is CredentialState.ACTIVE
    assert over.at(to_us(NOW)).credential.state is CredentialState.SUPERSEDED
    assert over.at(None).credential.state is CredentialState.ACTIVE
    revoked = entry(1, ends_at=to_us(NOW), state=CredentialState.REVOKED)
    assert revoked.at(to_us(NOW)).credential.state is CredentialState.REVOKED


def test_only_a_settled_credential_may_connect_without_asking_the_database():
    assert entry(1).settled(to_us(NOW))
    for changes in (
        {"connections": 0},
        {"connections": 1},
        {"ends_at": to_us(NOW)},
        {"not_after": to_us(NOW) - 1},
        {"state": CredentialState.PENDING},
        {"state": CredentialState.REVOKED},
    ):
        assert not entry(1, **changes).settled(to_us(NOW))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2))))
def test_its_three_views_always_agree(steps):
    standings = Standings(4)
    for step, number, device in steps:
        match step:
            case 0 | 1:
                # A serial stays with its device.
                standings.put(entry(number, f"d{number % 3}"))
            case 2:
                standings.drop(f"d{device}")
            case _:
                standings.get(Serial(number))
        known = [n for n in range(1, 7) if standings.of_credential(n) is not None]
        assert len(standings) == len(known) <= 4
        for n in known:
            assert standings.get(Serial(n)) is standings.of_credential(n)


@given(st.datetimes(timezones=st.just(UTC), min_value=datetime(1900, 1, 1)))  # noqa: DTZ001 - hypothesis adds the zone
def test_a_time_is_stored_to_the_microsecond(at):
    assert from_us(to_us(at)) == at


def test_no_end_is_stored_as_none():
    no_end = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert end_to_us(no_end) is None
    assert end_to_us(None) is None
    assert maybe_from_us(end_to_us(NOW)) == NOW
    assert maybe_from_us(None) is None
