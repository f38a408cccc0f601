"""What time does to credentials at a running gateway: grace, expiry, the way back.

The gateway of these tests supersedes two seconds after the new one's first connection,
and its profiles `brief` and `strict` give certificates that live for two seconds; of
the two only `brief` has a way back.
"""

from __future__ import annotations

from datetime import timedelta

from device_client import Device, issued
from gateway_process import soon

from gateway.operators import actions

GRACE_S = 2


async def states(gateway, name):
    """The credentials' states, the oldest first."""
    shown = await gateway.operate(lambda desk: actions.show_device(desk, name))
    return [one["state"] for one in shown["credentials"]]


async def code_of(field, device):
    answer = await field.whoami(device.proof)
    return answer.code if answer.status != 200 else None


async def test_the_old_credential_works_until_the_new_one_is_proven(field, gateway):
    """A device that lost the answer, or whose new key broke, is not stranded."""
    old = await field.enrolled("not-stranded")
    for _ in range(3):
        assert await code_of(field, old) is None
    new = await field.renewed(old)
    for _ in range(3):
        assert await code_of(field, old) is None
    assert await states(gateway, "not-stranded") == ["active", "pending"]
    assert await code_of(field, new) is None
    # Once is not proof enough: its answer may have been lost.
    assert await code_of(field, old) is None
    assert await states(gateway, "not-stranded") == ["active", "active"]


async def test_the_second_connection_of_the_new_one_ends_the_old_one(field, gateway):
    old = await field.enrolled("second-time")
    assert await code_of(field, old) is None
    new = await field.renewed(old)
    async with field.https(old.proof) as kept, field.https(new.proof) as first:
        assert (await kept.whoami()).status == 200
        # Two requests on one connection are one connection.
        assert (await first.whoami()).status == 200
        assert (await first.whoami()).status == 200
        assert (await kept.whoami()).status == 200
        assert await code_of(field, new) is None
        await kept.ended()
    assert await code_of(field, old) == "credential_superseded"
    assert await states(gateway, "second-time") == ["superseded", "active"]


async def test_the_next_psk_ends_the_one_before_on_its_second_connection(field):
    proof = (await field.enrolled("psk-rotates")).proof
    first = await field.psk_of(proof)
    assert (await field.whoami(first)).status == 200
    second = await field.psk_of(first)
    assert (await field.whoami(second)).status == 200
    assert (await field.whoami(first)).status == 200
    assert (await field.whoami(second)).status == 200
    refused = await field.whoami(first)
    assert (refused.status, refused.code) == (403, "credential_superseded")
    # The certificate is of another line: a PSK does not end it.
    assert (await field.whoami(proof)).status == 200


async def test_a_superseded_credential_cannot_resume(field):
    old = await field.enrolled("resumes-late")
    async with field.https(old.proof) as http:
        assert (await http.whoami()).status == 200
        session = http.stream.session()
    new = await field.renewed(old)
    assert await code_of(field, new) is None
    assert await code_of(field, new) is None
    answer = await field.whoami(old.proof, session=session)
    assert (answer.status, answer.code) == (403, "credential_superseded")


async def test_grace_ends_the_old_one_without_a_second_connection(
    narrow_field, narrow_gateway
):
    old = await narrow_field.enrolled("grace-over")
    assert await code_of(narrow_field, old) is None
    new = await narrow_field.renewed(old)
    assert await code_of(narrow_field, new) is None
    assert await code_of(narrow_field, old) is None

    async def ended():
        return await code_of(narrow_field, old)

    assert await soon(ended, GRACE_S + 3) == "credential_superseded"
    assert await code_of(narrow_field, new) is None
    assert await states(narrow_gateway, "grace-over") == ["superseded", "active"]


async def test_an_unproven_new_one_never_ends_the_old_one(narrow_field):
    old = await narrow_field.enrolled("unproven-new")
    assert await code_of(narrow_field, old) is None
    other = await narrow_field.enrolled("clock-for-unproven")
    following = await narrow_field.renewed(other)
    await narrow_field.renewed(old)
    assert await code_of(narrow_field, following) is None

    async def the_other_ones_grace_is_over():
        return await code_of(narrow_field, other)

    await soon(the_other_ones_grace_is_over, GRACE_S + 3)
    assert await code_of(narrow_field, old) is None


async def test_an_expired_certificate_may_reenrol_and_nothing_else(narrow_field):
    slept = await narrow_field.enrolled("slept", profile="brief")

    async def expired():
        return await code_of(narrow_field, slept)

    assert await soon(expired, 5) == "credential_expired"
    async with narrow_field.https(slept.proof) as http:
        for method, path in (
            ("GET", "/device/v1/config"),
            ("POST", "/device/v1/psk"),
        ):
            refused = await http.ask(method, path, b"")
            assert (refused.status, refused.code) == (403, "credential_expired")
        refused = await http.enroll(Device("slept").csr)
        assert (refused.status, refused.code) == (403, "credential_expired")
        # It can say nothing for another device either.
        refused = await http.enroll(Device("awake").csr, operation="simplereenroll")
        assert (refused.status, refused.code) == (400, "name_not_allowed")
    async with narrow_field.mqtt(slept.proof) as mqtt:
        assert (await mqtt.connect()).code == 0x87
    awake = await narrow_field.renewed(slept)
    told = await narrow_field.whoami(awake.proof)
    assert told.document["serial"] == awake.serial


async def test_without_grace_there_is_no_way_back(narrow_field):
    slept = await narrow_field.enrolled("slept-too-long", profile="strict")

    async def expired():
        return await code_of(narrow_field, slept)

    assert await soon(expired, 5) == "credential_expired"
    async with narrow_field.https(slept.proof) as http:
        csr = Device("slept-too-long").csr
        refused = await http.enroll(csr, operation="simplereenroll")
    assert (refused.status, refused.code) == (403, "credential_expired")


async def test_a_revoked_device_has_no_way_back_from_expiry(
    narrow_field, narrow_gateway
):
    slept = await narrow_field.enrolled("slept-revoked", profile="brief")

    async def expired():
        return await code_of(narrow_field, slept)

    await soon(expired, 5)
    await narrow_gateway.operate(
        lambda desk: actions.revoke_device(
            desk, "slept-revoked", serial=None, reason="unspecified"
        )
    )
    async with narrow_field.https(slept.proof) as http:
        csr = Device("slept-revoked").csr
        refused = await http.enroll(csr, operation="simplereenroll")
    assert (refused.status, refused.code) == (403, "device_revoked")


async def test_an_expired_session_does_not_outlive_its_certificate(narrow_field):
    """A ticket is good for a day; the certificate in it was good for two seconds."""
    brief = await narrow_field.enrolled("brief-session", profile="brief")
    async with narrow_field.https(brief.proof) as http:
        assert (await http.whoami()).status == 200
        session = http.stream.session()

    async def expired():
        return await code_of(narrow_field, brief)

    assert await soon(expired, 5) == "credential_expired"
    async with narrow_field.https(brief.proof, session=session) as http:
        assert http.stream.established.resumed is True
        refused = await http.whoami()
    assert (refused.status, refused.code) == (403, "credential_expired")


async def test_a_token_past_its_time_is_refused(field, gateway):

    token = await gateway.token("too-late", ttl=timedelta(milliseconds=1))
    async with field.https() as http:
        answer = await http.enroll(Device("too-late").csr, basic=("too-late", token))
    assert (answer.status, answer.code) == (401, "token_refused")
    again = await gateway.token("too-late")
    async with field.https() as http:
        issued(await http.enroll(Device("too-late").csr, basic=("too-late", again)))
