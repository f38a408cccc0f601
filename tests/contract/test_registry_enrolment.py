"""Admit, sign, finish: an intent before, an outcome after, and nothing twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from registry_kit import (
    DAY,
    NOW,
    OPERATOR,
    PUMP,
    SERVERS,
    VALVE,
    Request,
    admit,
    certificate,
    connect,
    facts_of,
    issue,
    new_database,
    new_token,
    opened,
    state_of,
)

from provisioning.model.credentials import (
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.errors import OutcomeUnknown, PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import (
    DEVICE_ID_CASE,
    DEVICE_REVOKED,
    IN_PROGRESS,
    TOKEN_REFUSED,
)
from provisioning.registry.records import Repeat


@pytest.fixture(params=["sqlite", *SERVERS])
async def registry(request, tmp_path):
    async with opened(await new_database(tmp_path, request.param)) as registry:
        yield registry


async def test_a_new_device_with_a_token_is_registered_and_gets_a_pending_credential(
    registry,
):
    token = await new_token(registry)
    credential = await issue(registry, Request(token=token))

    assert credential.state is CredentialState.PENDING
    assert credential.device == PUMP
    assert credential.not_after == NOW + 30 * DAY
    view = await registry.device(PUMP)
    assert view.state is DeviceState.REGISTERED
    assert view.credentials == (credential,)
    (row,) = await registry.list_tokens()
    assert (row.id, row.used, row.uses) == ("t1", 1, 1)
    standing = await registry.standing_of_certificate(credential.serial)
    assert standing.credential == credential


async def test_a_credential_without_end_has_no_end(registry):
    credential = await issue(registry, Request(lifetime=None))

    assert credential.not_after is None
    assert await registry.sweep(NOW + 365_000 * DAY) == 0


async def test_the_facts_of_a_stranger_are_empty(registry):
    facts = await facts_of(registry, Request(token=b"unknown"))

    assert facts == replace(
        facts,
        token=None,
        standing=None,
        device_state=None,
        case_twin=None,
        spki_owner=None,
        earlier=None,
    )


async def test_the_facts_show_the_credential_that_asks(registry):
    first = await issue(registry, Request())
    await connect(registry, first)
    facts = await facts_of(registry, Request(key="next", credential=first.id))

    assert facts.standing.credential.id == first.id
    assert facts.standing.credential.state is CredentialState.ACTIVE
    assert facts.device_state is DeviceState.ENROLLED
    assert facts.spki_owner is None


async def test_a_token_of_one_use_lets_only_one_of_two_in_at_the_same_moment(registry):
    token = await new_token(registry)

    def let_in(request):
        def decide(facts):
            if facts.token.used >= facts.token.uses:
                raise PeerError(TOKEN_REFUSED)
            return request.intent(facts)

        return registry.admit(request.ask(), decide)

    devices = [DeviceId.parse(f"twin-{n}") for n in range(5)]
    results = await asyncio.gather(
        *(let_in(Request(device, key=device, token=token)) for device in devices),
        return_exceptions=True,
    )
    refused = [one for one in results if isinstance(one, PeerError)]
    assert len(refused) == 4
    assert {one.refusal for one in refused} == {TOKEN_REFUSED}
    (row,) = await registry.list_tokens()
    assert row.used == 1


async def test_two_new_devices_that_differ_only_in_case_are_not_both_let_in(registry):
    upper = Request(DeviceId.parse("PUMP-7"), key="other")
    results = await asyncio.gather(
        admit(registry, Request()), admit(registry, upper), return_exceptions=True
    )
    assert results[0].device == PUMP
    assert results[1].refusal is DEVICE_ID_CASE
    facts = await facts_of(registry, upper)
    assert facts.case_twin == "pump-7"
    assert facts.device_state is None


async def test_a_key_of_another_device_is_seen_while_it_is_still_being_signed(registry):
    await admit(registry, Request(key="shared"))
    facts = await facts_of(registry, Request(VALVE, key="shared"))
    assert facts.spki_owner == PUMP


async def test_a_key_of_another_device_is_seen_after_its_certificate_has_ended(
    registry,
):
    await issue(registry, Request(key="shared"))
    await registry.revoke_device(PUMP, RevocationReason.UNSPECIFIED, NOW, OPERATOR)

    assert (await facts_of(registry, Request(VALVE, key="shared"))).spki_owner == PUMP
    assert (await facts_of(registry, Request(PUMP, key="shared"))).spki_owner is None


async def test_the_same_request_while_it_is_worked_on_finds_the_open_intent(registry):
    def once(request):
        def decide(facts):
            if facts.earlier is not None and not facts.earlier.resolved:
                raise PeerError(IN_PROGRESS)
            return request.intent(facts)

        return registry.admit(request.ask(), decide)

    together = await asyncio.gather(
        once(Request()), once(Request()), return_exceptions=True
    )
    assert together[1].refusal is IN_PROGRESS
    facts = await facts_of(registry, Request())
    assert facts.earlier.intent_id == together[0].id
    assert (facts.earlier.resolved, facts.earlier.credential) == (False, None)


async def test_the_same_request_gets_the_same_certificate_until_it_is_proven(registry):
    def again(request):
        def decide(facts):
            earlier = facts.earlier
            if earlier is None:
                return request.intent(facts)
            return Repeat(earlier.credential, earlier.certificate_der)

        return registry.admit(request.ask(), decide)

    request = Request()
    credential = await issue(registry, request)
    for _ in range(2):
        repeat = await again(request)
        assert repeat.certificate_der == certificate(request)
        assert repeat.credential == credential

    await connect(registry, credential)
    assert (await facts_of(registry, request)).earlier is None


async def test_a_second_unproven_certificate_takes_the_first_ones_place(registry):
    first = await issue(registry, Request(key="first"))
    other_line = await issue(registry, Request(key="board", line="idevid"))
    second = await issue(registry, Request(key="second"))

    assert await state_of(registry, first) == "superseded"
    assert await state_of(registry, other_line) == "pending"
    assert await state_of(registry, second) == "pending"
    kinds = [change.kind for change in await registry.changes_after(0)]
    assert kinds == ["issued", "issued", "credential", "issued"]


async def test_an_unproven_certificate_never_ends_the_proven_one(registry):
    old = await issue(registry, Request(key="old"))
    await connect(registry, old, times=3)
    await issue(registry, Request(key="new"))

    assert await state_of(registry, old) == "active"


async def test_a_voided_intent_gives_the_tokens_use_back(registry):
    token = await new_token(registry)
    intent = await admit(registry, Request(token=token))
    assert [one.id for one in await registry.unresolved_intents()] == [intent.id]
    assert await registry.unresolved_intents(older_than=NOW) == []

    assert await registry.void(intent.id, "the HSM was away", NOW)
    assert not await registry.void(intent.id, "again", NOW)

    (row,) = await registry.list_tokens()
    assert row.used == 0
    assert await registry.unresolved_intents() == []
    assert (await facts_of(registry, Request(token=token))).earlier is None
    audit = await registry.audit_after()
    assert audit[-1].event == "intent_voided"
    assert audit[-1].fields["why"] == "the HSM was away"


async def test_a_certificate_whose_intent_was_voided_meanwhile_is_not_released(
    registry,
):
    intent = await admit(registry, Request())
    await registry.void(intent.id, "found at start", NOW)
    with pytest.raises(OutcomeUnknown):
        await registry.finish(intent, b"certificate", NOW)
    assert (await registry.device(PUMP)).credentials == ()


async def test_a_certificate_whose_device_was_revoked_meanwhile_is_not_released(
    registry,
):
    token = await new_token(registry)
    intent = await admit(registry, Request(token=token))
    await registry.revoke_device(PUMP, RevocationReason.KEY_COMPROMISE, NOW, OPERATOR)
    with pytest.raises(PeerError) as caught:
        await registry.finish(intent, b"certificate", NOW)
    assert caught.value.refusal is DEVICE_REVOKED
    assert await registry.unresolved_intents() == []


async def test_a_void_after_the_certificate_was_recorded_changes_nothing(registry):
    intent = await admit(registry, Request())
    credential = await registry.finish(intent, b"certificate", NOW)
    assert not await registry.void(intent.id, "its answer was lost", NOW)
    assert await state_of(registry, credential) == "pending"


async def test_finishing_twice_records_once_and_only_the_same_certificate(registry):
    intent = await admit(registry, Request())
    credential = await registry.finish(intent, b"certificate", NOW)
    assert await registry.finish(intent, b"certificate", NOW) == credential
    with pytest.raises(OutcomeUnknown):
        await registry.finish(intent, b"another", NOW)
    assert len((await registry.device(PUMP)).credentials) == 1


async def test_finishing_an_intent_that_was_never_recorded_releases_nothing(registry):
    intent = replace(Request().intent(await facts_of(registry, Request())), id=77)
    with pytest.raises(OutcomeUnknown):
        await registry.finish(intent, b"certificate", NOW)


async def test_what_was_issued_is_in_the_audit_events(registry):
    credential = await issue(registry, Request())
    (event,) = await registry.audit_after()
    assert event.event == "issued"
    assert event.actor == "device pump-7"
    assert event.fields == {
        "device": "pump-7",
        "profile": "ldevid",
        "serial": credential.serial.hex,
        "auth": "token",
        "not_after": "2030-01-31T12:00:00+00:00",
    }
