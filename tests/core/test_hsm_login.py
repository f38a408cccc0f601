"""When a PIN is tried, and when it is not: a wrong one too many locks a token."""

from __future__ import annotations

import pkcs11
import pytest
from pkcs11 import TokenFlag

from provisioning.hsm.login import TokenConfig, _log_in
from provisioning.hsm.pin import Pin
from provisioning.model.errors import Unusable

READY = TokenFlag.TOKEN_INITIALIZED | TokenFlag.USER_PIN_INITIALIZED


class Slot:
    """A token with a PIN, which counts how often it is tried."""

    serial = b"0001"

    def __init__(self, flags: TokenFlag, pin: str = "right") -> None:
        self.flags = flags
        self.pin = pin
        self.tries = 0

    def open(self, *, rw: bool, user_pin: str) -> str:
        assert rw
        self.tries += 1
        if user_pin != self.pin:
            raise pkcs11.PinIncorrect
        return "a session"


def config(label: str, pin: str = "right") -> TokenConfig:
    return TokenConfig("module.so", label, Pin(pin))


def test_a_right_pin_opens_a_session():
    assert _log_in(Slot(READY), config("right")) == "a session"


def test_a_refused_pin_is_not_tried_again_in_this_process():
    token = Slot(READY)
    for _ in range(3):
        with pytest.raises(pkcs11.PinIncorrect):
            _log_in(token, config("refused", "wrong"))
    assert token.tries == 1
    assert _log_in(token, config("refused")) == "a session"


def test_the_last_try_is_left_to_a_person():
    token = Slot(READY | TokenFlag.USER_PIN_FINAL_TRY)
    with pytest.raises(Unusable, match="by hand"):
        _log_in(token, config("final"))
    assert token.tries == 0


def test_a_token_on_which_somebody_mistyped_once_is_still_opened():
    token = Slot(READY | TokenFlag.USER_PIN_COUNT_LOW)
    assert _log_in(token, config("low")) == "a session"


def test_a_locked_pin_or_none_at_all_is_not_tried():
    locked = Slot(READY | TokenFlag.USER_PIN_LOCKED)
    with pytest.raises(pkcs11.PinLocked):
        _log_in(locked, config("locked"))
    blank = Slot(TokenFlag.TOKEN_INITIALIZED)
    with pytest.raises(pkcs11.UserPinNotInitialized):
        _log_in(blank, config("blank"))
    assert locked.tries == blank.tries == 0
