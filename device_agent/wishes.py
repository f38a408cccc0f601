"""Turns the arguments of `enroll` and the files they name into a checked wish."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from device_agent import files, keys
from device_agent.address import parse_endpoint
from device_agent.carry import FirstProof
from device_agent.enrol import Wish
from device_agent.home import Belonging
from device_agent.slots import read_psk
from provisioning.model.errors import ConfigError, PeerError
from provisioning.model.ids import DeviceId, PskIdentity
from provisioning.tls.context import ClientCertificate, ClientPsk

if TYPE_CHECKING:
    import argparse

TOKEN_VARIABLE: Final = "BIRTHMARK_TOKEN"  # noqa: S105 - its name, not its value
LONGEST_TOKEN: Final = 1024
SHA256_OCTETS: Final = 32


def read_wish(arguments: argparse.Namespace) -> Wish:
    """Read every file that was named. Raises ConfigError for what cannot be meant."""
    try:
        parse_endpoint(arguments.gateway, "https")
    except ValueError as error:
        raise ConfigError("--gateway", str(error)) from error
    proof = _proof(arguments)
    mode = arguments.mode or ("psk" if arguments.psk_file else "cert")
    if mode == "psk" and not isinstance(proof.credential, ClientPsk):
        raise ConfigError("--mode psk", "it needs --psk-file")
    device = _device(arguments.device_id, proof)
    anchors = pin = None
    if arguments.ca_file is not None:
        anchors = _anchors(Path(arguments.ca_file))
    else:
        pin = _pin(arguments.ca_sha256)
    return Wish(Belonging(arguments.gateway, device, mode), proof, anchors, pin)


def _proof(arguments: argparse.Namespace) -> FirstProof:
    if (arguments.cert is None) != (arguments.key is None):
        raise ConfigError("--cert and --key", "one is of no use without the other")
    if arguments.cert is not None:
        return FirstProof(
            credential=_certificate(Path(arguments.cert), Path(arguments.key))
        )
    if arguments.psk_file is not None:
        path = Path(arguments.psk_file)
        try:
            return FirstProof(credential=read_psk(files.read_secret(path)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(str(path), str(error)) from None
    return FirstProof(token=_token(arguments.token_file))


def _token(file: str | None) -> str:
    if file is None:
        where, text = TOKEN_VARIABLE, os.environ.pop(TOKEN_VARIABLE, None)
        if text is None:
            why = f"give one, or --psk-file, or --cert; or set {TOKEN_VARIABLE}"
            raise ConfigError("--token-file", why)
    elif file == "-":
        where, text = "standard input", sys.stdin.readline(LONGEST_TOKEN + 2)
    else:
        where = file
        text = files.read_secret(Path(file)).decode("utf-8", "replace")
    token = text.strip()
    if not token or len(token) > LONGEST_TOKEN or not token.isascii():
        raise ConfigError(where, "it holds no enrolment token")
    if not token.isprintable() or " " in token:
        raise ConfigError(where, "it holds more than one enrolment token")
    return token


def _certificate(cert: Path, key: Path) -> ClientCertificate:
    chain_pem, key_pem = files.read_public(cert), files.read_secret(key)
    try:
        keys.read_chain(chain_pem, key_pem)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        why = "it must hold a PEM certificate, and --key its key, not encrypted"
        raise ConfigError(str(cert), why) from error
    return ClientCertificate(chain_pem, key_pem)


def _device(given: str | None, proof: FirstProof) -> DeviceId:
    named: DeviceId | None = None
    if isinstance(proof.credential, ClientPsk):
        named = PskIdentity.parse(proof.credential.identity).device
    elif isinstance(proof.credential, ClientCertificate):
        named = keys.device_of_chain(proof.credential.chain_pem)
    if given is None:
        if named is None:
            raise ConfigError("--device-id", "nothing else here says who this is")
        return named
    try:
        device = DeviceId.parse(given)
    except PeerError as error:
        raise ConfigError("--device-id", error.detail) from error
    if isinstance(proof.credential, ClientPsk) and named != device:
        raise ConfigError("--device-id", f"the PSK is for {named}")
    return device


def _anchors(path: Path) -> bytes:
    content = files.read_public(path)
    try:
        return keys.ders_to_pem(keys.pem_to_ders(content))
    except ValueError as error:
        raise ConfigError(str(path), "it holds no PEM certificate") from error


def _pin(text: str) -> bytes:
    try:
        pin = bytes.fromhex(text.replace(":", ""))
    except ValueError as error:
        raise ConfigError("--ca-sha256", "it is not hexadecimal") from error
    if len(pin) != SHA256_OCTETS:
        raise ConfigError("--ca-sha256", "a SHA-256 has 64 hexadecimal digits")
    return pin
