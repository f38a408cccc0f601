"""One rotation by command: the old credential stays until the new one is proven."""

from __future__ import annotations

import pytest
from stub_gateway import serving

from device_agent import enrol, files
from device_agent.carry import FirstProof
from device_agent.failures import NotNowError, RefusedError
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
async def home(stub, tmp_path):
    stub.tokens[SESAME] = "pump-7"
    to = Belonging(stub.url, DeviceId.parse("pump-7"), "cert")
    wish = enrol.Wish(to, FirstProof(token=SESAME), stub.authority.pem, None)
    home = Home(tmp_path / "state")
    await enrol.enrol(home, wish, roll)
    stub.seen.clear()
    return home


async def test_a_rotation_ends_with_the_new_one_active_and_the_old_one_gone(stub, home):
    before = document(home)
    held = await enrol.rotate(home, roll)
    told = document(home)
    assert told["serial"] == held.serial != before["serial"]
    assert (before["slot"], told["slot"]) == ("a", "b")
    assert stub.seen == ["simplereenroll", "whoami", "config", "whoami", "config"]
    assert stub.records[before["serial"]].gone is refusals.CREDENTIAL_SUPERSEDED
    assert stub.resumed[-1], "the second connection resumes the first"


async def test_rotations_take_turns_between_the_slots(stub, home):
    slots = [(await enrol.rotate(home, roll)).slot for _ in range(4)]
    assert slots == ["b", "a", "b", "a"]


async def test_a_psk_rotates_by_generation(stub, tmp_path):
    identity, key = stub.make_psk("pump-8")
    to = Belonging(stub.url, DeviceId.parse("pump-8"), "psk")
    proof = FirstProof(credential=ClientPsk(identity, key))
    home = Home(tmp_path / "psk")
    await enrol.enrol(home, enrol.Wish(to, proof, stub.authority.pem, None), roll)
    for generation in (2, 3):
        held = await enrol.rotate(home, roll)
        assert held.identity == f"pump-8#{generation}"
    assert stub.records["pump-8#2"].gone is refusals.CREDENTIAL_SUPERSEDED


async def test_a_gateway_that_goes_away_leaves_the_old_one_and_the_request(stub, home):
    before = document(home)["serial"]
    stub.refuse["simplereenroll"] = refusals.AWAY
    with pytest.raises(NotNowError) as later:
        await enrol.rotate(home, roll)
    assert later.value.retry_after is not None
    told = document(home)
    assert (told["serial"], told["state"]) == (before, "renewing")
    request = (home.folder / "slots/b/request.der").read_bytes()
    stub.refuse.clear()
    await enrol.rotate(home, roll)
    assert (home.folder / "slots/b/request.der").read_bytes() == request
    assert len(stub.records) == 2


async def test_an_unproven_new_one_is_tried_before_another_is_asked_for(stub, home):
    stub.refuse["whoami"] = refusals.AWAY
    with pytest.raises(NotNowError):
        await enrol.rotate(home, roll)
    assert document(home)["state"] == "proving"
    stub.refuse.clear()
    stub.seen.clear()
    await enrol.rotate(home, roll)
    assert "simplereenroll" not in stub.seen
    assert document(home)["state"] == "enrolled"


async def test_a_refused_rotation_keeps_the_old_one(stub, home):
    before = document(home)["serial"]
    stub.refuse["simplereenroll"] = refusals.DEVICE_REVOKED
    with pytest.raises(RefusedError, match="readmit"):
        await enrol.rotate(home, roll)
    assert document(home)["serial"] == before
    assert document(home)["last"]["outcome"] == "refused"


async def test_a_new_one_that_is_refused_keeps_the_old_one(stub, home):
    before = document(home)["serial"]
    stub.refuse["whoami"] = refusals.CREDENTIAL_REVOKED
    with pytest.raises(RefusedError):
        await enrol.rotate(home, roll)
    assert document(home)["serial"] == before


async def test_a_device_that_never_enrolled_cannot_rotate(tmp_path):
    with pytest.raises(Unusable, match="enroll"):
        await enrol.rotate(Home(tmp_path / "nothing"), roll)


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches the power."""


class FallingDisk(files.Disk):
    """Cuts the power before, in the middle of, or after one of its writes."""

    def __init__(self, at: int, how: str) -> None:
        self.left = at
        self.how = how

    def _falls(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write(self, path, content):
        if not self._falls():
            return super().write(path, content)
        if self.how == "torn":
            super().write(path, content[: len(content) // 2])
        elif self.how == "after":
            super().write(path, content)
        raise PowerCut

    def _whole(self, doing, *args):
        if not self._falls():
            return doing(*args)
        if self.how == "after":
            doing(*args)
        raise PowerCut

    def rename(self, path, to):
        self._whole(super().rename, path, to)

    def sync(self, folder):
        self._whole(super().sync, folder)

    def make_folder(self, folder):
        self._whole(super().make_folder, folder)

    def remove(self, folder):
        self._whole(super().remove, folder)


@pytest.mark.parametrize("how", ["before", "torn", "after"])
async def test_power_cut_at_any_write_of_a_rotation_strands_nobody(stub, home, how):
    cuts = 0
    for at in range(1, 100):
        falling = Home(home.folder, FallingDisk(at, how))
        try:
            await enrol.rotate(falling, roll)
        except PowerCut:
            cuts += 1
        else:
            break
        again = Home(home.folder)
        before = document(again)
        held = await enrol.rotate(again, roll)
        assert document(again)["state"] == "enrolled", (at, before)
        assert stub.records[held.serial].gone is None
    assert cuts > 15, "the test has cut at every write"


@pytest.mark.parametrize("how", ["before", "torn", "after"])
async def test_power_cut_at_any_write_of_an_enrolment_strands_nobody(
    stub, tmp_path, how
):
    stub.tokens[SESAME] = "pump-9"
    to = Belonging(stub.url, DeviceId.parse("pump-9"), "cert")
    wish = enrol.Wish(to, FirstProof(token=SESAME), stub.authority.pem, None)
    cuts = 0
    for at in range(1, 100):
        folder = tmp_path / f"{at}"
        try:
            await enrol.enrol(Home(folder, FallingDisk(at, how)), wish, roll)
        except PowerCut:
            cuts += 1
        else:
            break
        again = Home(folder)
        if enrol.already(again) is None:
            await enrol.enrol(again, wish, roll)
        assert document(again)["state"] == "enrolled"
    assert cuts > 15, "the test has cut at every write"
