"""Problem details: every refusal can be told, and nothing told can hurt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.model.refusals import AWAY, TABLE
from provisioning.wire.problems import (
    MAX_DETAIL,
    MAX_PROBLEM,
    ProblemSeen,
    problem,
    problem_body,
    read_problem,
)


@pytest.mark.parametrize("refusal", TABLE.values(), ids=TABLE)
def test_every_refusal_is_told_and_understood(refusal):
    members = problem(refusal)
    assert members["status"] == refusal.http
    assert members["title"]
    assert read_problem(problem_body(members)) == ProblemSeen(
        refusal.code, refusal.sentence, refusal.retryable
    )


def test_a_detail_a_wait_and_an_incident_travel_along():
    members = problem(AWAY, "The HSM is away.", retry_after_s=2.2, incident="ab12cd34")
    assert members["incident"] == "ab12cd34"
    assert members["detail"] == "The HSM is away."
    seen = read_problem(problem_body(members))
    assert seen == ProblemSeen("away", "The HSM is away.", True, 3.0)


def test_a_detail_cannot_play_with_a_terminal():
    body = problem_body(problem(AWAY, "one\ntwo\x1b[2Jthree\u202e" + "x" * 9_999))
    seen = read_problem(body)
    assert seen is not None
    assert seen.detail.startswith("one two [2Jthree ")
    assert len(seen.detail) <= MAX_DETAIL


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502 Bad Gateway</html>",
        b"[]",
        b"null",
        b'"away"',
        b"{}",
        b'{"code": 5}',
        b'{"code": "Away With Spaces"}',
        b'{"code": "away"' + b" " * MAX_PROBLEM + b"}",
        b"[" * 10_000,
        b'{"code": ' + b"9" * 5_000 + b"}",
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_problem_is_none(body):
    assert read_problem(body) is None


@pytest.mark.parametrize(
    ("wait", "seen"),
    [
        ("5", 5.0),
        ("0", 0.0),
        ("1e9", 86_400.0),
        ("-1", None),
        ("NaN", None),
        ("Infinity", None),
        ('"5"', None),
        ("true", None),
        ("9" * 400, None),
    ],
)
def test_a_wait_is_a_number_of_seconds_or_nothing(wait, seen):
    found = read_problem(b'{"code": "away", "retry_after": ' + wait.encode() + b"}")
    assert found == ProblemSeen("away", "", None, seen)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["code", "detail", "retryable", "retry_after"])


@given(
    st.dictionaries(keys, values | st.just("away")).map(
        lambda d: json.dumps(d).encode()
    )
    | st.binary(max_size=100)
)
def test_any_body_is_a_problem_or_none(body):
    seen = read_problem(body)
    if seen is not None:
        assert seen.detail.isprintable()
        assert seen.retryable in {None, True, False}
