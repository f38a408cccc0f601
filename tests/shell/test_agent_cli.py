"""What people meet: exit codes, one sentence each, and never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest
from stub_gateway import serving

from device_agent.cli import main
from provisioning.model import refusals

SESAME, GUESS = "open-sesame", "guess"
MINIMAL = ("enroll", "--gateway", "https://localhost:1", "--device-id", "pump-7")


@pytest.fixture
async def stub():
    async with serving() as made:
        yield made


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("open-sesame\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def ca_file(tmp_path, authority):
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.root.pem)
    return path


def usage(state, *argv):
    return main(["--state", str(state), *map(str, argv)])


async def agent(state, *argv, stdin=b"", token=None):
    """The agent as a process of its own: exit code, output, errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "device_agent.cli", "--state", str(state)),
        *map(str, argv),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **({"BIRTHMARK_TOKEN": token} if token else {})},
    )
    out, err = await process.communicate(stdin)
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


def how(stub, tmp_path):
    ca = tmp_path / "stub.pem"
    ca.write_bytes(stub.authority.pem)
    return ("enroll", "--gateway", stub.url, "--ca-file", ca)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("dance",),
        ("enroll",),
        MINIMAL,
        (*MINIMAL, "--ca-sha256", "00"),
        (*MINIMAL, "--ca-sha256", "no hex"),
        (*MINIMAL, "--ca-file", "absent.pem"),
        (*MINIMAL, "--ca-file", os.devnull),
        (*MINIMAL, "--ca-sha256", "00" * 32, "--mode", "psk"),
        (*MINIMAL, "--ca-sha256", "00" * 32, "--cert", "c.pem"),
        (*MINIMAL, "--ca-sha256", "00" * 32, "--key", "k.pem"),
        (*MINIMAL, "--ca-sha256", "00" * 32, "--psk-file", "absent"),
    ],
    ids=lambda argv: " ".join(argv[-2:]) or "nothing",
)
def test_wrong_usage_is_2_and_one_sentence(state, argv, capsys):
    assert usage(state, *argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("birthmark-agent: ")
    assert said.count("\n") == 1
    assert not state.exists()


@pytest.mark.parametrize(
    "given",
    [
        ("--gateway", "http://localhost:1"),
        ("--gateway", "https://user:pw@localhost:1"),
        ("--device-id", "under_score"),
        ("--device-id", "-"),
    ],
)
def test_what_cannot_be_meant_is_2(state, token_file, ca_file, given, capsys):
    argv = (*MINIMAL, "--token-file", token_file, "--ca-file", ca_file, *given)
    assert usage(state, *argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_token_that_others_may_read_is_2(state, token_file, ca_file, capsys):
    token_file.chmod(0o644)
    argv = (*MINIMAL, "--token-file", token_file, "--ca-file", ca_file)
    assert usage(state, *argv) == 2
    assert "chmod 600" in capsys.readouterr().err


def test_a_psk_for_another_device_is_2(state, tmp_path, ca_file, capsys):
    psk = tmp_path / "psk"
    psk.write_text(json.dumps({"identity": "pump-8#1", "key": "6b" * 32}))
    psk.chmod(0o600)
    argv = (*MINIMAL, "--psk-file", psk, "--ca-file", ca_file)
    assert usage(state, *argv) == 2
    said = capsys.readouterr().err
    assert "pump-8" in said
    assert "6b6b" not in said


def test_without_device_id_and_nothing_that_says_it_is_2(
    state, token_file, ca_file, capsys
):
    argv = [*MINIMAL[:3], "--token-file", token_file, "--ca-file", ca_file]
    assert usage(state, *argv) == 2
    assert "--device-id" in capsys.readouterr().err


async def test_a_psk_says_who_the_device_is(stub, state, tmp_path):
    identity, key = stub.make_psk("pump-7")
    psk = tmp_path / "psk"
    psk.write_text(json.dumps({"identity": identity, "key": key.hex()}))
    psk.chmod(0o600)
    code, _, err = await agent(state, *how(stub, tmp_path), "--psk-file", psk)
    assert code == 0, err
    code, out, _ = await agent(state, "status", "--json")
    told = json.loads(out)
    assert (told["device"], told["identity"]) == ("pump-7", "pump-7#1")


async def test_a_factory_certificate_says_who_the_device_is(stub, state, tmp_path):
    stub.tokens["open-sesame"] = "pump-7"
    first = tmp_path / "first"
    enroll = (*how(stub, tmp_path), "--device-id", "pump-7")
    code, _, err = await agent(first, *enroll, token=SESAME)
    assert code == 0, err
    old = first / "slots/a"
    proof = ("--cert", old / "chain.pem", "--key", old / "key.pem")
    code, out, err = await agent(state, *how(stub, tmp_path), *proof, "--json")
    assert code == 0, err
    assert json.loads(out)["device"] == "pump-7"


async def test_a_token_comes_by_standard_input_too(stub, state, tmp_path):
    stub.tokens["open-sesame"] = "pump-7"
    enroll = (*how(stub, tmp_path), "--device-id", "pump-7", "--token-file", "-")
    code, _, err = await agent(state, *enroll, stdin=b"open-sesame\n")
    assert code == 0, err
    code, out, _ = await agent(state, *enroll, stdin=b"used up")
    assert code == 0
    assert "already" in out
    assert stub.seen.count("simpleenroll") == 1, "the second time without network"


async def test_a_refusal_is_3_in_the_gateways_words(stub, state, tmp_path):
    enroll = (*how(stub, tmp_path), "--device-id", "pump-7", "--json")
    code, out, err = await agent(state, *enroll, token=GUESS)
    assert code == 3
    assert refusals.TOKEN_REFUSED.sentence in err
    assert json.loads(out) == {
        "code": "token_refused",
        "detail": refusals.TOKEN_REFUSED.sentence,
        "retryable": False,
    }


async def test_told_to_wait_is_4(stub, state, tmp_path):
    stub.refuse["simpleenroll"] = refusals.AWAY
    enroll = (*how(stub, tmp_path), "--device-id", "pump-7")
    code, _, _ = await agent(state, *enroll, token=GUESS)
    assert code == 4


@pytest.mark.parametrize("command", ["run", "rotate"])
def test_without_a_credential_run_and_rotate_are_5(state, command, capsys):
    assert usage(state, command) == 5
    assert "enroll" in capsys.readouterr().err


def test_a_folder_that_others_may_enter_is_5(state, capsys):
    state.mkdir()
    (state / "x").touch()
    state.chmod(0o755)
    for command in ("run", "rotate", "status"):
        assert usage(state, command) == 5
    assert "chmod 700" in capsys.readouterr().err


async def test_a_stranger_is_6(stub, state, tmp_path):
    pin = ("--ca-sha256", "00" * 32)
    enroll = ("enroll", "--gateway", stub.url, *pin, "--device-id", "pump-7")
    code, _, err = await agent(state, *enroll, token=GUESS)
    assert code == 6
    assert "SHA-256" in err


def test_status_of_nothing_is_nothing_and_0(state, capsys):
    assert usage(state, "status", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] is None
    assert told["state"] == "fresh"
    assert usage(state, "status") == 0


async def test_two_rotations_at_once_are_one_after_the_other(stub, state, tmp_path):
    stub.tokens[SESAME] = "pump-7"
    enroll = (*how(stub, tmp_path), "--device-id", "pump-7")
    code, _, err = await agent(state, *enroll, token=SESAME)
    assert code == 0, err
    both = await asyncio.gather(agent(state, "rotate"), agent(state, "rotate"))
    assert [code for code, _, _ in both] == [0, 0]
    assert stub.seen.count("simplereenroll") == 2
