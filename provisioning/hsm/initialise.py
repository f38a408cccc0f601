"""Make a SoftHSM token: its folder, its configuration, its label and its PINs.

python-pkcs11 has no C_InitToken, and softhsm2-util takes PINs as arguments, which
everybody on the machine can read: so a child process calls the module through ctypes
and gets the PINs on its standard input.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

CONF = "softhsm2.conf"
TOKENS = "tokens"
TIMEOUT_S = 60.0
LABEL_BYTES = 32
PIN_BYTES = range(4, 256)
"""What SoftHSM 2.6 takes (MIN_PIN_LEN, MAX_PIN_LEN)."""

_LIBRARY = "libsofthsm2.so"
_PLACES = (
    "/usr/lib/softhsm",  # Debian, Ubuntu
    "/usr/lib/*/softhsm",  # their multiarch folders
    "/usr/lib64/pkcs11",  # Fedora
    "/usr/lib/pkcs11",  # Arch
    "/usr/local/lib/softhsm",
    "/usr/lib64/softhsm",
)


def find_softhsm() -> str | None:
    """Where the distributions put SoftHSM's module; None where it is not installed."""
    root = Path("/")
    for place in _PLACES:
        for folder in sorted(root.glob(place.lstrip("/"))):
            if (folder / _LIBRARY).is_file():
                return str(folder / _LIBRARY)
    return None


async def make_softhsm_token(
    folder: str, label: str, pin: str, so_pin: str, module: str
) -> str:
    """Make a token in `folder`; the path of the configuration that finds it.

    folder: made if needed, 0700; what is written in it is 0600. Raises Unusable if
    there is a token in it, or if the module makes none.
    """
    return await asyncio.to_thread(
        make_softhsm_token_now, folder, label, pin, so_pin, module
    )


def make_softhsm_token_now(
    folder: str, label: str, pin: str, so_pin: str, module: str
) -> str:
    """`make_softhsm_token` for those that have no loop; blocks."""
    if not 0 < len(label.encode()) <= LABEL_BYTES:
        raise Unusable(HSM, f"a token's label has 1 to {LABEL_BYTES} bytes")
    if len(pin.encode()) not in PIN_BYTES or len(so_pin.encode()) not in PIN_BYTES:
        raise Unusable(
            HSM, f"SoftHSM's PINs have {PIN_BYTES.start} to {PIN_BYTES.stop - 1} bytes"
        )
    conf = _prepare(Path(folder).resolve())
    order = {"module": module, "label": label, "pin": pin, "so_pin": so_pin}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "provisioning.hsm.initialise"],
            input=json.dumps(order),
            env=os.environ | {"SOFTHSM2_CONF": str(conf)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # Without its cause, which carries the order.
        raise Unusable(HSM, f"{module} made no token in {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        why = done.stderr.strip().rpartition("\n")[2]
        raise Unusable(HSM, f"{module} made no token: {why}")
    return str(conf)


def _prepare(folder: Path) -> Path:
    if any(character in str(folder) for character in "#\n"):
        raise Unusable(HSM, f"SoftHSM cannot be told of a folder named {folder}")
    tokens = folder / TOKENS
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        tokens.mkdir(mode=0o700, exist_ok=True)
        if any(tokens.iterdir()):
            raise Unusable(
                HSM,
                f"{tokens} holds a token already, which is left as it is; take "
                f"another folder, or remove this one if its keys are not needed",
            )
        conf = folder / CONF
        descriptor = os.open(conf, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(
                f"directories.tokendir = {tokens}\n"
                "objectstore.backend = file\n"
                "log.level = ERROR\n"
                "slots.removable = false\n"
            )
    except OSError as error:
        raise Unusable(
            HSM, f"{folder} cannot be made ready for a token: {error.strerror}"
        ) from error
    return conf


# The child. ----------------------------------------------------------------------

_ULONG, _POINTER = ctypes.c_ulong, ctypes.c_void_p
_FUNCTIONS = 68
# Where they stand in CK_FUNCTION_LIST, and what they take (PKCS#11 v2.40, pkcs11f.h).
_CALLS: dict[str, tuple[int, tuple[type, ...]]] = {
    "C_Initialize": (0, (_POINTER,)),
    "C_Finalize": (1, (_POINTER,)),
    "C_GetSlotList": (4, (ctypes.c_ubyte, _POINTER, _POINTER)),
    "C_GetTokenInfo": (6, (_ULONG, _POINTER)),
    "C_InitToken": (9, (_ULONG, ctypes.c_char_p, _ULONG, ctypes.c_char_p)),
    "C_InitPIN": (10, (_ULONG, ctypes.c_char_p, _ULONG)),
    "C_OpenSession": (12, (_ULONG, _ULONG, _POINTER, _POINTER, _POINTER)),
    "C_Login": (18, (_ULONG, _ULONG, ctypes.c_char_p, _ULONG)),
}
_CKU_SO = 0
_CKF_RW_SESSION, _CKF_SERIAL_SESSION = 0x2, 0x4
_CKF_TOKEN_INITIALIZED = 0x400


class _FunctionList(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_ubyte * 2),
        ("functions", ctypes.c_void_p * _FUNCTIONS),
    )


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("texts", ctypes.c_ubyte * 96),
        ("flags", ctypes.c_ulong),
        ("counts", ctypes.c_ulong * 10),
        ("versions", ctypes.c_ubyte * 4),
        ("time", ctypes.c_ubyte * 16),
    )


class _Module:
    """A loaded module; a call that fails ends the child with its name and code."""

    def __init__(self, path: str) -> None:
        pointer = ctypes.POINTER(_FunctionList)()
        try:
            code = ctypes.CDLL(path).C_GetFunctionList(ctypes.byref(pointer))
        except (OSError, AttributeError) as error:
            sys.exit(f"it cannot be loaded ({error})")
        if code != 0:
            sys.exit(f"C_GetFunctionList answers {code:#x}")
        self._functions = pointer.contents.functions

    def call(self, name: str, *arguments: object) -> None:
        index, types = _CALLS[name]
        function = ctypes.CFUNCTYPE(ctypes.c_ulong, *types)(self._functions[index])
        code = function(*arguments)
        if code != 0:
            sys.exit(f"{name} answers {code:#x}")

    def free_slot(self) -> int:
        """The first slot whose token nobody has initialised."""
        count = ctypes.c_ulong()
        self.call("C_GetSlotList", 1, None, ctypes.byref(count))
        slots = (ctypes.c_ulong * count.value)()
        self.call("C_GetSlotList", 1, slots, ctypes.byref(count))
        for slot in slots:
            info = _TokenInfo()
            self.call("C_GetTokenInfo", slot, ctypes.byref(info))
            if not info.flags & _CKF_TOKEN_INITIALIZED:
                return int(slot)
        sys.exit("it has no free slot")


def _main() -> None:
    # SoftHSM 2.6.1 asks for 0600 and 0700 itself; a build that does not is caught.
    os.umask(0o077)
    order = json.load(sys.stdin)
    pin, so_pin = order["pin"].encode(), order["so_pin"].encode()
    module = _Module(order["module"])
    module.call("C_Initialize", None)
    slot = module.free_slot()
    label = order["label"].encode().ljust(LABEL_BYTES)
    module.call("C_InitToken", slot, so_pin, len(so_pin), label)
    session = ctypes.c_ulong()
    flags = _CKF_RW_SESSION | _CKF_SERIAL_SESSION
    module.call("C_OpenSession", slot, flags, None, None, ctypes.byref(session))
    module.call("C_Login", session, _CKU_SO, so_pin, len(so_pin))
    module.call("C_InitPIN", session, pin, len(pin))
    module.call("C_Finalize", None)


if __name__ == "__main__":
    _main()
