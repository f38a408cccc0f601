"""What is written or asked outside fails twice: it did not happen; the answer was lost.

Each row of the table is one such write of an enrolment. The device then does what
devices do: it sends the same request again.
"""

from __future__ import annotations

import asyncio

import pytest
from ca_house import DAY, PUMP, House, made_house, make_csr, serial_of

from provisioning.ca.recover import recover
from provisioning.enrol.admission import TokenProof
from provisioning.model.credentials import CredentialState
from provisioning.model.errors import OutcomeUnknown, PeerError, Unavailable, Unusable

WRITES = {
    "the intent is recorded": ("registry", "admit"),
    "the token signs": ("token", "use"),
    "the outcome is recorded": ("registry", "finish"),
}


@pytest.fixture
async def house(tmp_path):
    async with made_house(tmp_path) as made:
        yield made


async def request(house: House):
    """A request that can be sent again and again: same token, same CSR."""
    secret, csr = await house.new_token(), make_csr()
    return csr, TokenProof(secret.hash, PUMP)


async def token_uses(house: House) -> int:
    (row,) = await house.registry.list_tokens()
    return row.used


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("write", WRITES)
async def test_the_retry_after_a_loss_gets_the_one_certificate(
    house: House, write: str, how: str
):
    part, call = WRITES[write]
    getattr(house, part).lose[call] = [how]
    csr, proof = await request(house)
    enrolment = house.enrolment()
    try:
        der = await enrolment.simple_enroll(csr, proof)
    except Unavailable:
        der = await enrolment.simple_enroll(csr, proof)
    (known,) = await house.certificates()
    assert known.serial == serial_of(der)
    assert await house.registry.unresolved_intents() == []
    assert await token_uses(house) == 1


@pytest.mark.parametrize("how", ["before", "after"])
async def test_an_outcome_that_stays_unknown_is_never_released(house: House, how: str):
    """The registry loses the same record twice, and is then asked by the device."""
    house.registry.lose["finish"] = ["after", how]
    csr, proof = await request(house)
    enrolment = house.enrolment()
    with pytest.raises(Unavailable):
        await enrolment.simple_enroll(csr, proof)
    der = await enrolment.simple_enroll(csr, proof)
    assert [known.serial for known in await house.certificates()] == [serial_of(der)]


async def test_a_loss_of_the_void_too_is_made_good_by_the_retry(house: House):
    house.token.lose["use"] = ["after"]
    house.registry.lose["void"] = ["before"]
    csr, proof = await request(house)
    enrolment = house.enrolment()
    with pytest.raises(Unavailable):
        await enrolment.simple_enroll(csr, proof)
    assert len(await house.registry.unresolved_intents()) == 1
    der = await enrolment.simple_enroll(csr, proof)
    assert [known.serial for known in await house.certificates()] == [serial_of(der)]
    assert await house.registry.unresolved_intents() == []


async def test_while_the_token_is_away_the_enrolment_token_is_not_used_up(
    house: House,
):
    csr, proof = await request(house)
    house.token.away = True
    enrolment = house.enrolment()
    for _ in range(3):
        with pytest.raises(Unavailable):
            await enrolment.simple_enroll(csr, proof)
    assert await token_uses(house) == 0
    house.token.away = False
    assert await enrolment.simple_enroll(csr, proof)
    assert await token_uses(house) == 1


async def test_a_kill_between_intent_and_outcome_is_recovered_at_start(house: House):
    """The process dies while the token signs; its successor finds the intent."""
    csr, proof = await request(house)
    house.token.held["use"] = asyncio.Event()

    async def killed() -> None:
        async with asyncio.TaskGroup() as tasks:
            await house.enrolment(tasks).simple_enroll(csr, proof)

    process = asyncio.create_task(killed())
    await house.token.reached.wait()
    process.cancel()
    with pytest.raises(asyncio.CancelledError):
        await process
    house.token.held.clear()

    successor = house.enrolment()
    with pytest.raises(PeerError) as caught:
        await successor.simple_enroll(csr, proof)
    assert caught.value.refusal.code == "in_progress", "without recovery it would wait"
    (found,) = await recover(house.registry, house.clock())
    assert found.device == PUMP
    der = await successor.simple_enroll(csr, proof)
    (known,) = await house.certificates()
    assert known.serial == serial_of(der) != found.serial


async def test_a_dead_intent_is_found_dead_without_a_restart_too(house: House):
    csr, proof = await request(house)
    house.token.lose["use"] = ["after"]
    house.registry.lose["void"] = ["before"]
    with pytest.raises(Unavailable):
        await house.enrolment().simple_enroll(csr, proof)
    other_process = house.enrolment()
    with pytest.raises(PeerError):
        await other_process.simple_enroll(csr, proof)
    house.clock.now += house.config.enrolment.intent_stale * 2
    assert await other_process.simple_enroll(csr, proof)


async def test_a_certificate_whose_intent_was_voided_is_not_released(house: House):
    """Another process took the intent for dead while the token was slow."""
    csr, proof = await request(house)
    house.token.held["use"] = asyncio.Event()
    slow = asyncio.create_task(house.enrolment().simple_enroll(csr, proof))
    await house.token.reached.wait()
    held = house.token.held.pop("use")
    await recover(house.registry, house.clock())
    der = await house.enrolment().simple_enroll(csr, proof)
    held.set()
    with pytest.raises(Unavailable):
        await slow
    assert [known.serial for known in await house.certificates()] == [serial_of(der)]


async def test_recovery_leaves_what_others_are_working_on(house: House):
    csr, proof = await request(house)
    house.token.held["use"] = asyncio.Event()
    working = asyncio.create_task(house.enrolment().simple_enroll(csr, proof))
    await house.token.reached.wait()
    before = house.clock() - DAY
    assert await recover(house.registry, house.clock(), older_than=before) == []
    house.token.held.pop("use").set()
    assert await working


async def test_no_serial_is_used_twice_whatever_is_lost(house: House):
    seen = []
    inner = house.registry.admit

    async def watched(ask, decide):
        decision = await inner(ask, decide)
        seen.append(decision.serial)
        return decision

    house.registry.admit = watched
    csr, proof = await request(house)
    house.token.lose["use"] = ["before", "after", "before", "after"]
    enrolment = house.enrolment()
    for _ in range(4):
        with pytest.raises(Unavailable):
            await enrolment.simple_enroll(csr, proof)
    await enrolment.simple_enroll(csr, proof)
    assert len(seen) == len(set(seen)) == 5


async def test_a_certificate_that_is_not_what_was_intended_is_not_recorded(
    house: House,
):
    """A token that signs with another key: the twin is every other test here."""
    inner = house.token.use

    async def another_key(label, work):
        return await inner("factory", work)

    house.token.use = another_key
    csr, proof = await request(house)
    with pytest.raises(Unusable):
        await house.enrolment().simple_enroll(csr, proof)
    assert await house.certificates() == []
    assert await token_uses(house) == 0


async def test_the_double_loses_as_it_says(house: House):
    """The harm itself: without these losses the tests above would prove nothing."""
    house.registry.lose["next_crl_number"] = ["before", "after"]
    with pytest.raises(Unavailable):
        await house.registry.next_crl_number("issuing")
    with pytest.raises(OutcomeUnknown):
        await house.registry.next_crl_number("issuing")
    assert await house.registry.next_crl_number("issuing") == 2
    csr, proof = await request(house)
    der = await house.enrolment().simple_enroll(csr, proof)
    await house.connect(der)
    (known,) = await house.certificates()
    assert known.state is CredentialState.ACTIVE
