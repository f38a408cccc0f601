"""The agent's first credential, over real TLS, with a gateway that may err."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from stub_gateway import Authority, serving

from device_agent import enrol
from device_agent.carry import FirstProof
from device_agent.failures import NotNowError, RefusedError, UntrustedError
from device_agent.home import Belonging, Home
from device_agent.status import document
from provisioning.model import refusals
from provisioning.model.errors import Unusable
from provisioning.model.ids import DeviceId
from provisioning.tls.context import ClientPsk

SESAME = "open-sesame"


def roll():
    return 0.0


@pytest.fixture
async def stub():
    async with serving() as made:
        yield made


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "state")


def wish(stub, device="pump-7", mode="cert", **proof):
    to = Belonging(stub.url, DeviceId.parse(device), mode)
    return enrol.Wish(to, FirstProof(**proof), stub.authority.pem, None)


def with_token(stub, token=SESAME, device="pump-7"):
    stub.tokens[SESAME] = device
    return wish(stub, device, token=token)


async def test_a_device_with_a_token_gets_a_certificate(stub, home):
    held = await enrol.enrol(home, with_token(stub), roll)
    told = document(home)
    assert told["serial"] == held.serial == next(iter(stub.records))
    assert (told["device"], told["mode"], told["slot"]) == ("pump-7", "cert", "a")
    assert told["last"]["outcome"] == "done"
    assert stub.seen == ["simpleenroll", "whoami", "config"]


async def test_every_file_is_for_the_owner_alone(stub, home):
    await enrol.enrol(home, with_token(stub), roll)
    for path in [home.folder, *home.folder.rglob("*")]:
        assert not path.stat().st_mode & 0o077, path


async def test_a_psk_device_stays_one(stub, home):
    identity, key = stub.make_psk("pump-7")
    psk = ClientPsk(identity, key)
    await enrol.enrol(home, wish(stub, mode="psk", credential=psk), roll)
    told = document(home)
    assert (told["mode"], told["identity"], told["serial"]) == ("psk", identity, None)


async def test_a_psk_device_may_trade_it_for_a_certificate(stub, home):
    identity, key = stub.make_psk("pump-7")
    psk = ClientPsk(identity, key)
    await enrol.enrol(home, wish(stub, mode="cert", credential=psk), roll)
    assert document(home)["serial"]


async def test_a_wrong_psk_is_forgotten_and_a_right_one_taken(stub, home):
    identity, key = stub.make_psk("pump-7")
    wrong = wish(stub, mode="psk", credential=ClientPsk(identity, b"\7" * 32))
    with pytest.raises(NotNowError):
        await enrol.enrol(home, wrong, roll)
    right = wish(stub, mode="psk", credential=ClientPsk(identity, key))
    await enrol.enrol(home, right, roll)
    assert document(home)["identity"] == identity


async def test_a_wrong_token_is_refused_in_the_gateways_words(stub, home):
    with pytest.raises(RefusedError) as refused:
        await enrol.enrol(home, with_token(stub, "guess"), roll)
    assert refused.value.code == "token_refused"
    assert document(home)["last"]["outcome"] == "refused"


async def test_a_lost_answer_is_asked_for_again_with_the_same_request(stub, home):
    stub.refuse["whoami"] = refusals.AWAY
    with pytest.raises(NotNowError):
        await enrol.enrol(home, with_token(stub), roll)
    assert document(home)["state"] == "proving"
    del stub.refuse["whoami"]
    (home.folder / "slots/a/chain.pem").unlink()  # as if the answer had been lost
    assert document(home)["state"] == "enrolling"
    await enrol.enrol(home, with_token(stub), roll)
    assert len(stub.records) == 1, "one certificate, though asked for twice"


async def test_a_gateway_that_goes_away_is_met_again_where_it_was_left(stub, home):
    stub.refuse["whoami"] = refusals.AWAY
    with pytest.raises(NotNowError):
        await enrol.enrol(home, with_token(stub), roll)
    del stub.refuse["whoami"]
    await enrol.enrol(home, with_token(stub), roll)
    assert stub.seen.count("simpleenroll") == 1


async def test_another_device_id_begins_anew(stub, home):
    stub.refuse["whoami"] = refusals.AWAY
    with pytest.raises(NotNowError):
        await enrol.enrol(home, with_token(stub), roll)
    stub.refuse.clear()
    await enrol.enrol(home, with_token(stub, device="pump-8"), roll)
    assert document(home)["device"] == "pump-8"


async def test_a_pin_finds_the_anchor(stub, home):
    pin = hashlib.sha256(stub.authority.der).digest()
    pinned = replace(with_token(stub), anchors_pem=None, pin=pin)
    await enrol.enrol(home, pinned, roll)
    assert home.anchors() == stub.authority.pem


async def test_a_pin_that_fits_nothing_gives_the_token_to_nobody(stub, home):
    pinned = replace(with_token(stub), anchors_pem=None, pin=bytes(32))
    with pytest.raises(UntrustedError):
        await enrol.enrol(home, pinned, roll)
    assert stub.seen == ["cacerts"]
    assert not stub.secrets_seen


async def test_a_stranger_with_another_root_never_sees_the_token(home):
    async with serving(certificate_from=Authority("Mallory")) as stub:
        with pytest.raises(UntrustedError):
            await enrol.enrol(home, with_token(stub), roll)
        assert not stub.secrets_seen


async def test_nobody_there_is_told_as_such(stub, home):
    absent = with_token(stub)
    absent = replace(absent, to=replace(absent.to, url="https://localhost:1"))
    with pytest.raises(NotNowError, match="not reachable"):
        await enrol.enrol(home, absent, roll)


async def test_a_folder_that_others_may_enter_is_refused(stub, home):
    home.folder.mkdir(mode=0o700)
    (home.folder / "something").touch()
    home.folder.chmod(0o755)
    with pytest.raises(Unusable, match="chmod 700"):
        await enrol.enrol(home, with_token(stub), roll)


async def test_two_agents_never_work_in_one_folder(stub, home):
    home.open()
    assert Home(home.folder).lock.take()
    with pytest.raises(Unusable, match="another birthmark-agent"):
        await enrol.enrol(home, with_token(stub), roll)


# Time -------------------------------------------------------------------------------
WOKEN = datetime(1970, 1, 1, 0, 5, tzinfo=UTC)


async def test_a_device_that_woke_up_in_1970_enrols_and_knows_better_then(
    stub, tmp_path
):
    home = Home(tmp_path / "state", system=lambda: WOKEN)
    await enrol.enrol(home, with_token(stub), roll)
    assert datetime.now(UTC) - home.clock().now() < timedelta(minutes=10)
    await enrol.rotate(home, roll)


async def test_a_server_certificate_that_has_expired_stays_expired(tmp_path):
    async with serving(lifetime=timedelta(minutes=-1)) as stub:
        home = Home(tmp_path / "state")
        with pytest.raises(UntrustedError):
            await enrol.enrol(home, with_token(stub), roll)
        assert not stub.secrets_seen


async def test_a_stranger_gets_nothing_from_a_device_that_woke_up_in_1970(tmp_path):
    async with serving(certificate_from=Authority("Mallory")) as stub:
        home = Home(tmp_path / "state", system=lambda: WOKEN)
        with pytest.raises(UntrustedError):
            await enrol.enrol(home, with_token(stub), roll)
        assert not stub.secrets_seen


async def test_a_gateway_far_ahead_of_its_time_does_not_lock_itself_out(stub, tmp_path):
    stub.ahead = timedelta(days=4000)
    home = Home(tmp_path / "state")
    await enrol.enrol(home, with_token(stub), roll)
    stub.ahead = timedelta(0)
    await enrol.rotate(home, roll)
