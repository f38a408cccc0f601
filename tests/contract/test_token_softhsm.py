"""What only a real token shows: its files, its keys as others see them, its network."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import os
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

from hsm_sim.served import ServedToken
from hsm_sim.tokens import LABEL, make_token
from provisioning.hsm.initialise import find_softhsm, make_softhsm_token
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provisioning.hsm.login import TokenConfig
    from provisioning.hsm.pkcs11 import Pkcs11Token

ECDSA = ec.ECDSA(hashes.SHA256())
DEADLINE_S = 0.5


@pytest.fixture
def config(tmp_path: Path) -> TokenConfig:
    return make_token(tmp_path / "hsm")


@contextmanager
def by_hand(config: TokenConfig) -> Iterator[pkcs11.Session]:
    """A session of python-pkcs11's own, to make keys that we would not make."""
    os.environ["SOFTHSM2_CONF"] = str(config.softhsm_conf)
    library = pkcs11.lib(config.module)
    token = library.get_token(token_label=config.token_label)
    yield token.open(rw=True, user_pin=config.pin.text)
    library.finalize()


def make_pair(
    session: pkcs11.Session,
    label: str,
    template: dict[Attribute, Any] | None = None,
    curve: str = "secp256r1",
    capabilities: MechanismFlag = MechanismFlag.SIGN | MechanismFlag.VERIFY,
) -> None:
    session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}, True
    ).generate_keypair(
        label=label,
        store=True,
        capabilities=capabilities,
        private_template=template or {},
    )


async def check_refuses(config: TokenConfig, match: str, *, secret: bool = False):
    token = await open_token(config)
    labels = ([], ["made"]) if secret else (["made"], [])
    try:
        with pytest.raises(Unusable, match=match) as caught:
            await token.check(*labels)
        assert "'made'" in caught.value.why
    finally:
        await token.close()


# The files -------------------------------------------------------------------


def test_a_tokens_files_are_its_owners_alone(config, tmp_path):
    folder = tmp_path / "hsm"
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, path
    assert str(folder / "tokens") in (folder / "softhsm2.conf").read_text()


async def test_the_files_of_new_keys_are_their_owners_alone(config, tmp_path):
    before = os.umask(0o022)
    try:
        token = await open_token(config)
        await token.make_ec_key("issuing")
        await token.close()
    finally:
        os.umask(before)
    for path in (tmp_path / "hsm" / "tokens").rglob("*"):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_a_second_token_is_not_made_over_the_first(config, tmp_path):
    with pytest.raises(Unusable, match="holds a token already"):
        await make_softhsm_token(
            str(tmp_path / "hsm"), "other", "123456", "123456", config.module
        )
    token = await open_token(config)
    await token.close()


@pytest.mark.parametrize(
    ("label", "pin"), [("", "1234"), ("x" * 33, "1234"), ("x", "123"), ("x", "1" * 256)]
)
async def test_a_label_or_pin_that_softhsm_would_refuse_is_refused(
    tmp_path, label, pin
):
    with pytest.raises(Unusable):
        await make_softhsm_token(
            str(tmp_path / "hsm"), label, pin, "123456", str(find_softhsm())
        )


async def test_a_module_that_makes_no_token_says_why_without_the_pin(tmp_path):
    library = tmp_path / "empty.so"
    library.write_bytes(b"")
    for module in (library, tmp_path / "none.so"):
        with pytest.raises(Unusable, match="cannot be loaded") as caught:
            await make_softhsm_token(
                str(tmp_path / "hsm"), "x", "987654", "876543", str(module)
            )
        assert "987654" not in str(caught.value)
        assert "876543" not in str(caught.value)


async def test_pins_are_not_among_the_arguments_of_any_process(tmp_path, monkeypatch):
    """The child is another program here, which keeps what it was started with."""
    seen = tmp_path / "seen"
    spy = tmp_path / "python"
    spy.write_text(f'#!/bin/sh\necho "$@" > {seen}\nenv >> {seen}\n')
    spy.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(spy))
    await make_softhsm_token(
        str(tmp_path / "hsm"), "x", "987654", "876543", str(find_softhsm())
    )
    text = seen.read_text()
    assert "provisioning.hsm.initialise" in text
    assert "987654" not in text
    assert "876543" not in text


# The keys ----------------------------------------------------------------------


async def test_hmac_is_rfc_2104s(config):
    with by_hand(config) as session:
        session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                Attribute.LABEL: "known",
                Attribute.VALUE: b"k" * 32,
                Attribute.SIGN: True,
                Attribute.TOKEN: True,
            }
        )
    token = await open_token(config)
    wanted = hmac.digest(b"k" * 32, b"message", hashlib.sha256)
    assert await token.hmac("known", b"message") == wanted
    await token.close()


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ({Attribute.EXTRACTABLE: True}, "CKA_EXTRACTABLE is not false"),
        ({Attribute.SENSITIVE: False}, "CKA_SENSITIVE is not true"),
        ({Attribute.DERIVE: True}, "CKA_DERIVE is not false"),
        ({Attribute.DECRYPT: True}, "CKA_DECRYPT is not false"),
        ({Attribute.UNWRAP: True}, "CKA_UNWRAP is not false"),
        ({Attribute.PRIVATE: False}, "CKA_PRIVATE is not true"),
        ({Attribute.SIGN: False}, "CKA_SIGN is not true"),
    ],
)
async def test_a_key_that_may_do_too_much_or_too_little_is_named(
    config, template, named
):
    with by_hand(config) as session:
        make_pair(session, "made", template)
    await check_refuses(config, named)


async def test_a_key_of_another_curve_is_named(config):
    with by_hand(config) as session:
        make_pair(session, "made", curve="secp384r1")
    await check_refuses(config, "not a P-256 key")


async def test_a_public_key_of_another_key_is_named(config):
    with by_hand(config) as session:
        make_pair(session, "made")
        make_pair(session, "other")
        mine = session.get_key(ObjectClass.PUBLIC_KEY, label="made")
        others = session.get_key(ObjectClass.PUBLIC_KEY, label="other")
        mine[Attribute.LABEL] = "another"
        others[Attribute.LABEL] = "made"
    await check_refuses(config, "another key's")


async def test_two_keys_of_one_label_are_not_chosen_between(config):
    with by_hand(config) as session:
        make_pair(session, "made")
        make_pair(session, "made")
    await check_refuses(config, "2 objects of kind private key")


@pytest.mark.parametrize(
    ("bits", "template", "named"),
    [
        (256, {Attribute.EXTRACTABLE: True}, "CKA_EXTRACTABLE is not false"),
        (256, {Attribute.SENSITIVE: False}, "CKA_SENSITIVE is not true"),
        (256, {Attribute.SIGN: False}, "CKA_SIGN is not true"),
        (256, {Attribute.WRAP: True}, "CKA_WRAP is not false"),
        (128, {}, "CKA_VALUE_LEN is 16, not 32"),
    ],
)
async def test_a_secret_that_is_not_as_it_must_be_is_named(
    config, bits, template, named
):
    with by_hand(config) as session:
        session.generate_key(
            KeyType.GENERIC_SECRET,
            bits,
            label="made",
            store=True,
            capabilities=MechanismFlag.SIGN,
            template={Attribute.EXTRACTABLE: False} | template,
        )
    await check_refuses(config, named, secret=True)


async def test_a_key_that_may_not_sign_is_the_operators(config):
    with by_hand(config) as session:
        make_pair(session, "made", {Attribute.SIGN: False})
    token = await open_token(config)
    with pytest.raises(Unusable, match="KEY_FUNCTION_NOT_PERMITTED"):
        await token.use("made", lambda key: key.sign(b"x", ECDSA))
    await token.close()


def tool(config: TokenConfig, *argv: str | Path) -> str:
    program = shutil.which("pkcs11-tool")
    if program is None:
        pytest.skip("pkcs11-tool is missing; install the package opensc")
    environment = os.environ | {
        "SOFTHSM2_CONF": str(config.softhsm_conf),
        "PIN": config.pin.text,
    }
    done = subprocess.run(
        [program, "--module", config.module, "--token-label", LABEL, *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=15,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_pkcs11_tool_sees_keys_that_only_sign_and_never_leave(config, tmp_path):
    token = await open_token(config)
    public = await token.make_ec_key("issuing")
    await token.make_hmac_key("psk-master")
    await token.close()
    shown = tool(config, "--login", "--pin", "env:PIN", "--list-objects")
    blocks = shown.split("\n\n")[0]
    private = blocks[blocks.index("Private Key Object; EC") :]
    assert "sensitive, always sensitive, never extractable, local" in private
    usages = {
        word
        for line in shown.splitlines()
        if "Usage:" in line
        for word in line.split(":")[1].split(", ")
    }
    assert {usage.strip() for usage in usages} <= {"sign", "verify", "none"}
    digest = tmp_path / "digest"
    digest.write_bytes(hashlib.sha256(b"data").digest())
    tool(
        config,
        "--login",
        "--pin",
        "env:PIN",
        "--sign",
        "--mechanism",
        "ECDSA",
        "--label",
        "issuing",
        "--signature-format",
        "openssl",
        "--input-file",
        digest,
        "--output-file",
        tmp_path / "signature",
    )
    public.verify((tmp_path / "signature").read_bytes(), b"data", ECDSA)


# Processes and the network -------------------------------------------------------

FORK = """
import asyncio, os, sys
from provisioning.hsm.pin import Pin
from provisioning.hsm.pkcs11 import TokenConfig, open_token

config = TokenConfig(sys.argv[1], sys.argv[2], Pin(os.environ["PIN"]), sys.argv[3])

async def derive():
    token = await open_token(config)
    derived = await token.hmac("psk-master", b"pump-7")
    return token, derived

async def parent():
    token = await open_token(config)
    await token.make_hmac_key("psk-master")
    await token.close()
    return await derive()

loop = asyncio.new_event_loop()
token, derived = loop.run_until_complete(parent())
child = os.fork()
if child == 0:
    code = 1
    try:
        _, again = asyncio.new_event_loop().run_until_complete(derive())
        code = 0 if again == derived else 2
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
again = loop.run_until_complete(token.hmac("psk-master", b"pump-7"))
loop.run_until_complete(token.close())
sys.exit(os.waitstatus_to_exitcode(status) or again != derived)
"""


def test_a_child_after_fork_opens_the_token_for_itself(config):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FORK,
            config.module,
            config.token_label,
            str(config.softhsm_conf),
        ],
        env=os.environ | {"PIN": config.pin.text},
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 0, done.stderr


async def test_tokens_of_one_module_are_used_one_after_another(tmp_path):
    configs = [make_token(tmp_path / "first"), make_token(tmp_path / "second")]
    derived = []
    for config in (*configs, *configs):
        token = await open_token(config)
        if len(derived) < len(configs):
            await token.make_hmac_key("psk-master")
        derived.append(await token.hmac("psk-master", b"pump-7"))
        await token.close()
    assert derived[:2] == derived[2:]
    assert derived[0] != derived[1]


async def test_a_module_that_was_finalised_behind_our_back_is_opened_again(config):
    token = await open_token(config)
    await token.make_hmac_key("psk-master")
    derived = await token.hmac("psk-master", b"x")
    pkcs11.lib(config.module).finalize()
    assert await eventually(token, derived)
    await token.close()


async def eventually(token: Pkcs11Token, derived: bytes) -> bool:
    """Whether the token gives this once it is back; the test's own limit ends it."""
    while True:
        try:
            return await token.hmac("psk-master", b"x") == derived
        except Unavailable:
            await asyncio.sleep(0.02)


@pytest.fixture
async def served(config):
    token = await open_token(config)
    await token.make_hmac_key("psk-master")
    await token.make_ec_key("issuing")
    await token.close()
    with ServedToken(dataclasses.replace(config, deadline_s=DEADLINE_S)) as server:
        token = await open_token(server.config)
        yield server, token
        server.thaw()
        await token.close()


async def test_a_network_hsm_that_was_cut_comes_back_by_itself(served):
    server, token = served
    derived = await token.hmac("psk-master", b"x")
    server.cut()
    with pytest.raises(Unavailable):
        await token.hmac("psk-master", b"x")
    with pytest.raises(Unavailable):
        await token.use("issuing", lambda key: key.sign(b"x", ECDSA))
    server.start()
    assert await eventually(token, derived)


async def test_a_network_hsm_that_is_frozen_holds_up_its_callers_only(served):
    server, token = served
    derived = await token.hmac("psk-master", b"x")
    await token.use("issuing", lambda key: key.sign(b"x", ECDSA))
    server.freeze()
    with pytest.raises(OutcomeUnknown):
        await token.use("issuing", lambda key: key.sign(b"x", ECDSA))
    with pytest.raises(Unavailable):
        await token.hmac("psk-master", b"x")
    server.thaw()
    assert await eventually(token, derived)


async def test_a_network_hsm_that_was_frozen_and_restarted_comes_back(served):
    server, token = served
    derived = await token.hmac("psk-master", b"x")
    server.freeze()
    with pytest.raises(Unavailable):
        await token.hmac("psk-master", b"x")
    server.cut()
    server.start()
    assert await eventually(token, derived)


async def test_a_network_hsm_that_is_away_at_first_is_waited_for(config):
    token = await open_token(config)
    await token.make_hmac_key("psk-master")
    derived = await token.hmac("psk-master", b"x")
    await token.close()
    server = ServedToken(dataclasses.replace(config, deadline_s=DEADLINE_S))
    token = await open_token(server.config)
    assert token.trouble is not None
    with server:
        assert await eventually(token, derived)
        assert token.trouble is None
        await token.close()
