"""The words that everybody shares: names, states, refusals, events."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.model import events, refusals
from provisioning.model.credentials import (
    CREDENTIAL_MOVES,
    DEVICE_MOVES,
    CredentialState,
    DeviceState,
    move_credential,
    move_device,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, PskIdentity, Serial, TrustDomain

ALPHABET = string.ascii_letters + string.digits + ".-"
device_ids = st.builds(
    str.__add__,
    st.sampled_from(string.ascii_letters + string.digits),
    st.text(ALPHABET, max_size=63),
)


@given(device_ids)
def test_a_device_id_is_what_it_was(text):
    assert str(DeviceId.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "a_b", "a:b", "-a", ".a", "x" * 65, "a/b", "a b", "a#1", "ä", "a\n", "a\0"],
)
def test_other_device_ids_are_refused(text):
    with pytest.raises(PeerError) as refused:
        DeviceId.parse(text)
    assert refused.value.refusal is refusals.DEVICE_ID_MALFORMED


@given(st.text(max_size=80))
def test_a_device_id_is_parsed_or_refused(text):
    try:
        found = DeviceId.parse(text)
    except PeerError:
        return
    assert set(found.text) <= set(ALPHABET)


@given(device_ids, st.integers(1, 999_999_999))
def test_a_psk_identity_is_what_it_was(text, generation):
    identity = PskIdentity(DeviceId.parse(text), generation)
    assert PskIdentity.from_wire(identity.wire) == identity
    assert PskIdentity.parse(str(identity)) == identity


@pytest.mark.parametrize(
    "octets",
    [b"", b"pump-7", b"pump-7#", b"pump-7#0", b"pump-7#01", b"#1", b"pump_7#1",
     b"pump-7#1\0", b"pump-7#-1", "pümp#1".encode(), b"a" * 200 + b"#1",
     b"pump-7#1234567890"],
)  # fmt: skip
def test_what_is_no_psk_identity_is_not_ours(octets):
    assert PskIdentity.from_wire(octets) is None


@given(st.binary(max_size=200))
def test_any_octets_are_an_identity_or_not_ours(octets):
    identity = PskIdentity.from_wire(octets)
    assert identity is None or identity.wire == octets


@given(st.integers(1, 2**160 - 1))
def test_a_serial_prints_as_openssl_does(number):
    text = Serial(number).hex
    assert len(text) % 2 == 0
    assert text == text.lower()
    assert Serial.parse(text.upper()).number == number


@given(st.binary(min_size=16, max_size=16))
def test_a_random_serial_is_positive_and_has_sixteen_octets(octets):
    serial = Serial.from_random(octets)
    assert len(serial.hex) == 32
    assert 0 < serial.number < 2**127


@pytest.mark.parametrize("text", ["", "0", "00", "xyz", "-1", "1" * 41])
def test_other_serials_are_refused(text):
    with pytest.raises(PeerError):
        Serial.parse(text)


@pytest.mark.parametrize("text", ["", "A.test", "a b", "a/b", "-a", "x" * 256])
def test_other_trust_domains_are_refused(text):
    with pytest.raises(PeerError):
        TrustDomain.parse(text)


def test_a_spiffe_id_has_the_device_in_its_path():
    domain = TrustDomain.parse("pumps.example")
    assert domain.device(DeviceId("p-1")) == "spiffe://pumps.example/device/p-1"


def test_only_readmission_brings_a_revoked_device_back():
    assert DEVICE_MOVES[DeviceState.REVOKED] == {
        DeviceState.REGISTERED,
        DeviceState.RETIRED,
    }
    with pytest.raises(PeerError):
        move_device(DeviceState.REVOKED, DeviceState.ENROLLED)
    with pytest.raises(PeerError):
        move_device(DeviceState.RETIRED, DeviceState.ENROLLED)


def test_a_revoked_credential_stays_revoked():
    assert CREDENTIAL_MOVES[CredentialState.REVOKED] == frozenset()
    for state in CredentialState:
        with pytest.raises(PeerError):
            move_credential(CredentialState.REVOKED, state)


def test_every_state_has_its_moves():
    assert set(DEVICE_MOVES) == set(DeviceState)
    assert set(CREDENTIAL_MOVES) == set(CredentialState)


@pytest.mark.parametrize("refusal", refusals.TABLE.values(), ids=lambda r: r.code)
def test_a_refusal_says_who_must_do_what_in_every_protocol(refusal):
    assert refusal.code == refusal.code.lower()
    assert 400 <= refusal.http < 600
    klass, _, detail = refusal.coap.partition(".")
    assert klass in "45"
    assert len(detail) == 2
    assert 1 <= refusal.mqtt311 <= 5
    assert 0x80 <= refusal.mqtt5 <= 0xA2
    assert refusal.sentence.endswith(".")
    assert len(refusal.sentence) > 30


def test_an_unknown_psk_identity_has_no_refusal_of_its_own():
    # It fails in the handshake, as a wrong key does.
    assert "psk_unknown" not in refusals.TABLE


def test_an_event_with_a_field_that_the_table_lacks_is_a_bug():
    events.check(events.ISSUED, {"device": "pump-7"})
    with pytest.raises(KeyError):
        events.check(events.ISSUED, {"token": "secret"})
    with pytest.raises(KeyError):
        events.check("no_such_event", {})


def test_every_row_of_both_tables_is_used():
    """A row that nobody raises or tells is dead; the sources say who does."""
    root = Path(__file__).parents[2]
    used: set[str] = set()
    for folder in ("provisioning", "gateway", "device_agent"):
        for path in (root / folder).rglob("*.py"):
            if path.name in ("refusals.py", "events.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Name):
                    used.add(node.id)
                elif isinstance(node, ast.Attribute):
                    used.add(node.attr)
    for module in (refusals, events):
        rows = {name for name in vars(module) if name.isupper() and name[0] != "_"}
        rows -= {"TABLE"}
        assert rows - used == set(), module.__name__
