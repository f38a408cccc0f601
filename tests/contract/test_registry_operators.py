"""What operators order and ask: revocation, suspension, tokens, lists, CRL numbers."""

from __future__ import annotations

import pytest
from registry_kit import (
    DAY,
    HOUR,
    NOW,
    OPERATOR,
    PUMP,
    SERVERS,
    VALVE,
    Request,
    connect,
    facts_of,
    issue,
    new_database,
    new_token,
    opened,
    psk_standing,
    state_of,
)

from provisioning.model import events
from provisioning.model.credentials import (
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.model.refusals import (
    ARGUMENT_MALFORMED,
    CREDENTIAL_UNKNOWN,
    DEVICE_ID_CASE,
    DEVICE_REVOKED,
    DEVICE_UNKNOWN,
    STATE_NOT_ALLOWED,
    TOKEN_UNKNOWN,
)

LOST = RevocationReason.KEY_COMPROMISE


@pytest.fixture(params=["sqlite", *SERVERS])
async def registry(request, tmp_path):
    async with opened(await new_database(tmp_path, request.param)) as registry:
        yield registry


async def refusal_of(call) -> object:
    with pytest.raises(PeerError) as caught:
        await call
    return caught.value.refusal


async def test_a_revoked_device_is_out_with_everything_it_holds(registry):
    old = await issue(registry, Request(key="old"))
    await connect(registry, old, times=2)
    new = await issue(registry, Request(key="new"))
    await registry.create_psk(PUMP, NOW, OPERATOR)
    bystander = await issue(registry, Request(VALVE, key="valve"))
    before = await registry.latest_seq()

    revoked = await registry.revoke_device(PUMP, LOST, NOW + HOUR, OPERATOR)

    assert set(revoked.serials) == {old.serial, new.serial}
    assert revoked.identities == (PskIdentity(PUMP, 1),)
    assert revoked.seq == await registry.latest_seq()
    for credential in (old, new, (await psk_standing(registry, 1)).credential):
        assert await state_of(registry, credential) == "revoked"
    standing = await registry.standing_of_certificate(old.serial)
    assert standing.device_state is DeviceState.REVOKED
    assert standing.credential.state is CredentialState.REVOKED
    assert await state_of(registry, bystander) == "pending"

    told = await registry.changes_after(before)
    assert [change.kind for change in told] == ["credential"] * 3 + ["device"]
    assert {change.device for change in told} == {PUMP}
    assert told[-1].detail == {"state": "revoked"}
    audit = (await registry.audit_after())[-1]
    assert (audit.event, audit.actor, audit.at) == ("revoked", OPERATOR, NOW + HOUR)
    assert audit.fields["identities"] == ["pump-7#1"]


async def test_a_second_revocation_revokes_nothing_more(registry):
    await issue(registry, Request())
    first = await registry.revoke_device(PUMP, LOST, NOW, OPERATOR)
    again = await registry.revoke_device(PUMP, LOST, NOW + DAY, OPERATOR)
    assert (again.serials, again.identities) == ((), ())
    assert again.seq == first.seq
    status = await registry.certificate_status("issuing", first.serials[0])
    assert status.revoked_at == NOW


async def test_an_expired_credential_is_revoked_too_for_it_could_be_the_way_back(
    registry,
):
    credential = await issue(registry, Request())
    await connect(registry, credential)
    await registry.sweep(NOW + 31 * DAY)
    await registry.revoke_device(PUMP, LOST, NOW + 31 * DAY, OPERATOR)
    assert await state_of(registry, credential) == "revoked"


async def test_a_superseded_credential_is_revoked_while_it_could_still_be_used(
    registry,
):
    old = await issue(registry, Request(key="old"))
    await issue(registry, Request(key="new", now=NOW + DAY))
    assert await state_of(registry, old) == "superseded"
    revoked = await registry.revoke_device(PUMP, LOST, NOW + DAY, OPERATOR)
    assert old.serial in revoked.serials


async def test_a_superseded_credential_past_its_end_is_left_alone(registry):
    old = await issue(registry, Request(key="old"))
    later = NOW + 25 * DAY
    new = await issue(registry, Request(key="new", now=later))
    revoked = await registry.revoke_device(PUMP, LOST, NOW + 40 * DAY, OPERATOR)
    assert revoked.serials == (new.serial,)
    assert await state_of(registry, old) == "superseded"


async def test_one_certificate_can_be_revoked_and_the_device_goes_on(registry):
    old = await issue(registry, Request(key="old"))
    await connect(registry, old)
    new = await issue(registry, Request(key="new"))
    revoked = await registry.revoke_credential(PUMP, old.serial, LOST, NOW, OPERATOR)
    assert revoked.serials == (old.serial,)
    assert await state_of(registry, old) == "revoked"
    assert (await connect(registry, new)).device_state is DeviceState.ENROLLED
    unknown = registry.revoke_credential(VALVE, old.serial, LOST, NOW, OPERATOR)
    assert await refusal_of(unknown) is DEVICE_UNKNOWN
    await registry.create_psk(VALVE, NOW, OPERATOR)
    others = registry.revoke_credential(VALVE, new.serial, LOST, NOW, OPERATOR)
    assert await refusal_of(others) is CREDENTIAL_UNKNOWN


async def test_a_revoked_device_gets_nothing_new_until_it_is_readmitted(registry):
    credential = await issue(registry, Request())
    await registry.revoke_device(PUMP, LOST, NOW, OPERATOR)
    assert await refusal_of(new_token(registry, device=PUMP)) is DEVICE_REVOKED
    assert await refusal_of(registry.create_psk(PUMP, NOW, OPERATOR)) is DEVICE_REVOKED
    assert (
        await refusal_of(registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR))
        is DEVICE_REVOKED
    )

    await registry.readmit(PUMP, NOW, OPERATOR)
    assert (await registry.device(PUMP)).state is DeviceState.REGISTERED
    assert await state_of(registry, credential) == "revoked"
    await new_token(registry, device=PUMP)


async def test_a_token_that_the_device_had_before_revocation_stays_ended(registry):
    token = await new_token(registry, device=PUMP)
    await registry.revoke_device(PUMP, LOST, NOW + HOUR, OPERATOR)
    await registry.readmit(PUMP, NOW + DAY, OPERATOR)
    facts = await facts_of(registry, Request(token=token))
    assert facts.token.revoked_at == NOW + HOUR
    (row,) = await registry.list_tokens()
    assert row.revoked_at == NOW + HOUR


async def test_suspension_is_seen_at_once_and_can_be_ended(registry):
    credential = await issue(registry, Request())
    await connect(registry, credential)
    seq = await registry.suspend(PUMP, NOW, OPERATOR)
    assert seq == await registry.latest_seq()
    standing = await registry.standing_of_certificate(credential.serial)
    assert standing.device_state is DeviceState.SUSPENDED
    assert standing.credential.state is CredentialState.ACTIVE
    assert await registry.suspend(PUMP, NOW, OPERATOR) == seq  # done is done
    await registry.resume(PUMP, NOW, OPERATOR)
    standing = await registry.standing_of_certificate(credential.serial)
    assert standing.device_state is DeviceState.ENROLLED
    names = [event.event for event in await registry.audit_after()]
    assert names == ["issued", "suspended", "resumed"]


async def test_only_the_designs_moves_are_allowed(registry):
    await registry.create_psk(PUMP, NOW, OPERATOR)
    for move in (registry.suspend, registry.resume):
        assert await refusal_of(move(PUMP, NOW, OPERATOR)) is STATE_NOT_ALLOWED
        assert await refusal_of(move(VALVE, NOW, OPERATOR)) is DEVICE_UNKNOWN
    await connect(registry, (await psk_standing(registry, 1)).credential)
    assert await refusal_of(registry.readmit(PUMP, NOW, OPERATOR)) is STATE_NOT_ALLOWED


async def test_a_name_in_another_case_is_not_the_device(registry):
    await registry.create_psk(PUMP, NOW, OPERATOR)
    shouted = DeviceId.parse("PUMP-7")
    assert await registry.device(shouted) is None
    for call in (
        registry.create_psk(shouted, NOW, OPERATOR),
        registry.suspend(shouted, NOW, OPERATOR),
        registry.revoke_device(shouted, LOST, NOW, OPERATOR),
        new_token(registry, device=shouted),
    ):
        assert await refusal_of(call) is DEVICE_ID_CASE


async def test_a_token_for_a_named_device_registers_it(registry):
    await new_token(registry, device=PUMP)
    view = await registry.device(PUMP)
    assert (view.state, view.created_at, view.last_seen) == ("registered", NOW, None)
    (row,) = await registry.list_tokens()
    assert (row.device, row.expires, row.revoked_at) == (PUMP, NOW + DAY, None)


async def test_a_token_needs_uses_and_time(registry):
    assert await refusal_of(new_token(registry, uses=0)) is ARGUMENT_MALFORMED
    late = registry.create_token(
        token_hash=b"h" * 32,
        device=None,
        uses=1,
        expires=NOW,
        profile=None,
        now=NOW,
        actor=OPERATOR,
    )
    assert await refusal_of(late) is ARGUMENT_MALFORMED


async def test_a_revoked_token_is_known_as_such(registry):
    token = await new_token(registry)
    await registry.revoke_token("t1", NOW, OPERATOR)
    await registry.revoke_token("t1", NOW + DAY, OPERATOR)
    assert (await facts_of(registry, Request(token=token))).token.revoked_at == NOW
    assert await refusal_of(registry.revoke_token("t2", NOW, OPERATOR)) is TOKEN_UNKNOWN


async def test_devices_are_listed_in_pages_and_by_what_is_asked(registry):
    names = ["a-1", "B-2", "b-3", "c.4", "c-5"]
    for name in names:
        await registry.create_psk(DeviceId.parse(name), NOW, OPERATOR)
    await connect(
        registry, (await psk_standing(registry, 1, DeviceId("b-3"))).credential
    )

    seen, cursor = [], None
    while True:
        page = await registry.list_devices(cursor, 2)
        assert len(page.devices) <= 2
        seen += [view.id.text for view in page.devices]
        cursor = page.next
        if cursor is None:
            break
    assert sorted(seen, key=str.lower) == seen
    assert sorted(seen) == sorted(names)
    enrolled = await registry.list_devices(state=DeviceState.ENROLLED)
    assert [view.id.text for view in enrolled.devices] == ["b-3"]
    begun = await registry.list_devices(prefix="b-")
    assert [view.id.text for view in begun.devices] == ["B-2", "b-3"]
    assert (await registry.list_devices(prefix="%")).devices == ()
    assert [len(view.credentials) for view in begun.devices] == [1, 1]


async def test_a_crl_lists_what_is_revoked_until_a_day_after_it_expired(registry):
    gone = await issue(registry, Request())
    board = await issue(registry, Request(key="b", line="idevid", lifetime=None))
    await issue(registry, Request(VALVE, key="valve"))
    await registry.revoke_device(PUMP, LOST, NOW + HOUR, OPERATOR)

    listed = await registry.revoked("issuing", NOW + 2 * HOUR)
    assert [(one.serial, one.revoked_at, one.reason) for one in listed] == [
        (gone.serial, NOW + HOUR, LOST),
        (board.serial, NOW + HOUR, LOST),
    ]
    assert await registry.revoked("factory", NOW) == []
    assert len(await registry.revoked("issuing", NOW + 31 * DAY)) == 2
    late = await registry.revoked("issuing", NOW + 31 * DAY + HOUR)
    assert [one.serial for one in late] == [board.serial]


async def test_the_status_of_a_certificate_is_known_for_its_issuer_alone(registry):
    credential = await issue(registry, Request())
    status = await registry.certificate_status("issuing", credential.serial)
    assert (status.serial, status.revoked_at, status.reason) == (
        credential.serial,
        None,
        None,
    )
    assert await registry.certificate_status("factory", credential.serial) is None
    assert await registry.certificate_status("issuing", Serial(1)) is None


async def test_unexpired_certificates_are_walked_through_page_by_page(registry):
    issued = [
        await issue(registry, Request(DeviceId.parse(f"d{n}"), key=n)) for n in range(5)
    ]
    found, after = [], 0
    while rows := await registry.unexpired_serials("issuing", after, 2, NOW):
        found += [row.serial for row in rows]
        after = rows[-1].id
    assert found == [one.serial for one in issued]
    assert await registry.unexpired_serials("issuing", 0, 9, NOW + 31 * DAY) == []


async def test_crl_numbers_only_grow_for_each_issuer(registry):
    numbers = [await registry.next_crl_number("issuing") for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert await registry.next_crl_number("factory") == 1


async def test_an_audit_event_has_only_names_that_the_table_knows(registry):
    await registry.add_audit(events.INITIALISED, {"fingerprint": "ab"}, NOW, OPERATOR)
    with pytest.raises(KeyError):
        await registry.add_audit(events.INITIALISED, {"pin": "1"}, NOW, OPERATOR)
    assert [event.event for event in await registry.audit_after()] == ["initialised"]


async def test_the_newest_time_never_goes_back(registry):
    assert await registry.newest_time() is None
    await registry.create_psk(PUMP, NOW, OPERATOR)
    await registry.create_psk(VALVE, NOW - DAY, OPERATOR)
    assert await registry.newest_time() == NOW


async def test_gateways_that_have_not_applied_a_change_are_named(registry):
    await registry.create_psk(PUMP, NOW, OPERATOR)
    await connect(registry, (await psk_standing(registry, 1)).credential)
    first = await registry.join_gateway("alpha", 1, NOW)
    second = await registry.join_gateway("beta", 2, NOW)
    seq = await registry.suspend(PUMP, NOW, OPERATOR)
    assert await registry.behind(seq, NOW, HOUR) == ["alpha", "beta"]

    await registry.beat(first, seq, NOW)
    assert await registry.behind(seq, NOW, HOUR) == ["beta"]
    # One that has not been heard of is dead: nobody waits for it.
    assert await registry.behind(seq, NOW + 2 * HOUR, HOUR) == []
    await registry.leave(second)
    assert await registry.behind(seq, NOW, HOUR) == []
    # One that joins after a change has nothing old in memory.
    await registry.join_gateway("gamma", 3, NOW)
    assert await registry.behind(seq, NOW, HOUR) == []


async def test_a_gateway_that_comes_back_takes_its_old_place(registry):
    await registry.join_gateway("alpha", 1, NOW)
    await registry.join_gateway("alpha", 1, NOW)
    await registry.create_psk(PUMP, NOW, OPERATOR)
    seq = await registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR)
    assert await registry.behind(seq, NOW, HOUR) == ["alpha"]
