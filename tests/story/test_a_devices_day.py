"""A device's life from the factory to its end, through the commands alone.

Three people use Birthmark: the one at the station, the one in the field, and the
operator of the fleet. What they type is what these tests type.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from gateway_process import BIN, until

if TYPE_CHECKING:
    from pathlib import Path

    from gateway_process import GatewayProcess

DONE, REFUSED = 0, 3
LIVES_WITH = re.compile(r"rotated: lives with ([0-9a-f]+) now")


@dataclass
class Board:
    """One device: its agent's state folder, and the gateway it belongs to."""

    gateway: GatewayProcess
    folder: Path
    name: str
    pin: str

    def agent(self, *argv: object, code: int = DONE) -> str:
        """`birthmark-agent ARGV`; what it said, both streams."""
        state = self.folder / "state"
        done = subprocess.run(
            [str(BIN / "birthmark-agent"), "--state", str(state), *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=18,
            check=False,
        )
        assert done.returncode == code, (argv, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def enroll(self, *argv: object, code: int = DONE) -> str:
        url = self.gateway.url()
        trust = ("--ca-sha256", self.pin)
        return self.agent("enroll", "--gateway", url, *trust, *argv, code=code)

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.agent("status", "--json"))

    @property
    def shown(self) -> dict[str, Any]:
        """What the operator sees of it."""
        return self.gateway.command("devices", "show", self.name)

    def secret(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    @contextmanager
    def running(self):
        """`birthmark-agent run`; ended by SIGTERM, which it takes well."""
        journal = self.folder / "journal"
        state = self.folder / "state"
        with journal.open("w") as out:
            process = subprocess.Popen(
                [str(BIN / "birthmark-agent"), "--state", str(state), "run"],
                stderr=out,
            )
        try:
            yield journal
            process.terminate()
            assert process.wait(10) == DONE, journal.read_text()
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def pin(gateway):
    """The root's SHA-256, as the operator reads it off `ca show`."""
    cas = gateway.command("ca", "show")["cas"]
    return next(ca["sha256"] for ca in cas if ca["name"] == "root")


@pytest.fixture
def board(gateway, tmp_path, pin):
    def made(name: str) -> Board:
        folder = tmp_path / name
        folder.mkdir()
        return Board(gateway, folder, name, pin)

    return made


def at_the_station(board: Board) -> tuple[Path, Path]:
    """A key and a factory certificate, by openssl and curl with a station's token."""
    for name, package in (("openssl", "openssl"), ("curl", "curl")):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: apt-get install {package}")
    token = board.gateway.command(
        "token", "create", "--device", board.name, "--profile", "idevid"
    )["token"]
    key, cert = board.folder / "idevid.key", board.folder / "idevid.crt"
    subject = f"/serialNumber={board.name}/CN={board.name}"
    request = subprocess.run(
        [
            *("openssl", "req", "-new", "-newkey", "ec", "-nodes", "-outform", "DER"),
            *("-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", key, "-subj", subject),
        ],
        capture_output=True,
        check=True,
    ).stdout
    root = board.folder / "root.pem"
    exported = board.gateway.run("ca", "export").stdout
    root.write_text(exported)
    url = board.gateway.url("/.well-known/est/idevid/simpleenroll")
    answer = subprocess.run(
        # The token by standard input, since arguments are everybody's to read.
        ["curl", "-sSf", "--cacert", root, "-K", "-", url],
        input=(
            f'user = "{board.name}:{token}"\n'
            'header = "Content-Type: application/pkcs10"\n'
            f'data = "{base64.b64encode(request).decode()}"\n'
        ).encode(),
        capture_output=True,
        check=True,
    ).stdout
    pem = subprocess.run(
        ["openssl", "pkcs7", "-inform", "DER", "-print_certs"],
        input=base64.b64decode(answer),
        capture_output=True,
        check=True,
    ).stdout
    cert.write_bytes(pem)
    return cert, key


def test_from_the_factory_to_the_field(board):
    """The factory identity is for life; with it the device gets the one it works by."""
    pump = board("story-pump")
    cert, key = at_the_station(pump)
    said = pump.enroll("--cert", cert, "--key", key)
    assert "story-pump" in said
    held = pump.status
    assert (held["device"], held["mode"]) == ("story-pump", "cert")
    assert "nothing to do" in pump.enroll("--cert", cert, "--key", key)
    shown = pump.shown
    assert shown["state"] == "enrolled"
    by_profile = {one["profile"]: one for one in shown["credentials"]}
    assert set(by_profile) == {"idevid", "ldevid"}
    assert by_profile["idevid"]["not_after"] is None  # it has no end
    assert by_profile["ldevid"]["serial"] == held["serial"]
    assert shown["last_seen"]["auth"] == "certificate"


def test_a_device_that_knows_a_psk_alone_lives_with_it(board):
    """It rotates as well: by generations."""
    valve = board("story-valve")
    made = json.dumps(valve.gateway.command("psk", "create", valve.name))
    valve.enroll("--psk-file", valve.secret("psk.json", made))
    assert valve.status["identity"] == "story-valve#1"
    valve.agent("rotate")
    assert valve.status["identity"] == "story-valve#2"
    shown = valve.shown["credentials"]
    assert [one["state"] for one in shown] == ["superseded", "active"]


def test_a_psk_is_traded_for_a_certificate(board):
    meter = board("story-meter")
    made = json.dumps(meter.gateway.command("psk", "create", meter.name))
    meter.enroll("--psk-file", meter.secret("psk.json", made), "--mode", "cert")
    held = meter.status
    assert held["mode"] == "cert"
    assert held["serial"] in [one["serial"] for one in meter.shown["credentials"]]


def enrolled(board: Board) -> str:
    """By an operator's token; the serial it begins with."""
    token = board.gateway.command("token", "create", "--device", board.name)["token"]
    file = board.secret("token", token)
    board.enroll("--device-id", board.name, "--token-file", file)
    return board.status["serial"]


def test_a_day_at_work_with_a_rotation_in_it(board):
    """It runs; the operator has it rotate; nobody touches the device."""
    fan = board("story-fan")
    first = enrolled(fan)
    with fan.running() as journal:
        until(lambda: fan.status["connected"])
        fan.gateway.command("devices", "rotate", fan.name)
        second = until(lambda: LIVES_WITH.search(journal.read_text()))[1]
        shown = until(lambda: _settled(fan))
        assert [one["serial"] for one in shown["credentials"]] == [first, second]


def test_the_end_of_a_device_and_what_it_is_told(board):
    """Revoked while it runs, it learns why; and so does whoever tries to help it."""
    lamp = board("story-lamp")
    serial = enrolled(lamp)
    with lamp.running() as journal:
        until(lambda: lamp.status["connected"])
        revoked = lamp.gateway.command(
            "devices", "revoke", lamp.name, "--reason", "keyCompromise"
        )
        assert revoked["revoked"] == [serial]
        assert revoked["not_applied"] == []
        until(lambda: "revoked" in journal.read_text())
    said = lamp.agent("rotate", code=REFUSED)
    assert "only the fleet operator can readmit it" in said
    assert lamp.status["last"]["outcome"] == "refused"


def _settled(fan: Board) -> dict[str, Any] | None:
    """Its old certificate has ended, the new one is in use."""
    shown = fan.shown
    states = [one["state"] for one in shown["credentials"]]
    return shown if states == ["superseded", "active"] else None


def test_who_may_not_come_in_is_told_what_to_do(board):
    """A spent token, a stranger's gateway: each with its exit code and a sentence."""
    stray = board("story-stray")
    token = stray.secret("token", "not-a-token-of-anybody")
    who = ("--device-id", stray.name, "--token-file", token)
    assert "ask the fleet operator" in stray.enroll(*who, code=REFUSED)
    stray.pin = "00" * 32
    assert "ca show" in stray.enroll(*who, code=6)
