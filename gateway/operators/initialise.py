"""`birthmark init`: from an empty folder to a CA in its token, resumable anywhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gateway.listen.tcp import free_port
from gateway.operators.authority import new_pin
from gateway.operators.desk import open_desk
from gateway.parts import token_config
from provisioning import config as configuration
from provisioning.ca.files import PRIVATE, make_folder, write_atomically
from provisioning.ca.hierarchy import load_hierarchy, make_hierarchy, make_hmac_key
from provisioning.ca.publish import CrlFiles
from provisioning.ca.renew import make_responder_key, renew_own
from provisioning.ca.settings import CAS, OCSP
from provisioning.hsm.initialise import find_softhsm, make_softhsm_token
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import Unusable
from provisioning.model.events import INITIALISED
from provisioning.model.ids import TrustDomain
from provisioning.psk.derive import PSK_MASTER
from provisioning.registry.upgrade import upgrade
from provisioning.x509.chain import fingerprint_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from provisioning.config import Config

Document = dict[str, object]
SOFTHSM_CONF = "hsm/softhsm2.conf"
DONE = "run/initialised"
"""Written last: an `init` that was cut off is gone through again."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `init` was told. module: None makes a SoftHSM token in the data folder."""

    org: str
    domain: str
    hosts: tuple[str, ...]
    module: str | None
    token_label: str
    pin: str
    ephemeral_ports: bool


async def initialise(
    folder: Path, wishes: Wishes, progress: Callable[[str], None]
) -> Document:
    """Make what is missing; what is there stays as it is.

    progress: told each step in words. Raises Unusable, PeerError, ConfigError.
    """
    TrustDomain.parse(wishes.domain)
    # Others may pass through towards public/, which is theirs to read.
    make_folder(folder, 0o711)
    with only_one(folder):
        return await _initialise(folder, wishes, progress)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder; a second `init` beside the first is told to wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unusable(
                str(folder), "another `birthmark init` is at work in it; wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


async def _initialise(
    folder: Path, wishes: Wishes, progress: Callable[[str], None]
) -> Document:
    if (folder / DONE).exists():
        return _summary(configuration.load(folder), created=False)
    if not (folder / configuration.FILE).exists():
        progress("configuration")
        _write_configuration(folder, wishes)
    config = configuration.load(folder)
    if config.hsm.softhsm_conf is not None and not _has_token(folder):
        progress("SoftHSM token")
        await _make_token(config)
    progress("registry")
    await upgrade(config.registry_url)
    _private(folder)
    await _make_authority(config, progress)
    make_folder(folder / "run", 0o700)
    summary = _summary(config, created=True)
    async with open_desk(folder) as desk:
        await desk.registry.add_audit(
            INITIALISED, {"fingerprint": summary["sha256"]}, desk.now, desk.actor
        )
    write_atomically(folder / DONE, b"1\n", PRIVATE)
    return summary


def _write_configuration(folder: Path, wishes: Wishes) -> None:
    ports: dict[str, int] = {}
    if wishes.ephemeral_ports:
        taken: set[int] = set()
        ports = {
            name: free_port(taken)
            for name in ("https", "mqtts", "http", "coaps", "operator")
        }
    module = wishes.module
    own_token = module is None
    if module is None:
        module = find_softhsm()
        if module is None:
            raise Unusable(
                "SoftHSM",
                "it is not installed; run `apt-get install softhsm2`, or name another "
                "PKCS#11 module with --module PATH --token-label LABEL",
            )
    text = configuration.default_toml(
        org=wishes.org,
        domain=wishes.domain,
        hosts=wishes.hosts,
        module=module,
        token_label=wishes.token_label,
        pin="file:hsm/pin" if own_token else wishes.pin,
        softhsm_conf=SOFTHSM_CONF if own_token else None,
        ports=ports,
    )
    configuration.parse(text, folder)
    write_atomically(folder / configuration.FILE, text.encode(), PRIVATE)


def _has_token(folder: Path) -> bool:
    return (folder / "hsm" / "complete").exists()


async def _make_token(config: Config) -> None:
    """A token of our own. Half of one is thrown away: it has no keys yet."""
    folder = config.folder / "hsm"
    make_folder(folder, 0o700)
    _clear(folder)
    pin = new_pin()
    await make_softhsm_token(
        str(folder), config.hsm.token_label, pin, new_pin(), config.hsm.module
    )
    write_atomically(folder / "pin", f"{pin}\n".encode(), PRIVATE)
    write_atomically(folder / "complete", b"1\n", PRIVATE)


def _clear(folder: Path) -> None:
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(place, name))  # noqa: PTH108, PTH118 - os.walk's
        for name in folders:
            os.rmdir(os.path.join(place, name))  # noqa: PTH106, PTH118 - os.walk's


async def _make_authority(config: Config, progress: Callable[[str], None]) -> None:
    now = datetime.now(UTC)
    token = await open_token(token_config(config))
    try:
        progress("root, factory and issuing CA")
        hierarchy = await make_hierarchy(token, config.ca, now, secrets.token_bytes)
        progress("PSK master and OCSP responder")
        await make_hmac_key(token, PSK_MASTER)
        await make_responder_key(token)
        await token.check((*CAS, OCSP), (PSK_MASTER,))
        progress("server certificate")
        await renew_own(token, config.ca, hierarchy, now, secrets.token_bytes)
        progress("revocation lists")
        async with open_desk(config.folder) as desk:
            await CrlFiles(
                registry=desk.registry,
                token=token,
                hierarchy=hierarchy,
                settings=config.ca,
                clock=lambda: datetime.now(UTC),
                on_event=lambda _name, _fields: None,
            ).refresh()
    finally:
        await token.close()


def _private(folder: Path) -> None:
    """SQLite makes its files by the umask: nobody else may read them."""
    for path in folder.glob("registry.sqlite3*"):
        path.chmod(0o600)


def _summary(config: Config, *, created: bool) -> Document:
    hierarchy = load_hierarchy(config.ca)
    return {
        "created": created,
        "data": str(config.folder),
        "org": config.org,
        "domain": config.domain.text,
        "sha256": fingerprint_sha256(hierarchy.anchors[0]),
        "https": config.url("https"),
        "mqtts": config.url("mqtts"),
        "http": config.url("http"),
    }
