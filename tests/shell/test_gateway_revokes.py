"""Revocation at a running gateway: in three modes, within a second, and with a reason.

Every change here is written by this process, as `birthmark devices` would write it;
the gateway is another process and follows.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from device_client import NOTHING, Device
from gateway_process import soon

from gateway.operators import actions
from provisioning.tls.context import ClientCertificate
from provisioning.wire.mqtt import (
    V5,
    V311,
    Farewell,
    Kind,
    Prop,
    read_reason_text,
    text_of,
)

BITES_S = 1.0
MODES = ["certificate", "psk", "resumed certificate", "resumed psk"]


async def revoke(gateway, name, **what):
    """As `devices revoke`; it says which gateways have not applied it in time."""
    what = {"serial": None, "reason": "keyCompromise"} | what
    done = await gateway.operate(lambda desk: actions.revoke_device(desk, name, **what))
    assert done["not_applied"] == []
    return done


async def ready_to_come_back(field, name, mode, **how):
    """What a device of this mode needs for its next connection."""
    proof = (await field.enrolled(name)).proof
    if "psk" in mode:
        proof = await field.psk_of(proof)
    async with field.https(proof, **how) as http:
        told = (await http.whoami()).document
        assert told["auth"] == mode.split()[-1]
        session = http.stream.session() if "resumed" in mode else None
    if session is not None:
        # The twin: it does resume, as long as nobody has revoked it.
        async with field.https(proof, session=session, **how) as http:
            told = (await http.whoami()).document
            assert told["resumed"] is True
            session = http.stream.session() or session
    return {"proof": proof, "session": session, **how}


@pytest.mark.parametrize("newest", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_revoked_device_is_told_why_in_every_mode(field, gateway, mode, newest):
    name = f"revoked-{newest}-{mode.replace(' ', '-')}"
    back = await ready_to_come_back(field, name, mode, newest=newest)
    before = time.monotonic()
    await revoke(gateway, name)
    answer = await field.whoami(**back)
    assert time.monotonic() - before < BITES_S
    assert (answer.status, answer.code) == (403, "device_revoked")
    assert answer.document["retryable"] is False
    assert "readmit" in answer.document["detail"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_kept_https_connection_is_cut(field, gateway, mode):
    name = f"cut-{mode.replace(' ', '-')}"
    back = await ready_to_come_back(field, name, mode)
    async with field.https(**back) as http:
        assert (await http.whoami()).status == 200
        before = time.monotonic()
        await revoke(gateway, name)
        await http.ended(BITES_S)
        assert time.monotonic() - before < BITES_S


@pytest.mark.parametrize("level", [V311, V5], ids=["3.1.1", "5"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_live_mqtt_connection_is_cut_and_says_why_on_return(
    field, gateway, mode, level
):
    name = f"mqtt-{level}-{mode.replace(' ', '-')}"
    proof = (await ready_to_come_back(field, name, mode))["proof"]
    session = None
    if "resumed" in mode:
        async with field.mqtt(proof, level=level) as first:
            assert (await first.connect()).code == 0
            session = first.stream.session()
    async with field.mqtt(proof, level=level, session=session) as mqtt:
        assert mqtt.stream.established.resumed is ("resumed" in mode)
        assert (await mqtt.connect()).code == 0
        before = time.monotonic()
        await revoke(gateway, name)
        async with asyncio.timeout(BITES_S):
            last = await mqtt.hear()
            if level == V5:
                assert last[0] >> 4 == Kind.DISCONNECT
                why = text_of(Farewell.parse(last, V5).properties, Prop.REASON_STRING)
                assert read_reason_text(why).code == "device_revoked"
                last = await mqtt.hear()
            assert last is None
        assert time.monotonic() - before < BITES_S
    async with field.mqtt(proof, level=level, session=session) as mqtt:
        connack = await mqtt.connect()
        if level == V311:
            assert connack.code == 5  # not authorised
        else:
            assert connack.code == 0x87
            why = text_of(connack.properties, Prop.REASON_STRING)
            assert read_reason_text(why).code == "device_revoked"
        assert await mqtt.hear() is None


async def test_one_revoked_certificate_leaves_the_device_its_others(field, gateway):
    old = await field.enrolled("one-of-two")
    new = await field.renewed(old)
    async with field.https(old.proof) as kept:
        assert (await kept.whoami()).status == 200
        done = await revoke(gateway, "one-of-two", serial=old.serial)
        assert done["revoked"] == [old.serial]
        await kept.ended(BITES_S)
    refused = await field.whoami(old.proof)
    assert (refused.status, refused.code) == (403, "credential_revoked")
    assert (await field.whoami(new.proof)).status == 200


async def test_a_suspended_device_waits_and_comes_back(field, gateway):
    pump = await field.enrolled("suspended")
    async with field.mqtt(pump.proof) as mqtt:
        assert (await mqtt.connect()).code == 0
        await gateway.operate(lambda desk: actions.suspend_device(desk, "suspended"))
        async with asyncio.timeout(BITES_S):
            assert (await mqtt.hear())[0] >> 4 == Kind.DISCONNECT
    refused = await field.whoami(pump.proof)
    assert (refused.status, refused.code) == (403, "device_suspended")
    assert refused.document["retryable"] is True
    assert "retry-after" in refused.headers
    await gateway.operate(lambda desk: actions.resume_device(desk, "suspended"))
    assert (await field.whoami(pump.proof)).status == 200


async def test_a_readmitted_device_enrols_anew_and_its_old_credential_stays_out(
    field, gateway
):
    old = await field.enrolled("readmitted")
    await revoke(gateway, "readmitted")
    await gateway.operate(lambda desk: actions.readmit_device(desk, "readmitted"))
    refused = await field.whoami(old.proof)
    assert (refused.status, refused.code) == (403, "credential_revoked")
    new = await field.enrolled("readmitted")
    assert (await field.whoami(new.proof)).status == 200


async def test_a_revoked_device_gets_nothing_by_token_either(field, gateway):
    """Its own tokens end with it, and one that names no device is no way around."""
    await field.enrolled("no-way-in")
    own = await gateway.token("no-way-in")
    await revoke(gateway, "no-way-in")
    anybodys = await gateway.token(None)
    for token, status, code in (
        (own, 401, "token_refused"),
        (anybodys, 403, "device_revoked"),
    ):
        async with field.https() as http:
            csr = Device("no-way-in").csr
            answer = await http.enroll(csr, basic=("no-way-in", token))
        assert (answer.status, answer.code) == (status, code)


async def test_a_revoked_device_is_refused_on_a_connection_that_never_proved_it(
    field, gateway
):
    """The handshake is before the revocation, the first request after it."""
    pump = await field.enrolled("shook-hands")
    async with field.https(pump.proof) as http:
        await revoke(gateway, "shook-hands")
        answer = await http.whoami()
    assert (answer.status, answer.code) == (403, "device_revoked")


async def test_neighbours_of_a_revoked_device_notice_nothing(field, gateway):
    one, two = await field.enrolled("goes"), await field.enrolled("stays")
    async with field.https(two.proof) as http, field.mqtt(two.proof) as mqtt:
        assert (await http.whoami()).status == 200
        assert (await mqtt.connect()).code == 0
        await revoke(gateway, one.name)
        assert (await http.whoami()).status == 200
        await mqtt.stream.write(b"\xc0\x00")
        assert await mqtt.hear() == b"\xd0\x00"


async def test_a_rotation_that_an_operator_asks_for_is_seen_and_done(field, gateway):
    old = await field.enrolled("asked-to")
    assert (await field.whoami(old.proof)).document["rotate"] is False
    await gateway.operate(
        lambda desk: actions.rotate_device(
            desk, "asked-to", within=actions.ROTATE_WITHIN
        )
    )
    assert (await field.whoami(old.proof)).document["rotate"] is True
    new = await field.renewed(old)
    assert (await field.whoami(new.proof)).document["rotate"] is False


async def test_a_foreign_certificate_fails_the_handshake(field, authority):
    """Unknown issuers get an alert, not words: nothing of ours is proven."""
    stranger = authority.device("stranger")
    proof = ClientCertificate(stranger.pem, stranger.key_pem)
    # The client of TLS 1.3 is done before the server has judged its certificate.
    async with field.https(proof) as http:
        assert await http.whoami() == NOTHING
    failed = await soon(lambda: _failed(field.gateway))
    assert "verif" in failed[-1]["reason"] or "issuer" in failed[-1]["reason"]


async def _failed(gateway):
    return gateway.said("handshake_failed")
