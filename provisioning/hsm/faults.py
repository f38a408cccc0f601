"""What a PKCS#11 fault means: CKR code to kind of error, in one table.

The kinds are STANDARDS' ("what a fault means"); a vendor's oddity is a row here, with
where it was seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import pkcs11
from pkcs11 import PKCS11Error
from typing_extensions import override


class KeyFunctionNotPermittedError(PKCS11Error):
    """CKR_KEY_FUNCTION_NOT_PERMITTED, for which python-pkcs11 0.10 has no class.

    It gives a key without CKA_SIGN no `sign` at all, so that ours must be raised.
    """


class Kind(Enum):
    """What to do about a fault."""

    LOST = "reopen, log in, find again, once"
    AWAY = "wait and reopen with backoff"
    PIN = "never try again: the next try may lock the token for good"
    UNUSABLE = "the operator must act"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row. code: CKR name without its prefix. why: one sentence, what to do."""

    code: str
    kind: Kind
    why: str

    @override
    def __str__(self) -> str:
        return f"{self.code}: {self.why}"


TABLE: dict[str, Fault] = {}
_BY_TYPE: dict[type[PKCS11Error], Fault] = {}

_GONE = "the session is gone"
_WAIT = "the token is away"
_KEY = "make the keys with `birthmark init`, in a token that has none yet"


def _row(
    code: str, kind: Kind, why: str, error: type[PKCS11Error] | None = None
) -> Fault:
    fault = Fault(code, kind, why)
    TABLE[code] = fault
    if error is not None:
        _BY_TYPE[error] = fault
    return fault


_row("SESSION_HANDLE_INVALID", Kind.LOST, _GONE, pkcs11.SessionHandleInvalid)
_row("SESSION_CLOSED", Kind.LOST, _GONE, pkcs11.SessionClosed)
_row("USER_NOT_LOGGED_IN", Kind.LOST, _GONE, pkcs11.UserNotLoggedIn)
_row("OBJECT_HANDLE_INVALID", Kind.LOST, _GONE, pkcs11.ObjectHandleInvalid)
_row("KEY_HANDLE_INVALID", Kind.LOST, _GONE, pkcs11.KeyHandleInvalid)
# A call that was cut short left its operation open; a new session has none.
_row("OPERATION_ACTIVE", Kind.LOST, _GONE, pkcs11.OperationActive)
_row("OPERATION_NOT_INITIALIZED", Kind.LOST, _GONE, pkcs11.OperationNotInitialized)
_row("USER_ALREADY_LOGGED_IN", Kind.LOST, _GONE, pkcs11.UserAlreadyLoggedIn)

_row("DEVICE_REMOVED", Kind.AWAY, _WAIT, pkcs11.DeviceRemoved)
_row("TOKEN_NOT_PRESENT", Kind.AWAY, _WAIT, pkcs11.TokenNotPresent)
_row("TOKEN_NOT_RECOGNIZED", Kind.AWAY, _WAIT, pkcs11.TokenNotRecognised)
_row("SLOT_ID_INVALID", Kind.AWAY, _WAIT, pkcs11.SlotIDInvalid)
_row("DEVICE_ERROR", Kind.AWAY, "the token reports an error", pkcs11.DeviceError)
_row("DEVICE_MEMORY", Kind.AWAY, "the token is out of memory", pkcs11.DeviceMemory)
_row("HOST_MEMORY", Kind.AWAY, "the module is out of memory", pkcs11.HostMemory)
_row("FUNCTION_FAILED", Kind.AWAY, "the token failed", pkcs11.FunctionFailed)
_row("FUNCTION_CANCELED", Kind.AWAY, "the call was cut", pkcs11.FunctionCancelled)
_row("GENERAL_ERROR", Kind.AWAY, "the token failed", pkcs11.GeneralError)
_row("SESSION_COUNT", Kind.AWAY, "the token has no session left", pkcs11.SessionCount)
_row("CRYPTOKI_NOT_INITIALIZED", Kind.AWAY, "the module has forgotten us")

# p11-kit 0.24 lists no slot at all while its server is away.
_row("NO_SUCH_TOKEN", Kind.AWAY, _WAIT, pkcs11.NoSuchToken)

_row(
    "PIN_INCORRECT",
    Kind.PIN,
    "the token refuses the PIN and is not asked again; put the right PIN where the "
    "configuration says and start anew",
    pkcs11.PinIncorrect,
)
_row(
    "PIN_INVALID",
    Kind.PIN,
    "the PIN has characters that the token does not take; put the right PIN where "
    "the configuration says and start anew",
    pkcs11.PinInvalid,
)
_row(
    "PIN_LEN_RANGE",
    Kind.PIN,
    "the PIN is longer or shorter than the token's can be; put the right PIN where "
    "the configuration says and start anew",
    pkcs11.PinLenRange,
)
_row(
    "PIN_LOCKED",
    Kind.PIN,
    "the PIN is locked; the token's security officer must set a new one",
    pkcs11.PinLocked,
)
_row(
    "PIN_EXPIRED",
    Kind.PIN,
    "the PIN has expired; set a new one with the token's own tool",
    pkcs11.PinExpired,
)
_row(
    "USER_PIN_NOT_INITIALIZED",
    Kind.PIN,
    "the token has no user PIN yet; its security officer must set one",
    pkcs11.UserPinNotInitialized,
)

_row(
    "MECHANISM_INVALID",
    Kind.UNUSABLE,
    "the token lacks a mechanism; it must have CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, "
    "CKM_GENERIC_SECRET_KEY_GEN and CKM_SHA256_HMAC",
    pkcs11.MechanismInvalid,
)
_row(
    "KEY_TYPE_INCONSISTENT",
    Kind.UNUSABLE,
    f"the key of that label is of another type; {_KEY}",
    pkcs11.KeyTypeInconsistent,
)
_row(
    "KEY_FUNCTION_NOT_PERMITTED",
    Kind.UNUSABLE,
    f"the key may not sign; {_KEY}",
    KeyFunctionNotPermittedError,
)
_row(
    "ATTRIBUTE_VALUE_INVALID",
    Kind.UNUSABLE,
    "the token does not allow an attribute that keys must have here; ask its vendor",
    pkcs11.AttributeValueInvalid,
)
_row(
    "TEMPLATE_INCONSISTENT",
    Kind.UNUSABLE,
    "the token does not make keys with these attributes; ask its vendor",
    pkcs11.TemplateInconsistent,
)
_row(
    "KEY_SIZE_RANGE",
    Kind.UNUSABLE,
    f"the key has a size that the mechanism does not take; {_KEY}",
    pkcs11.KeySizeRange,
)
_row(
    "TOKEN_WRITE_PROTECTED",
    Kind.UNUSABLE,
    "the token is write-protected; make it writable while keys are made",
    pkcs11.TokenWriteProtected,
)
_row(
    "SESSION_READ_ONLY",
    Kind.UNUSABLE,
    "the token gives read-only sessions; make it writable while keys are made",
    pkcs11.SessionReadOnly,
)
_row(
    "MODULE_NOT_LOADED",
    Kind.UNUSABLE,
    "the PKCS#11 module cannot be loaded; see that it is installed and for this "
    "machine, and that the configuration names it",
)
_row(
    "CRYPTOKI_ALREADY_INITIALIZED",
    Kind.UNUSABLE,
    "something else in this process uses the module; only one thread may",
)

_UNMAPPED = re.compile(r"Unmapped error code (0x[0-9a-f]+)")
_NUMBERS = {0x68: "KEY_FUNCTION_NOT_PERMITTED"}
_VENDOR = 0x80000000

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


def judge(error: PKCS11Error) -> Fault:
    """The row of an error; one that has no row is the operator's, by its name.

    A vendor's own code (0x80000000 and up) without a row is taken as away: nothing is
    known of it but that the call failed, so that is the careful reading.
    """
    found = _BY_TYPE.get(type(error))
    if found is not None:
        return found
    if type(error) is PKCS11Error:
        return _judge_text(str(error))
    return Fault(
        type(error).__name__,
        Kind.UNUSABLE,
        "the token answers what PKCS#11 does not foresee here; ask its vendor",
    )


def _judge_text(text: str) -> Fault:
    # python-pkcs11 has no class for these; the text is all that it gives.
    if "not initialized" in text:
        return TABLE["CRYPTOKI_NOT_INITIALIZED"]
    if "already initialized" in text:
        return TABLE["CRYPTOKI_ALREADY_INITIALIZED"]
    if "exception while loading" in text:
        return TABLE["MODULE_NOT_LOADED"]
    unmapped = _UNMAPPED.search(text)
    number = int(unmapped[1], 16) if unmapped else None
    if number in _NUMBERS:
        return TABLE[_NUMBERS[number]]
    if number is not None and number >= _VENDOR:
        return Fault(f"{number:#010x}", Kind.AWAY, "the token failed in its own way")
    return Fault(
        text or "PKCS11Error",
        Kind.UNUSABLE,
        "the token answers what PKCS#11 does not foresee here; ask its vendor",
    )


def wait_s(failures: int) -> float:
    """Seconds before the next try after so many failures in a row (1 and up).

    Doubling to a ceiling that is short: one gateway asks one token, so there is no
    herd, and whoever plugs the token back in watches.
    """
    return float(min(FIRST_WAIT_S * 2 ** (min(failures, 16) - 1), LONGEST_WAIT_S))
