"""What devices answer to a rotation notice is read strictly."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mqtt.notices import (
    MAX_ANSWER,
    RotationAnswer,
    credential_notice,
    read_answer,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, Serial

TOPIC = "devices/pump-7/up/credential"
PUMP = DeviceId.parse("pump-7")


def answer(**members: object) -> bytes:
    return json.dumps(members).encode()


def test_a_rotated_certificate_and_a_rotated_psk_are_understood() -> None:
    assert read_answer(TOPIC, answer(action="rotated", serial="0aff")) == (
        RotationAnswer(PUMP, "rotated", Serial(0x0AFF), None, None)
    )
    assert read_answer(
        TOPIC, answer(action="rotated", serial=None, generation=3, extra=[1])
    ) == RotationAnswer(PUMP, "rotated", None, 3, None)


def test_a_reason_is_cut_and_made_printable() -> None:
    got = read_answer(TOPIC, answer(action="failed", reason="no\x1b[2J" + "x" * 900))
    assert got.reason is not None
    assert got.reason.startswith("no [2Jx")
    assert len(got.reason) == 256


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 2_000,
        answer(action="rotate", serial="01"),
        answer(action=["rotated"], serial="01"),
        answer(action="rotated"),
        answer(action="rotated", serial="01", generation=1),
        answer(action="rotated", serial=1),
        answer(action="rotated", serial="xyz"),
        answer(action="rotated", generation=True),
        answer(action="rotated", generation=0),
        answer(action="failed", reason="x" * MAX_ANSWER),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(payload: bytes) -> None:
    with pytest.raises(PeerError):
        read_answer(TOPIC, payload)


@given(st.text(max_size=60), st.binary(max_size=200))
def test_nonsense_is_refused_and_nothing_else_happens(
    topic: str, payload: bytes
) -> None:
    for name in (topic, TOPIC):
        with pytest.raises(PeerError):
            read_answer(name, payload)


def test_a_notice_says_until_when() -> None:
    by = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert json.loads(credential_notice(by, None)) == {
        "action": "rotate",
        "by": "2030-01-02T03:04:05Z",
        "campaign": None,
    }
