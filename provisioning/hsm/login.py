"""From the path of a module to a session that is logged in, and how PINs are spared."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pkcs11
from pkcs11 import TokenFlag

from provisioning.hsm.session import ModuleSession
from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from provisioning.hsm.pin import Pin
    from provisioning.hsm.session import Session


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """Which token, and how to get in.

    module: path of the PKCS#11 library. softhsm_conf: what SOFTHSM2_CONF is set to
    before it is loaded; None for other modules. deadline_s: how long a caller waits
    for one answer. waiting: how many callers may wait at once.
    """

    module: str
    token_label: str
    pin: Pin
    softhsm_conf: str | None = None
    deadline_s: float = 10.0
    waiting: int = 4096


def open_session(config: TokenConfig, first: bool) -> Session:
    """Load and initialise the module, find the token, open a session and log in.

    first: nobody has seen this token yet, so that a label which no token has is a
    mistake in the configuration; later it is a token that was pulled out.
    Raises PKCS11Error or Unusable.
    """
    library = _initialise(config)
    try:
        token = _find_token(library, config, first=first)
        session = _log_in(token, config)
    except BaseException:
        with contextlib.suppress(pkcs11.PKCS11Error):
            library.finalize()
        raise
    return ModuleSession(library, session)


_initialised_in: dict[str, int] = {}
"""The process that initialised each module: after a fork it must be done again."""


def _initialise(config: TokenConfig) -> Any:
    if config.softhsm_conf is not None:
        # SoftHSM reads it in each C_Initialize.
        os.environ["SOFTHSM2_CONF"] = config.softhsm_conf
    library = pkcs11.lib(config.module)
    if _initialised_in.get(config.module, os.getpid()) != os.getpid():
        # PKCS#11 v2.40 usage guide, 2.5.2: a child's handles are its parent's.
        with contextlib.suppress(pkcs11.PKCS11Error):
            library.finalize()
        library.initialize()
    _initialised_in[config.module] = os.getpid()
    return library


def _find_token(library: Any, config: TokenConfig, *, first: bool) -> pkcs11.Token:
    labels: list[str] = []
    found: list[pkcs11.Token] = []
    for slot in library.get_slots(token_present=True):
        with contextlib.suppress(pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised):
            token = slot.get_token()
            labels.append(token.label)
            if token.label == config.token_label:
                found.append(token)
    if len(found) == 1:
        return found[0]
    if found:
        raise Unusable(
            HSM,
            f"{len(found)} tokens are labelled {config.token_label!r}; rename those "
            f"that are not the gateway's",
        )
    if first and labels:
        seen = ", ".join(repr(label) for label in labels if label) or "none"
        raise Unusable(
            HSM,
            f"no token is labelled {config.token_label!r}; there are: {seen}. "
            f"Correct token_label in the configuration",
        )
    raise pkcs11.NoSuchToken(f"no token labelled {config.token_label!r}")


_refused: set[bytes] = set()
"""Tokens and the PINs that they refused, as digests, in this process."""


def _log_in(token: pkcs11.Token, config: TokenConfig) -> pkcs11.Session:
    """Try the PIN, if it has not been refused before; the last try is a person's."""
    flags = token.flags
    if TokenFlag.USER_PIN_LOCKED in flags:
        raise pkcs11.PinLocked
    if TokenFlag.USER_PIN_INITIALIZED not in flags:
        raise pkcs11.UserPinNotInitialized
    if TokenFlag.USER_PIN_FINAL_TRY in flags:
        raise Unusable(
            HSM,
            "one wrong PIN more would lock the token; log in by hand once with the "
            "right PIN, put it where the configuration says and start anew",
        )
    secret = f"{config.token_label}\0{config.pin.text}".encode()
    attempt = hashlib.sha256(token.serial + secret).digest()
    if attempt in _refused:
        raise pkcs11.PinIncorrect
    try:
        return token.open(rw=True, user_pin=config.pin.text)
    except pkcs11.PinIncorrect:
        _refused.add(attempt)
        raise
