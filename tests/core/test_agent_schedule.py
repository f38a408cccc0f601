"""When the agent renews and retries: spread, bounded, and sane whatever it is told."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.address import parse_endpoint
from device_agent.http import read_retry_after
from device_agent.schedule import (
    LONGEST_RETRY_AFTER,
    Pace,
    RenewRule,
    renewal_time,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PACE = Pace(first=timedelta(seconds=2), longest=timedelta(minutes=5))
ROLLS = st.floats(0, 1)


@given(ROLLS, st.integers(0, 10**6))
def test_a_pause_is_never_longer_than_the_longest(roll, attempt):
    assert timedelta(0) <= PACE.pause(attempt, roll) <= PACE.longest


@given(ROLLS, st.timedeltas())
def test_retry_after_is_the_least_and_at_most_a_day(roll, asked):
    pause = PACE.pause(1, roll, asked)
    assert pause >= min(max(asked, timedelta(0)), LONGEST_RETRY_AFTER)
    assert pause <= LONGEST_RETRY_AFTER + PACE.first


@given(ROLLS, st.timedeltas(timedelta(minutes=1), timedelta(days=4000)))
def test_renewal_falls_around_two_thirds_of_the_lifetime(roll, lifetime):
    at = renewal_time(NOW, NOW + lifetime, RenewRule(), roll)
    assert at is not None
    assert 0.6 < (at - NOW) / lifetime < 0.73


def test_devices_are_spread():
    ends = [renewal_time(NOW, NOW + timedelta(days=30), RenewRule(), r) for r in (0, 1)]
    assert ends[1] - ends[0] > timedelta(days=2)


def test_what_has_no_end_is_never_renewed_by_time():
    no_end = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert renewal_time(NOW, no_end, RenewRule(), 0.5) is None
    assert renewal_time(NOW, None, RenewRule(), 0.5) is None


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans()))
def test_a_rule_from_outside_is_kept_within_reason(value):
    rule = RenewRule.within_reason(value, value)
    assert 0.1 <= rule.at <= 0.95
    assert 0 <= rule.jitter <= 0.25
    assert not math.isnan(rule.at)


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("120", timedelta(seconds=120)),
        ("0", timedelta(0)),
        ("99999999999999999999", LONGEST_RETRY_AFTER),
        ("Sun, 01 Mar 2026 12:02:00 GMT", timedelta(minutes=2)),
        ("Sun, 01 Mar 2020 12:02:00 GMT", timedelta(0)),
        ("-1", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_read_in_both_forms(text, wait):
    assert read_retry_after(text, NOW) == wait


@given(st.text())
def test_retry_after_survives_any_text(text):
    wait = read_retry_after(text, NOW)
    assert wait is None or timedelta(0) <= wait <= LONGEST_RETRY_AFTER


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://localhost:8443", "localhost:8443"),
        ("https://gateway.example/", "gateway.example:443"),
        ("https://[2001:db8::1]:8443/", "[2001:db8::1]:8443"),
        ("HTTPS://192.0.2.7:1", "192.0.2.7:1"),
    ],
)
def test_a_gateways_address_is_read(url, shown):
    assert str(parse_endpoint(url, "https")) == shown


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:8443",
        "https://",
        "https://user:secret@localhost",
        "https://localhost/path",
        "https://localhost?q",
        "https://localhost:0",
        "https://localhost:99999",
        "https://a..b",
        f"https://{'a' * 64}.example",
        "https://a b",
    ],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match=r"."):
        parse_endpoint(url, "https")


@given(st.text())
def test_no_text_breaks_the_address_reader(text):
    try:
        parse_endpoint(text, "https")
    except ValueError:
        return
