"""A credential's life: pending, active, superseded, expired; and who was last seen."""

from __future__ import annotations

import pytest
from registry_kit import (
    DAY,
    HOUR,
    NOW,
    OPERATOR,
    PUMP,
    SERVERS,
    Request,
    connect,
    issue,
    new_database,
    opened,
    psk_standing,
    state_of,
)

from provisioning.model.credentials import (
    AuthMethod,
    CredentialState,
    DeviceState,
    RevocationReason,
)
from provisioning.model.errors import PeerError
from provisioning.model.ids import DeviceId, Serial
from provisioning.model.refusals import (
    CREDENTIAL_UNKNOWN,
    DEVICE_REVOKED,
    DEVICE_UNKNOWN,
    STATE_NOT_ALLOWED,
)


@pytest.fixture(params=["sqlite", *SERVERS])
async def registry(request, tmp_path):
    async with opened(await new_database(tmp_path, request.param)) as registry:
        yield registry


async def old_and_new(registry):
    """A proven certificate and its unproven successor."""
    old = await issue(registry, Request(key="old"))
    await connect(registry, old, times=3)
    return old, await issue(registry, Request(key="new", credential=old.id))


async def test_the_first_connection_proves_a_credential_and_enrols_its_device(registry):
    credential = await issue(registry, Request())
    standing = await connect(registry, credential)

    assert standing.credential.state is CredentialState.ACTIVE
    assert standing.credential.first_seen == NOW
    assert standing.device_state is DeviceState.ENROLLED
    assert await state_of(registry, credential) == "active"
    assert await registry.standing_of_certificate(credential.serial) == standing


async def test_the_old_one_stays_for_an_hour_after_the_new_ones_first_connection(
    registry,
):
    old, new = await old_and_new(registry)
    await connect(registry, new, NOW)
    assert await registry.sweep(NOW + HOUR - HOUR / 60) == 0
    assert await state_of(registry, old) == "active"

    just_before = await registry.standing_of_certificate(old.serial, NOW + HOUR / 2)
    assert just_before.credential.state is CredentialState.ACTIVE
    over = await registry.standing_of_certificate(old.serial, NOW + HOUR)
    assert over.credential.state is CredentialState.SUPERSEDED
    assert await registry.sweep(NOW + HOUR) == 1
    assert await registry.sweep(NOW + HOUR) == 0
    assert await state_of(registry, old) == "superseded"
    assert await state_of(registry, new) == "active"


async def test_the_old_one_connecting_after_its_grace_is_superseded_without_a_sweep(
    registry,
):
    old, new = await old_and_new(registry)
    await connect(registry, new, NOW)
    assert (await connect(registry, old, NOW)).credential.state == "active"
    late = await connect(registry, old, NOW + 2 * HOUR)
    assert late.credential.state is CredentialState.SUPERSEDED
    assert await state_of(registry, old) == "superseded"


async def test_the_old_one_is_superseded_when_the_new_one_connects_a_second_time(
    registry,
):
    old, new = await old_and_new(registry)
    await connect(registry, new)
    await connect(registry, new)

    standing = await registry.standing_of_certificate(old.serial)
    assert standing.credential.state is CredentialState.SUPERSEDED
    assert await state_of(registry, old) == "superseded"
    last = (await registry.changes_after(0))[-1]
    assert (last.kind, last.device) == ("credential", PUMP)
    assert last.detail["serial"] == old.serial.hex
    assert last.detail["state"] == "superseded"


async def test_connections_with_the_old_one_do_not_end_it(registry):
    old, new = await old_and_new(registry)
    await connect(registry, new)
    await connect(registry, old, times=5)
    assert await state_of(registry, old) == "active"


async def test_only_credentials_of_the_same_line_are_superseded(registry):
    board = await issue(registry, Request(key="board", line="idevid", lifetime=None))
    await connect(registry, board, times=3)
    await registry.create_psk(PUMP, NOW, OPERATOR)
    await connect(registry, (await psk_standing(registry, 1)).credential)
    certificate = await issue(registry, Request(key="first"))
    await connect(registry, certificate, times=3)

    assert await state_of(registry, board) == "active"
    assert (await psk_standing(registry, 1)).credential.state == "active"


async def test_the_old_one_is_superseded_when_the_device_says_rotated(registry):
    old, new = await old_and_new(registry)
    await registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR)
    await connect(registry, new)
    await registry.rotated(PUMP, new.serial, NOW)
    assert await state_of(registry, old) == "superseded"
    await registry.rotated(PUMP, new.serial, NOW)  # said twice, changes nothing
    assert await state_of(registry, new) == "active"


async def test_rotated_is_not_believed_of_a_credential_that_never_connected(registry):
    old, new = await old_and_new(registry)
    with pytest.raises(PeerError) as caught:
        await registry.rotated(PUMP, new.serial, NOW)
    assert caught.value.refusal is STATE_NOT_ALLOWED
    assert await state_of(registry, old) == "active"


async def test_rotated_is_not_believed_of_another_devices_credential(registry):
    old, _ = await old_and_new(registry)
    other = await issue(registry, Request(DeviceId.parse("valve-2"), key="valve"))
    await connect(registry, other)
    for named in (other.serial, Serial(99), 7):
        with pytest.raises(PeerError) as caught:
            await registry.rotated(PUMP, named, NOW)
        assert caught.value.refusal is CREDENTIAL_UNKNOWN
    with pytest.raises(PeerError) as caught:
        await registry.rotated(DeviceId.parse("ghost"), old.serial, NOW)
    assert caught.value.refusal is DEVICE_UNKNOWN


async def test_an_operators_wish_to_rotate_is_seen_until_a_newer_one_is_proven(
    registry,
):
    old, new = await old_and_new(registry)
    seq = await registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR)
    assert seq == await registry.latest_seq()
    change = (await registry.changes_after(seq - 1))[0]
    assert (change.kind, change.detail) == (
        "rotate",
        {"by": "2030-01-02T12:00:00+00:00"},
    )
    standing = await registry.standing_of_certificate(old.serial)
    assert standing.rotate_by == NOW + DAY

    assert (await connect(registry, new)).rotate_by is None
    assert (await registry.standing_of_certificate(old.serial)).rotate_by is None
    last = (await registry.changes_after(seq))[-1]
    assert (last.kind, last.detail) == ("rotate", {"by": None})


async def test_what_is_past_its_end_expires(registry):
    credential = await issue(registry, Request())
    await connect(registry, credential)
    pending = await issue(registry, Request(key="never used"))
    end = NOW + 30 * DAY
    assert await registry.sweep(end) == 0
    assert await registry.sweep(end + HOUR) == 2
    assert await state_of(registry, credential) == "expired"
    assert await state_of(registry, pending) == "expired"
    standing = await registry.standing_of_certificate(credential.serial)
    assert standing.credential.state is CredentialState.EXPIRED


async def test_an_expired_credential_that_connects_is_told_so_and_proves_nothing(
    registry,
):
    credential = await issue(registry, Request())
    late = await connect(registry, credential, NOW + 31 * DAY)
    assert late.credential.state is CredentialState.EXPIRED
    assert late.credential.first_seen is None
    assert late.device_state is DeviceState.REGISTERED


async def test_a_revoked_credential_that_connects_is_told_so_and_proves_nothing(
    registry,
):
    old, new = await old_and_new(registry)
    await registry.revoke_credential(
        PUMP, new.serial, RevocationReason.KEY_COMPROMISE, NOW, OPERATOR
    )
    standing = await connect(registry, new, times=2)
    assert standing.credential.state is CredentialState.REVOKED
    assert await state_of(registry, old) == "active"


async def test_a_suspended_device_proves_nothing(registry):
    _, new = await old_and_new(registry)
    await registry.suspend(PUMP, NOW, OPERATOR)
    standing = await connect(registry, new)
    assert standing.device_state is DeviceState.SUSPENDED
    assert standing.credential.state is CredentialState.PENDING


async def test_a_credential_that_nobody_knows_cannot_connect(registry):
    credential = await issue(registry, Request())
    with pytest.raises(PeerError) as caught:
        await registry.connected(
            credential.id + 1000,
            auth=AuthMethod.PSK,
            resumed=False,
            address="",
            now=NOW,
            grace=HOUR,
        )
    assert caught.value.refusal is CREDENTIAL_UNKNOWN
    assert await registry.standing_of_certificate(Serial(5)) is None
    assert await psk_standing(registry, 1) is None


async def test_a_psk_has_the_same_generation_until_it_is_proven(registry):
    assert await registry.create_psk(PUMP, NOW, OPERATOR) == 1
    assert await registry.create_psk(PUMP, NOW, OPERATOR) == 1
    assert await registry.next_psk(PUMP, NOW, AuthMethod.PSK) == 1
    first = (await psk_standing(registry, 1)).credential
    await connect(registry, first)

    assert await registry.next_psk(PUMP, NOW, AuthMethod.PSK) == 2
    assert await registry.next_psk(PUMP, NOW, AuthMethod.CERTIFICATE) == 2
    assert await state_of(registry, first) == "active"
    second = (await psk_standing(registry, 2)).credential
    await connect(registry, second)
    await registry.rotated(PUMP, 2, NOW)
    assert await state_of(registry, first) == "superseded"


async def test_a_psk_identity_is_known_only_in_its_own_case(registry):
    await registry.create_psk(PUMP, NOW, OPERATOR)
    assert await psk_standing(registry, 1, DeviceId.parse("PUMP-7")) is None
    assert await psk_standing(registry, 1) is not None


async def test_a_psk_for_an_unknown_device_is_only_for_operators_to_make(registry):
    with pytest.raises(PeerError) as caught:
        await registry.next_psk(PUMP, NOW, AuthMethod.PSK)
    assert caught.value.refusal is DEVICE_UNKNOWN


async def test_after_revocation_generations_go_on_and_are_never_given_twice(registry):
    await registry.create_psk(PUMP, NOW, OPERATOR)
    await registry.revoke_device(PUMP, RevocationReason.UNSPECIFIED, NOW, OPERATOR)
    with pytest.raises(PeerError) as caught:
        await registry.create_psk(PUMP, NOW, OPERATOR)
    assert caught.value.refusal is DEVICE_REVOKED
    await registry.readmit(PUMP, NOW, OPERATOR)
    assert await registry.create_psk(PUMP, NOW, OPERATOR) == 2


async def test_a_device_was_last_seen_where_it_last_connected(tmp_path):
    url = await new_database(tmp_path)
    async with opened(url) as registry:
        credential = await issue(registry, Request())
        await connect(registry, credential, times=3)
        await registry.connected(
            credential.id,
            auth=AuthMethod.CERTIFICATE,
            resumed=True,
            address="[2001:db8::7]:4711",
            now=NOW + HOUR,
            grace=HOUR,
        )
    async with opened(url) as registry:  # closing writes what was gathered
        seen = (await registry.device(PUMP)).last_seen
        assert (seen.at, seen.auth, seen.resumed, seen.address) == (
            NOW + HOUR,
            AuthMethod.CERTIFICATE,
            True,
            "[2001:db8::7]:4711",
        )
        assert await registry.newest_time() == NOW + HOUR
