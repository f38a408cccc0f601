"""Each kind of fault that a token can have, and what its callers are told."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from hsm_sim.faults import Faults, ckr, open_faulty_token
from hsm_sim.tokens import make_token
from provisioning.hsm.faults import TABLE, Kind
from provisioning.hsm.pin import Pin
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.model.events import check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from provisioning.hsm.login import TokenConfig
    from provisioning.hsm.pkcs11 import Pkcs11Token

DEADLINE_S = 0.4
HASTY = pytest.mark.parametrize("bench", [DEADLINE_S], indirect=True, ids=["hasty"])
"""For tests of what callers are told when the deadline is over."""

LOST = sorted(code for code, row in TABLE.items() if row.kind is Kind.LOST)
AWAY = sorted(code for code, row in TABLE.items() if row.kind is Kind.AWAY)
PIN = sorted(code for code, row in TABLE.items() if row.kind is Kind.PIN)
UNUSABLE = sorted(code for code, row in TABLE.items() if row.kind is Kind.UNUSABLE)


class Bench:
    """One token with faults below it, its keys made, its events kept."""

    def __init__(self, config: TokenConfig) -> None:
        self.config = config
        self.faults = Faults()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.came = asyncio.Event()
        self.token: Pkcs11Token

    async def open(self) -> Pkcs11Token:
        self.token = await open_faulty_token(
            self.config, self.faults, on_event=self.note
        )
        return self.token

    def note(self, name: str, fields: dict[str, Any]) -> None:
        check(name, fields)
        self.events.append((name, fields))
        self.came.set()

    async def until(self, name: str) -> None:
        while name not in [event for event, _ in self.events]:
            self.came.clear()
            await self.came.wait()

    async def sign(self) -> bytes:
        algorithm = ec.ECDSA(hashes.SHA256())
        return await self.token.use("issuing", lambda key: key.sign(b"x", algorithm))

    async def mac(self) -> bytes:
        return await self.token.hmac("psk-master", b"x")

    def opened(self) -> int:
        return self.faults.met.count("open")


@pytest.fixture
async def unopened(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(make_token(tmp_path / "hsm", deadline_s=DEADLINE_S))
    yield bench
    bench.faults.mend()
    if hasattr(bench, "token"):
        await bench.token.close()


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory) -> TokenConfig:
    """A token for the whole file, since making one takes longer than most tests."""
    config = make_token(tmp_path_factory.mktemp("hsm"), deadline_s=DEADLINE_S)

    async def make_keys() -> None:
        token = await open_token(config)
        await token.make_ec_key("issuing")
        await token.make_hmac_key("psk-master")
        await token.close()

    asyncio.run(make_keys())
    return config


@pytest.fixture(params=[10.0], ids=["patient"])
async def bench(request, with_keys: TokenConfig) -> AsyncIterator[Bench]:
    """Its keys have been found once: what goes wrong next is the call itself."""
    bench = Bench(dataclasses.replace(with_keys, deadline_s=request.param))
    await bench.open()
    await bench.sign()
    await bench.mac()
    yield bench
    bench.faults.mend()
    await bench.token.close()


# The session is lost: reopen once, then as if away -------------------------------


@pytest.mark.parametrize("code", LOST)
async def test_a_lost_session_is_opened_again_unnoticed(bench, code):
    bench.faults.before("sign", ckr(code))
    bench.faults.before("mac", ckr(code))
    assert await bench.sign()
    assert await bench.mac()
    assert bench.opened() == 3
    assert bench.events == []


async def test_work_runs_again_from_its_start_when_the_session_was_lost(bench):
    runs = []

    def work(key):
        runs.append(len(runs))
        return key.sign(b"x", ec.ECDSA(hashes.SHA256())), runs[-1]

    bench.faults.before("sign", ckr("SESSION_CLOSED"))
    _, run = await bench.token.use("issuing", work)
    assert (run, runs) == (1, [0, 1])


async def test_a_session_lost_twice_leaves_a_signature_unknown(bench):
    bench.faults.before("sign", ckr("SESSION_CLOSED"), ckr("SESSION_CLOSED"))
    with pytest.raises(OutcomeUnknown, match="a signature by issuing"):
        await bench.sign()
    await bench.until("token_back")
    assert await bench.sign()


async def test_a_signature_that_was_not_asked_for_again_is_not_unknown(bench):
    """The lost session made no signature, and the second run did not come so far."""
    bench.faults.before("sign", ckr("SESSION_CLOSED"))
    bench.faults.before("find_ec", ckr("DEVICE_REMOVED"))
    with pytest.raises(Unavailable):
        await bench.sign()
    assert await eventually(bench.sign)


async def test_an_hmac_is_never_of_unknown_outcome(bench):
    bench.faults.before("mac", ckr("SESSION_CLOSED"), ckr("SESSION_CLOSED"))
    with pytest.raises(Unavailable):
        await bench.mac()
    assert await bench.mac()


# Away: wait and reopen by itself -----------------------------------------------


@pytest.mark.parametrize("code", [*AWAY, "VENDOR_DEFINED"])
async def test_an_answer_that_is_lost_after_asking_is_of_unknown_outcome(bench, code):
    bench.faults.after("sign", ckr(code))
    with pytest.raises(OutcomeUnknown, match="a signature by issuing"):
        await bench.sign()
    assert bench.faults.met.count("sign") == 2, "it was not asked a second time"
    assert await bench.sign(), "it is back by itself"


async def test_a_key_whose_making_was_not_answered_is_of_unknown_outcome(bench):
    bench.faults.after("make_ec", ckr("DEVICE_REMOVED"))
    with pytest.raises(OutcomeUnknown, match="the making of key root"):
        await bench.token.make_ec_key("root")
    with pytest.raises(Unusable, match="already"):
        await bench.token.make_ec_key("root")
    assert await bench.token.public_key("root"), "it happened"


async def test_a_key_whose_making_was_not_begun_is_of_unknown_outcome_too(bench):
    bench.faults.before("make_ec", ckr("DEVICE_REMOVED"))
    with pytest.raises(OutcomeUnknown, match="the making of key factory"):
        await bench.token.make_ec_key("factory")
    assert await bench.token.make_ec_key("factory"), "it had not happened"


async def test_a_short_outage_is_waited_for(bench):
    bench.faults.before("mac", ckr("DEVICE_REMOVED"))
    bench.faults.before("open", ckr("TOKEN_NOT_PRESENT"))
    assert await bench.mac()
    assert [name for name, _ in bench.events] == ["token_away", "token_back"]
    assert bench.events[0][1]["why"].startswith("DEVICE_REMOVED")


@HASTY
async def test_whoever_waits_past_the_deadline_is_told_when_to_come_back(bench):
    bench.faults.away(ckr("DEVICE_REMOVED"))
    with pytest.raises(Unavailable) as caught:
        await bench.mac()
    assert caught.value.what == "HSM"
    assert caught.value.retry_after_s >= 1
    assert bench.token.trouble is not None
    name, fields = bench.events[0]
    assert (name, fields["what"]) == ("token_away", "HSM")


@HASTY
async def test_a_long_outage_is_told_at_once_and_ends_by_itself(bench):
    bench.faults.away(ckr("TOKEN_NOT_PRESENT"))
    # The second is asked for after the outage began, so it ends a deadline later.
    for _ in range(2):
        with pytest.raises(Unavailable):
            await bench.mac()
    met = len(bench.faults.met)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(bench.mac(), DEADLINE_S / 4)
    assert "mac" not in bench.faults.met[met:], "the token was not bothered"
    bench.faults.mend()
    await bench.until("token_back")
    assert await bench.mac()
    assert bench.token.trouble is None


@HASTY
async def test_the_token_is_looked_for_with_longer_and_longer_pauses(bench):
    bench.faults.away(ckr("TOKEN_NOT_PRESENT"))
    before = bench.opened()
    with pytest.raises(Unavailable):
        await bench.mac()
    # In 0.4 s: after 0.1, 0.3 and no more.
    assert 1 <= bench.opened() - before <= 3


async def test_a_token_that_is_away_at_first_comes_by_itself(unopened):
    unopened.faults.away(ckr("DEVICE_REMOVED"))
    token = await unopened.open()
    assert token.trouble is not None
    unopened.faults.mend()
    await unopened.until("token_back")
    await token.make_hmac_key("psk-master")


# The PIN: never twice ----------------------------------------------------------


@pytest.mark.parametrize("code", PIN)
async def test_a_refused_pin_is_never_tried_again(bench, code):
    bench.faults.before("mac", ckr("SESSION_CLOSED"))
    bench.faults.before("open", ckr(code))
    before = bench.opened()
    with pytest.raises(Unusable, match=code):
        await bench.mac()
    for _ in range(3):
        with pytest.raises(Unusable, match=code):
            await bench.mac()
    # Longer than the first pauses are.
    await asyncio.sleep(DEADLINE_S)
    assert bench.opened() == before + 1
    assert bench.token.trouble is not None


async def test_a_token_whose_pin_is_wrong_does_not_open(unopened):
    right = unopened.config
    unopened.config = dataclasses.replace(right, pin=Pin("not the PIN"))
    with pytest.raises(Unusable, match="PIN_INCORRECT") as caught:
        await unopened.open()
    assert "not the PIN" not in str(caught.value)
    assert unopened.opened() == 1
    unopened.config = right
    await unopened.open()


# Unusable: the operator must act --------------------------------------------------


@pytest.mark.parametrize("code", UNUSABLE)
async def test_what_the_operator_must_mend_is_said_and_the_rest_goes_on(bench, code):
    bench.faults.before("sign", ckr(code))
    with pytest.raises(Unusable, match=code) as caught:
        await bench.sign()
    assert len(caught.value.why) > len(code) + 20
    assert bench.opened() == 1, "the session is as good as before"
    assert await bench.sign()


async def test_a_module_that_is_not_there_is_named_at_once(tmp_path: Path):
    bench = Bench(make_token(tmp_path / "hsm"))
    bench.config = dataclasses.replace(bench.config, module=str(tmp_path / "no.so"))
    with pytest.raises(Unusable, match="cannot be loaded"):
        await bench.open()


async def test_a_label_that_no_token_has_is_told_with_those_there_are(unopened):
    other = {"token_label": "other"}
    unopened.config = dataclasses.replace(unopened.config, **other)
    with pytest.raises(Unusable, match=r"labelled 'other'; there are: 'simulated'"):
        await unopened.open()


async def test_a_bug_below_is_told_by_name_and_does_not_hang_anybody(unopened):
    unopened.faults.before("open", TypeError("with the PIN in its text"))
    with pytest.raises(Unusable, match="TypeError") as caught:
        await unopened.open()
    assert "the PIN" not in str(caught.value)


async def test_a_session_that_cannot_be_closed_is_let_go(bench):
    bench.faults.before("close", ckr("SESSION_HANDLE_INVALID"))
    bench.faults.before("mac", ckr("SESSION_HANDLE_INVALID"))
    assert await bench.mac()


# Frozen: the loop lives -----------------------------------------------------------


@HASTY
async def test_a_frozen_module_freezes_nobody_else(bench):
    bench.faults.freeze("mac")
    call = asyncio.create_task(bench.mac())
    await bench.faults.frozen()
    turns = 0
    while not call.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 10
    with pytest.raises(Unavailable):
        await call
    assert [name for name, _ in bench.events] == ["token_away"]
    assert bench.token.trouble == "the module does not answer"


@HASTY
async def test_a_signature_in_a_frozen_module_is_of_unknown_outcome(bench):
    bench.faults.freeze("sign")
    with pytest.raises(OutcomeUnknown, match="a signature by issuing"):
        await bench.sign()


@HASTY
async def test_who_waits_behind_a_frozen_call_was_never_asked_for(bench):
    bench.faults.freeze("mac")
    first = asyncio.create_task(bench.mac())
    await bench.faults.frozen()
    behind = [asyncio.create_task(call()) for call in (bench.sign, bench.mac)]
    results = await asyncio.gather(first, *behind, return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    signed, derived = map(bench.faults.met.count, ("sign", "mac"))
    bench.faults.mend()
    assert await eventually(bench.mac)
    assert bench.faults.met.count("sign") == signed, "nobody waited for it any more"
    assert bench.faults.met.count("mac") == derived + 1, "nor for the one behind"


@HASTY
async def test_a_frozen_module_refuses_at_once_and_works_when_it_thaws(bench):
    bench.faults.freeze("mac")
    with pytest.raises(Unavailable):
        await bench.mac()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(bench.mac(), DEADLINE_S / 4)
    bench.faults.mend()
    await bench.until("token_back")
    assert await bench.mac()


@HASTY
async def test_a_signature_is_not_made_for_a_caller_who_gave_up(bench):
    started, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(key):
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return key.sign(b"x", ec.ECDSA(hashes.SHA256()))

    call = asyncio.create_task(bench.token.use("issuing", work))
    await started.wait()
    signed = bench.faults.met.count("sign")
    with pytest.raises(Unavailable):
        await call
    go.set()
    assert await eventually(bench.mac)
    assert bench.faults.met.count("sign") == signed


async def test_a_module_that_hangs_while_it_is_opened_is_away(unopened):
    unopened.faults.freeze("open")
    token = await unopened.open()
    with pytest.raises(Unavailable):
        await token.hmac("psk-master", b"x")
    unopened.faults.mend()
    await eventually(lambda: token.make_hmac_key("psk-master"))


@HASTY
async def test_a_frozen_module_does_not_keep_the_token_from_closing(bench):
    bench.faults.freeze("mac")
    call = asyncio.create_task(bench.mac())
    await bench.faults.frozen()
    async with asyncio.timeout(4 * DEADLINE_S):
        await bench.token.close()
    with pytest.raises(Unavailable):
        await call


async def eventually(call):
    """The result of a call that may be told to come back a few times."""
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.01)


# Many callers ---------------------------------------------------------------------


async def test_a_full_queue_says_so_and_empties(unopened):
    unopened.config = dataclasses.replace(unopened.config, waiting=8, deadline_s=5)
    token = await unopened.open()
    await token.make_hmac_key("psk-master")
    calls = [asyncio.create_task(unopened.mac()) for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results].count(Unavailable) == 12
    assert await unopened.mac()


@HASTY
async def test_a_slow_token_answers_everybody_in_time_or_says_so(bench):
    bench.faults.slow(DEADLINE_S / 10)
    calls = [asyncio.create_task(bench.mac()) for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    answered = [result for result in results if isinstance(result, bytes)]
    assert 1 <= len(answered) <= 10
    assert {type(result) for result in results} == {bytes, Unavailable}


@HASTY
async def test_an_answer_that_came_before_the_deadline_is_given(bench):
    """Many are done within a moment, then one hangs: they are not lost with it."""
    bench.faults.freeze("sign")
    calls = [*(bench.mac() for _ in range(20)), bench.sign()]
    *done, last = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in done} == {bytes}
    assert isinstance(last, OutcomeUnknown)
