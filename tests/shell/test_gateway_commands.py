"""The operators' commands: what they print, how they fail, and what they refuse.

Most run in this process by the command's own `main`, which is quick; what is said of
exit codes is said of processes once, too.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from device_client import Device, issued
from gateway_process import GatewayProcess, missing

from gateway.cli.main import main
from gateway.cli.output import OUT
from gateway.operators.desk import open_desk
from provisioning.model.events import INITIALISED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REFUSED, USAGE = 1, 2


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        return json.loads(self.out)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """An initialised data directory that nobody serves."""
    if lacking := missing():
        pytest.skip(lacking)
    made = GatewayProcess(tmp_path_factory.mktemp("laid-out"))
    made.initialise()
    return made.data


@pytest.fixture
def data(laid_out, tmp_path):
    """A copy of it, to be broken."""
    copy = tmp_path / "data"
    shutil.copytree(laid_out, copy, symlinks=True)
    conf = copy / "hsm" / "softhsm2.conf"
    conf.write_text(conf.read_text().replace(str(laid_out), str(copy)))
    return copy


@pytest.fixture
def birthmark(monkeypatch, capsys) -> Callable[..., Done]:
    """`birthmark ARGV`, in this process."""

    def run(*argv: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["birthmark", *map(str, argv)])
        monkeypatch.setattr(OUT, "folder", None)
        monkeypatch.setattr(OUT, "json", False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Done(ended.value.code or 0, out, err)

    return run


def failed(done: Done, code: int, name: str) -> str:
    """It failed so, and said so in one document and one line; the sentence."""
    assert done.code == code, done
    document = done.document
    assert set(document) == {"code", "detail", "retryable"}
    assert document["code"] == name
    assert document["detail"]
    assert document["detail"].splitlines()[0] in done.err
    return document["detail"]


# Usage ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["devices", "show"],
        ["devices", "show", "a", "b"],
        ["token", "create", "--uses", "0"],
        ["token", "create", "--uses", "many"],
        ["token", "create", "--ttl", "soon"],
        ["token", "create", "--ttl", "0"],
        ["devices", "rotate", "pump", "--within", "yesterday"],
        ["init", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(laid_out, birthmark, argv):
    failed(birthmark("--data", laid_out, *argv, "--json"), USAGE, "usage")


def test_an_error_for_people_is_one_line(laid_out, birthmark):
    done = birthmark("--data", laid_out, "devices", "show", "nobody")
    assert (done.code, done.out) == (REFUSED, "")
    assert done.err == "birthmark: No device nobody is registered here.\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["devices", "show", "nobody"], "device_unknown"),
        (["devices", "show", "no_body"], "device_id_malformed"),
        (["devices", "revoke", "nobody"], "device_unknown"),
        (["devices", "revoke", "nobody", "--reason", "spite"], "argument_malformed"),
        (["devices", "revoke", "nobody", "--serial", "xyz"], "serial_malformed"),
        (["devices", "list", "--state", "asleep"], "argument_malformed"),
        (["devices", "list", "--limit", "0"], "argument_malformed"),
        (["devices", "rotate", "nobody"], "device_unknown"),
        (["token", "create", "--device", "a:b"], "device_id_malformed"),
        (["token", "create", "--profile", "nothing"], "profile_unknown"),
        (["token", "create", "--profile", "server"], "profile_not_allowed"),
        (["token", "revoke", "t999"], "token_unknown"),
        (["psk", "create", "-pump"], "usage"),
        (["ca", "export", "--format", "xml"], "argument_malformed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_has_the_code_of_the_table(laid_out, birthmark, argv, code):
    done = birthmark("--data", laid_out, *argv, "--json")
    failed(done, USAGE if code == "usage" else REFUSED, code)


def test_ids_that_differ_in_case_alone_are_refused(laid_out, birthmark):
    assert (
        birthmark("--data", laid_out, "token", "create", "--device", "Pump").code == 0
    )
    done = birthmark(
        "--data", laid_out, "token", "create", "--device", "pUMP", "--json"
    )
    failed(done, REFUSED, "device_id_case")


def test_json_and_data_may_stand_anywhere(laid_out, birthmark, monkeypatch):
    for argv in (
        ("--json", "--data", laid_out, "token", "list"),
        ("token", "list", f"--data={laid_out}", "--json"),
        ("token", "--data", laid_out, "--json", "list"),
    ):
        assert "tokens" in birthmark(*argv).document
    monkeypatch.setenv("BIRTHMARK_DATA", str(laid_out))
    assert "tokens" in birthmark("token", "list", "--json").document


# Life without a gateway -----------------------------------------------------------
def test_a_fleet_is_listed_in_pages(data, birthmark):
    for n in range(5):
        birthmark("--data", data, "token", "create", "--device", f"page-{n}")
    seen, cursor = [], []
    for _ in range(5):
        done = birthmark(
            "--data", data, "devices", "list", "--json", "--limit", 2, *cursor
        )
        seen += [one["id"] for one in done.document["devices"]]
        if done.document["next"] is None:
            break
        cursor = ["--cursor", done.document["next"]]
    assert seen == sorted(seen, key=str.lower)
    assert {f"page-{n}" for n in range(5)} <= set(seen)
    assert len(seen) == len(set(seen))


def test_a_token_is_printed_once_and_listed_without_its_secret(data, birthmark):
    made = birthmark(
        "--data", data, "token", "create", "--uses", 3, "--ttl", "2h", "--json"
    ).document
    listed = birthmark("--data", data, "token", "list", "--json")
    assert made["token"] not in listed.out
    (row,) = [t for t in listed.document["tokens"] if t["id"] == made["id"]]
    assert (row["uses"], row["used"], row["device"]) == (3, 0, None)
    done = birthmark("--data", data, "token", "revoke", made["id"], "--json")
    assert done.document["revoked"] is True


def test_the_hierarchy_is_shown_with_its_fingerprints(data, birthmark):
    shown = birthmark("--data", data, "ca", "show", "--json").document["cas"]
    by_name = {one["name"]: one for one in shown}
    assert set(by_name) == {"root", "factory", "issuing"}
    assert by_name["factory"]["profiles"] == ["idevid"]
    assert by_name["root"]["not_after"] is None
    init = birthmark("--data", data, "init", "--json").document
    assert init["sha256"] == by_name["root"]["sha256"]
    assert init["created"] is False


def test_revoking_works_with_no_gateway_to_be_told(data, birthmark):
    birthmark("--data", data, "token", "create", "--device", "unborn")
    done = birthmark("--data", data, "devices", "revoke", "unborn", "--json")
    assert done.document["device"] == "unborn"
    assert done.document["revoked"] == []
    assert done.document["not_applied"] == []
    done = birthmark("--data", data, "devices", "resume", "unborn", "--json")
    failed(done, REFUSED, "state_not_allowed")


# Broken configuration ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("[limits]\nhandshakes = = 3\n", "TOML"),
        ("[limits]\nhandshakes = -1\n", "whole number"),
        ('[limits]\nhandshake_deadline = "soon"\n', "duration"),
        ("[limits]\npatience = 1\n", "unknown"),
        ("[listen.https]\nport = 70000\n", "0 to 65535"),
        ('[profiles.x]\nlike = "nothing"\n', "no profile"),
        ("[nonsense]\n", "unknown"),
    ],
    ids=lambda value: value.split("\n")[1] or value if "\n" in value else "",
)
@pytest.mark.parametrize("command", [("gateway",), ("devices", "list")], ids=" ".join)
def test_a_broken_configuration_names_file_and_line(
    data, birthmark, broken, words, command
):
    path = data / "birthmark.toml"
    table = broken.partition("\n")[0]
    lines = [line for line in path.read_text().splitlines() if line != table]
    if table == "[listen.https]":
        lines = [line for line in lines if not line.startswith("port")]
    path.write_text("\n".join(lines) + "\n" + broken)
    told = failed(birthmark("--data", data, *command, "--json"), USAGE, "config")
    last = len(path.read_text().splitlines())
    assert f"birthmark.toml:{last}" in told or f"birthmark.toml:{last - 1}" in told
    assert words in told


def test_no_data_directory_says_what_makes_one(tmp_path, birthmark):
    done = birthmark("--data", tmp_path / "nowhere", "gateway", "--json")
    assert "birthmark init" in failed(done, REFUSED, "unusable")
    (tmp_path / "empty").mkdir(mode=0o700)
    done = birthmark("--data", tmp_path / "empty", "gateway", "--json")
    assert "birthmark init" in failed(done, USAGE, "config")


# What a gateway refuses to start with -----------------------------------------------
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("birthmark.toml", 0o644),
        ("registry.sqlite3", 0o640),
        ("server/key.pem", 0o604),
        ("server", 0o755),
        ("hsm/pin", 0o440),
        ("hsm/tokens", 0o770),
        ("run", 0o750),
        (".", 0o755),
    ],
)
def test_what_others_may_read_is_refused_with_the_remedy(data, birthmark, path, mode):
    found = data / path
    found.chmod(mode)
    told = failed(birthmark("--data", data, "gateway", "--json"), REFUSED, "unusable")
    assert str(found.resolve()) in told
    assert "chmod go-rwx" in told


def test_what_is_public_may_be_read(data, birthmark):
    """The twin: certificates and CRLs are for everybody."""
    assert (data / "public" / "ca" / "root.crt").stat().st_mode & 0o777 == 0o644
    assert birthmark("--data", data, "devices", "list", "--json").code == 0


def test_a_port_that_is_taken_is_named(data, birthmark):
    path = data / "birthmark.toml"
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - as the gateway
        port = taken.getsockname()[1]
        text = path.read_text().replace(
            "[listen.https]\nport", "[listen.https]\n# port"
        )
        path.write_text(
            text.replace("[listen.https]\n", f"[listen.https]\nport = {port}\n")
        )
        done = birthmark("--data", data, "gateway", "--json")
    told = failed(done, REFUSED, "unusable")
    assert str(port) in told
    assert "listen.https.port" in told


def test_a_clock_behind_the_registry_is_refused(data, birthmark):
    async def from_the_future():
        async with open_desk(data) as desk:
            tomorrow = datetime.now(UTC) + timedelta(days=1)
            await desk.registry.add_audit(INITIALISED, {}, tomorrow, "a test")

    asyncio.run(from_the_future())
    told = failed(birthmark("--data", data, "gateway", "--json"), REFUSED, "unusable")
    assert "set the clock" in told


def test_a_registry_that_was_never_made_is_refused(data, birthmark):
    for one in data.glob("registry.sqlite3*"):
        one.unlink()
    told = failed(birthmark("--data", data, "gateway", "--json"), REFUSED, "unusable")
    assert "upgrade" in told or "init" in told


def test_a_wrong_pin_is_refused_and_not_told(data):
    """In a process of its own: the module remembers its configuration."""
    (data / "hsm" / "pin").write_text("not-the-pin-4711\n")
    done = GatewayProcess(data.parent, data).run("gateway", "--json")
    assert done.returncode == REFUSED
    assert json.loads(done.stdout)["code"] == "unusable"
    assert "PIN" in done.stderr
    assert "4711" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_exit_codes_are_those_of_the_process_too(data):
    at = GatewayProcess(data.parent, data)
    assert at.run("devices", "show", "nobody", "--json").returncode == REFUSED
    (data / "birthmark.toml").write_text("nonsense = [\n]]\n")
    done = at.run("gateway", "--json")
    assert done.returncode == USAGE
    assert "birthmark.toml:2" in json.loads(done.stdout)["detail"]


# Secrets ----------------------------------------------------------------------------
def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_no_secret_is_in_the_log_or_in_the_registry(gateway, field):
    """Neither token nor PSK nor PIN, in any of the forms in which they are written."""
    token = await gateway.token("keeps-secrets")
    pump = Device("keeps-secrets")
    async with field.https() as http:
        pump.certificate = issued(await http.enroll(pump.csr, basic=(pump.name, token)))
        refused = await http.enroll(pump.csr, basic=("keeps-other", token))
        assert token not in str(refused)
    psk = await field.psk_of(pump.proof)
    assert (await field.whoami(psk)).status == 200
    async with field.mqtt(psk) as mqtt:
        assert (await mqtt.connect()).code == 0
    pin = (gateway.data / "hsm" / "pin").read_bytes().strip()
    secrets = {
        "token": [token.encode()],
        "PSK": [psk.key, psk.key.hex().encode()],
        "PIN": [pin],
    }
    kept = {
        path: octets
        for path, octets in files_below(gateway.data).items()
        if path.relative_to(gateway.data).parts[0] != "hsm"
    }
    kept[gateway.log] = gateway.log.read_bytes()
    assert any(path.name.startswith("registry") for path in kept)
    for name, forms in secrets.items():
        for path, octets in kept.items():
            for form in forms:
                assert form not in octets, f"{name} in {path}"
    # And the process itself shows none to its neighbours.
    with open(f"/proc/{gateway.process.pid}/cmdline", "rb") as file:  # noqa: ASYNC230, PTH123 - the kernel's file
        line = file.read()
    assert not any(form in line for forms in secrets.values() for form in forms)
