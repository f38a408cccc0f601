"""Slots on a disk that loses power: one credential is always whole."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_agent import files, keys
from device_agent.carry import held_psk
from device_agent.clock import Clock
from device_agent.home import Belonging, Home
from device_agent.plan import Found
from device_agent.sessions import Sessions, tag_of
from device_agent.slots import Meta, Pending, Slots, read_psk, write_psk
from provisioning.model.errors import ConfigError, Unusable
from provisioning.model.ids import DeviceId
from provisioning.tls.context import ClientCertificate, ClientPsk

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PUMP = DeviceId.parse("pump-7")
PSK = ClientPsk("pump-7#2", b"k" * 32)


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches the power."""


class FallingDisk(files.Disk):
    """Does `writes` of its writes and loses power: before the next, or in its midst."""

    def __init__(self, writes, torn):
        self.left = writes
        self.torn = torn

    def _spend(self):
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def write(self, path, content):
        if self.left == 0 and self.torn:
            super().write(path, content[: len(content) // 2])
        self._spend()
        super().write(path, content)

    def rename(self, path, to):
        self._spend()
        super().rename(path, to)

    def sync(self, folder):
        self._spend()
        super().sync(folder)

    def make_folder(self, folder):
        self._spend()
        super().make_folder(folder)

    def remove(self, folder):
        self._spend()
        super().remove(folder)


@pytest.fixture(scope="module")
def pairs(authority):
    """Two keys with requests, and a certificate for each."""
    made = []
    for _ in range(2):
        device = authority.device("pump-7")
        _, request = keys.make_key_and_csr(PUMP)
        made.append((Pending(device.key_pem, request), device.pem))
    return made


def meta(number, mode="cert"):
    return Meta(number, mode, 0.5, NOW)


def slots_in(folder, disk=None):
    slots = Slots(folder, disk or files.Disk())
    slots.make()
    return slots


def fill(slots, slot, number, pair):
    pending, chain = pair
    slots.prepare(slot, meta(number), pending)
    held, device = slots.received(slot, chain)
    assert device == "pump-7"
    slots.keep(held, chain, NOW)
    return held


def test_a_slot_gives_back_what_was_put_in(tmp_path, pairs):
    slots = slots_in(tmp_path)
    held = fill(slots, "a", 1, pairs[0])
    assert slots.find() == Found(None, (held,), ())
    slots.activate("a")
    assert slots.find() == Found("a", (held,), ())
    credential = slots.credential(held)
    assert credential == ClientCertificate(pairs[0][1], pairs[0][0].key_pem)


def test_a_request_is_the_same_octets_when_it_is_made_again(tmp_path, pairs):
    slots = slots_in(tmp_path)
    slots.prepare("a", meta(1), pairs[0][0])
    assert slots_in(tmp_path).pending("a") == pairs[0][0]
    assert slots.find().asked == (("a", 1),)


PSK_HELD = held_psk(PSK, "b", 2, 0.5)
STEPS = {
    "prepare": lambda slots, pair: slots.prepare("b", meta(2), pair[0]),
    "fill": lambda slots, pair: fill(slots, "b", 2, pair),
    "activate": lambda slots, _: slots.activate("b"),
    "discard": lambda slots, _: slots.discard("b"),
    "psk": lambda slots, _: slots.keep(PSK_HELD, write_psk(PSK), NOW),
}


@pytest.mark.parametrize("torn", [False, True], ids=["between", "torn"])
@pytest.mark.parametrize("name", STEPS)
def test_power_cut_after_any_prefix_of_writes_leaves_the_active_one(
    tmp_path, pairs, name, torn
):
    for writes in range(60):
        folder = tmp_path / f"{writes}"
        folder.mkdir(mode=0o700)
        slots = slots_in(folder)
        held = fill(slots, "a", 1, pairs[0])
        slots.activate("a")
        if name in ("activate", "discard"):
            fill(slots, "b", 2, pairs[1])
        before = slots.find()
        falling = slots_in(folder, FallingDisk(writes, torn))
        try:
            STEPS[name](falling, pairs[1])
        except PowerCut:
            cut = True
        else:
            cut = False
        found = slots_in(folder).find()
        assert held in found.held, "the active credential is untouched"
        assert found.active in ("a", "b")
        assert found.active in [one.slot for one in found.held], "and it is whole"
        if not cut:
            assert found != before or name == "discard"
            assert writes > 2
            return
        # And whatever was left, the same step can be done again.
        STEPS[name](slots_in(folder), pairs[1])
    pytest.fail("it never came to an end")


def test_the_active_slot_is_never_written_over(tmp_path, pairs):
    """An `active` that did not reach the disk is written again first."""
    slots = slots_in(tmp_path)
    fill(slots, "a", 1, pairs[0])
    slots.activate("a")
    fill(slots, "b", 2, pairs[1])  # proven, but `active` could not be written
    slots.prepare("a", meta(3), pairs[0][0])
    assert slots.active() == "b"
    with pytest.raises(Unusable, match="active"):
        slots.discard("b")


def test_one_damaged_slot_does_not_hide_the_other(tmp_path, pairs):
    slots = slots_in(tmp_path)
    fill(slots, "a", 1, pairs[0])
    held = fill(slots, "b", 2, pairs[1])
    slots.activate("a")
    (tmp_path / "slots/a/chain.pem").write_bytes(b"nothing")
    assert slots.find() == Found("a", (held,), ())
    (tmp_path / "slots/b/chain.pem").write_bytes(b"nothing")
    with pytest.raises(Unusable, match="damaged"):
        slots.find()


def test_a_certificate_for_another_key_is_damage(tmp_path, pairs):
    slots = slots_in(tmp_path)
    fill(slots, "a", 1, pairs[0])
    (tmp_path / "slots/a/chain.pem").write_bytes(pairs[1][1])
    with pytest.raises(Unusable, match="another key"):
        slots.find()


@pytest.mark.parametrize("name", ["key.pem", "chain.pem", "meta.json", "request.der"])
def test_a_file_that_others_may_read_is_refused(tmp_path, pairs, name):
    slots = slots_in(tmp_path)
    slots.prepare("a", meta(1), pairs[0][0])
    if name != "request.der":
        slots.keep(slots.received("a", pairs[0][1])[0], pairs[0][1], NOW)
    (tmp_path / "slots/a" / name).chmod(0o640)
    with pytest.raises(Unusable, match="chmod 600"):
        slots.find()


def test_a_slot_that_others_may_enter_is_refused(tmp_path, pairs):
    slots = slots_in(tmp_path)
    fill(slots, "a", 1, pairs[0])
    (tmp_path / "slots/a").chmod(0o750)
    with pytest.raises(Unusable, match="chmod 700"):
        slots.find()


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path, pairs):
    slots = slots_in(tmp_path)
    fill(slots, "a", 1, pairs[0])
    key = tmp_path / "slots/a/key.pem"
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unusable):
        slots.find()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_content_of_any_state_file_breaks_the_agent(tmp_path, octets):
    home = Home(tmp_path / "state")
    home.open()
    home.belong(Belonging("https://localhost", PUMP, "cert"))
    for name, read in (
        ("active", home.slots.find),
        ("gateway.json", home.belonging),
        ("anchors.pem", home.clock),
        ("session", home.sessions),
        ("clock", home.clock),
        ("last.json", home.last),
    ):
        path = home.folder / name
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(octets)
        path.chmod(0o600)
        try:
            read()
        except Unusable as error:
            assert name in str(error)  # noqa: PT017 - both outcomes are right
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(kept)


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_no_content_breaks_the_psk_reader(octets):
    try:
        read_psk(octets)
    except (ValueError, RecursionError):
        return


@pytest.mark.parametrize("key", ["6b" * 8, "6b" * 65, "zz", ""])
def test_a_psk_of_the_wrong_size_is_refused_without_its_key(key):
    content = json.dumps({"identity": "pump-7#1", "key": key}).encode()
    with pytest.raises(ValueError, match="key") as refused:
        read_psk(content)
    assert not key or key not in str(refused.value)


# Clock ------------------------------------------------------------------------------
def test_the_clock_is_never_earlier_than_its_floor(tmp_path):
    woken = datetime(1970, 1, 1, 0, 5, tzinfo=UTC)
    clock = Clock(tmp_path / "clock", files.Disk(), lambda: woken)
    assert clock.now() == woken
    clock.raise_to(NOW)
    assert clock.now() == NOW
    again = Clock(tmp_path / "clock", files.Disk(), lambda: woken)
    assert again.now() == NOW
    later = NOW + timedelta(days=1)
    right = Clock(tmp_path / "clock", files.Disk(), lambda: later)
    assert right.now() == later


def test_the_floor_only_grows(tmp_path):
    clock = Clock(tmp_path / "clock", files.Disk(), lambda: NOW - timedelta(days=9))
    clock.raise_to(NOW)
    clock.raise_to(NOW - timedelta(days=1))
    assert clock.now() == NOW


def test_an_absurd_time_does_not_raise_the_floor(tmp_path):
    clock = Clock(tmp_path / "clock", files.Disk(), lambda: NOW)
    clock.raise_to(datetime(9999, 1, 1, tzinfo=UTC))
    assert clock.now() == NOW


# Sessions ---------------------------------------------------------------------------
def test_a_session_survives_a_restart_and_is_offered_once(tmp_path):
    home = Belonging("https://localhost:1", PUMP, "psk")
    tag = tag_of(ClientPsk("pump-7#1", b"k" * 32))
    Sessions(tmp_path / "session", files.Disk()).put(home.gateway, tag, b"ticket")
    again = Sessions(tmp_path / "session", files.Disk())
    assert again.take(home.gateway, "another") is None
    assert again.take(home.gateway, tag) == b"ticket"
    assert again.take(home.gateway, tag) is None


# Files that a person names ------------------------------------------------------------
def test_a_secret_that_others_may_read_is_refused(tmp_path):
    secret = tmp_path / "token"
    secret.write_bytes(b"x")
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        files.read_secret(secret)
    secret.chmod(0o600)
    assert files.read_secret(secret) == b"x"


def test_secrets_do_not_show(pairs):
    shown = repr(pairs[0][0]) + repr(ClientPsk("pump-7#1", b"k" * 32))
    assert "PRIVATE" not in shown
    assert "kkkk" not in shown
