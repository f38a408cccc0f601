"""PSKs: derived in the token, kept for minutes once proven, never shown."""

from __future__ import annotations

from datetime import timedelta

import pytest
from ca_house import DAY, Breakable, Clock
from hypothesis import given
from hypothesis import strategies as st

from hsm_sim.tokens import make_token
from provisioning.ca.hierarchy import make_hmac_key
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import Unavailable
from provisioning.model.ids import DeviceId, PskIdentity
from provisioning.psk.derive import PSK_MASTER, PskKey, derive, label
from provisioning.psk.keys import KeyCache

MINUTE = timedelta(minutes=1)
ONE = PskIdentity.parse("pump-7#1")
TWO = PskIdentity.parse("pump-7#2")
OTHER = PskIdentity.parse("valve-1#1")

_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.\-]{0,63}", fullmatch=True)
_IDENTITIES = st.builds(
    lambda name, number: PskIdentity(DeviceId.parse(name), number),
    _IDS,
    st.integers(1, 999_999_999),
)


@pytest.fixture
async def token(tmp_path):
    opened = Breakable(await open_token(make_token(tmp_path / "hsm")))
    await make_hmac_key(opened, PSK_MASTER)
    yield opened
    await opened.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(token, clock):
    return KeyCache(token, clock=clock, keep_for=5 * MINUTE, size=2)


def asked(token) -> int:
    return token.calls.count("hmac")


@given(_IDENTITIES, _IDENTITIES)
def test_no_two_identities_share_a_label(one, other):
    assert (label(one) == label(other)) == (one == other)


def test_the_label_is_what_the_design_says():
    """Devices carry keys for years: this line may never change."""
    assert label(PskIdentity.parse("pump-7#258")) == (
        b"birthmark psk v1\0pump-7\0\0\0\1\2"
    )


async def test_keys_are_32_octets_of_their_own_and_stay_the_same(token):
    found = [await derive(token, identity) for identity in (ONE, TWO, OTHER)]
    assert {len(key.octets) for key in found} == {32}
    assert len({key.octets for key in found}) == 3
    assert await derive(token, ONE) == found[0]
    assert found[0].hex == found[0].octets.hex()


async def test_no_repr_shows_a_key(token, keys):
    key = await keys.key_for(ONE)
    keys.proven(ONE)
    for shown in (repr(key), str(key), f"{key}", repr(keys), repr([key])):
        assert key.hex not in shown
        assert repr(key.octets) not in shown
    assert PskKey(b"k" * 32) == PskKey(b"k" * 32), "but they compare"


async def test_only_proven_keys_are_kept(token, keys):
    first = await keys.key_for(ONE)
    await keys.key_for(ONE)
    assert asked(token) == 2, "a stranger may have sent the identity"
    keys.proven(ONE)
    assert await keys.key_for(ONE) == first
    assert asked(token) == 2


async def test_strangers_evict_nobody(token, keys):
    await keys.key_for(ONE)
    keys.proven(ONE)
    for number in range(20):
        await keys.key_for(PskIdentity.parse(f"guess-{number}#1"))
    before = asked(token)
    await keys.key_for(ONE)
    assert asked(token) == before


async def test_keys_are_kept_for_minutes(token, keys, clock):
    await keys.key_for(ONE)
    keys.proven(ONE)
    clock.now += 4 * MINUTE
    await keys.key_for(ONE)
    keys.proven(ONE)
    clock.now += 4 * MINUTE
    await keys.key_for(ONE)
    assert asked(token) == 1, "each proof begins the minutes anew"
    clock.now += 2 * MINUTE
    await keys.key_for(ONE)
    assert asked(token) == 2


async def test_a_proof_that_comes_too_late_keeps_nothing(token, keys, clock):
    await keys.key_for(ONE)
    clock.now += DAY
    keys.expire()
    keys.proven(ONE)
    await keys.key_for(ONE)
    assert asked(token) == 2


async def test_the_least_lately_proven_goes_first(token, keys):
    for identity in (ONE, TWO, OTHER):
        await keys.key_for(identity)
        keys.proven(identity)
    await keys.key_for(TWO)
    await keys.key_for(OTHER)
    assert asked(token) == 3
    await keys.key_for(ONE)
    assert asked(token) == 4


async def test_a_device_that_is_out_is_forgotten_with_all_its_keys(token, keys):
    for identity in (ONE, OTHER):
        await keys.key_for(identity)
        keys.proven(identity)
    await keys.key_for(TWO)
    keys.forget(DeviceId.parse("pump-7"))
    keys.proven(TWO)
    for identity in (ONE, TWO):
        await keys.key_for(identity)
    assert asked(token) == 5
    await keys.key_for(OTHER)
    assert asked(token) == 5


async def test_a_token_that_is_away_is_said_so_and_kept_keys_go_on(token, keys):
    await keys.key_for(ONE)
    keys.proven(ONE)
    token.away = True
    assert await keys.key_for(ONE)
    with pytest.raises(Unavailable):
        await keys.key_for(TWO)


async def test_a_lost_answer_is_asked_for_again(token, keys):
    token.lose["hmac"] = ["after"]
    with pytest.raises(Unavailable):
        await keys.key_for(ONE)
    assert await keys.key_for(ONE)
