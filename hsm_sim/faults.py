"""A token that goes wrong when told to: slow, frozen, away, or with a CKR code.

It stands where the module's session stands, below the owner of the token, so that
what is tried is the real handling of faults. Left alone it behaves well.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, TypeVar

import pkcs11

from provisioning.hsm.login import TokenConfig, open_session
from provisioning.hsm.pkcs11 import Pkcs11Token, open_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from provisioning.hsm.session import EcPair, Object, Secret, Session, SigningKey

T = TypeVar("T")

CALLS = (
    "open",
    "find_ec",
    "find_secret",
    "sign",
    "mac",
    "make_ec",
    "make_secret",
    "set_id",
    "read",
    "close",
)
"""What can go wrong: to open, and each call of hsm/session.py's Session."""

_SPELT = {
    "FUNCTION_CANCELED": "FunctionCancelled",
    "SLOT_ID_INVALID": "SlotIDInvalid",
    "TOKEN_NOT_RECOGNIZED": "TokenNotRecognised",
}
_NAMELESS = {
    "CRYPTOKI_NOT_INITIALIZED": "Initialisation error (not initialized). "
    "Should never see this.",
    "CRYPTOKI_ALREADY_INITIALIZED": "Initialisation error (already initialized). "
    "Should never see this.",
    "KEY_FUNCTION_NOT_PERMITTED": "Unmapped error code 0x68",
    "MODULE_NOT_LOADED": "OS exception while loading x.so: no such file",
    "VENDOR_DEFINED": "Unmapped error code 0x80000001",
}


def ckr(code: str) -> pkcs11.PKCS11Error:
    """What python-pkcs11 raises for a code, such as `DEVICE_REMOVED`."""
    if code in _NAMELESS:
        return pkcs11.PKCS11Error(_NAMELESS[code])
    name = _SPELT.get(code) or code.title().replace("_", "")
    error: pkcs11.PKCS11Error = getattr(pkcs11, name)()
    return error


class Faults:
    """What goes wrong next; set by a test, met on the token's thread.

    met: every call in turn, those that failed too.
    """

    def __init__(self) -> None:
        self.met: list[str] = []
        self._before: dict[str, deque[Exception]] = defaultdict(deque)
        self._after: dict[str, deque[Exception]] = defaultdict(deque)
        self._always: dict[str, Exception] = {}
        self._frozen: set[str] = set()
        self._thawed = threading.Event()
        self._reached = threading.Event()
        self._slow_s = 0.0

    def before(self, call: str, *errors: Exception) -> None:
        """The next calls raise these in turn and do not reach the token."""
        self._before[_known(call)].extend(errors)

    def after(self, call: str, *errors: Exception) -> None:
        """The next calls are done by the token, and their answers are lost."""
        self._after[_known(call)].extend(errors)

    def away(self, error: Exception, *calls: str) -> None:
        """These calls (all, if none is named) raise this until `mend`."""
        for call in calls or CALLS[:-1]:
            self._always[_known(call)] = error

    def slow(self, seconds: float) -> None:
        """Each call takes so much longer."""
        self._slow_s = seconds

    def freeze(self, *calls: str) -> None:
        """These calls (all, if none is named) do not return until `mend`."""
        self._thawed.clear()
        self._reached.clear()
        self._frozen.update(map(_known, calls or CALLS))

    async def frozen(self) -> None:
        """Wait until the token's thread hangs in a frozen call."""
        await asyncio.to_thread(self._reached.wait)

    def mend(self) -> None:
        """Nothing goes wrong any more."""
        self._before.clear()
        self._after.clear()
        self._always.clear()
        self._frozen.clear()
        self._slow_s = 0.0
        self._thawed.set()

    def meet(self, call: str) -> None:
        """On the token's thread, before a call."""
        self.met.append(call)
        if call in self._frozen:
            self._reached.set()
            self._thawed.wait()
        if self._slow_s:
            threading.Event().wait(self._slow_s)
        if self._before[call]:
            raise self._before[call].popleft()
        if call in self._always:
            raise self._always[call]

    def leave(self, call: str) -> None:
        """On the token's thread, after a call."""
        if self._after[call]:
            raise self._after[call].popleft()

    def open(self, config: TokenConfig, first: bool) -> Session:
        """The opener that `open_token` takes."""
        self.meet("open")
        session = FaultySession(open_session(config, first), self)
        try:
            self.leave("open")
        except BaseException:
            session.close()
            raise
        return session


async def open_faulty_token(
    config: TokenConfig,
    faults: Faults,
    *,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> Pkcs11Token:
    """`open_token`, with faults below."""
    return await open_token(config, on_event=on_event, opener=faults.open)


class FaultySession:
    """A session of the real module, with faults before and after each call."""

    def __init__(self, inner: Session, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def find_ec(self, label: str) -> EcPair:
        return self._through("find_ec", lambda: self._inner.find_ec(label))

    def find_secret(self, label: str) -> Secret:
        return self._through("find_secret", lambda: self._inner.find_secret(label))

    def sign(self, key: SigningKey, digest: bytes) -> bytes:
        return self._through("sign", lambda: self._inner.sign(key, digest))

    def mac(self, key: SigningKey, message: bytes) -> bytes:
        return self._through("mac", lambda: self._inner.mac(key, message))

    def make_ec(self, label: str) -> EcPair:
        return self._through("make_ec", lambda: self._inner.make_ec(label))

    def make_secret(self, label: str) -> None:
        self._through("make_secret", lambda: self._inner.make_secret(label))

    def set_id(self, pair: EcPair, key_id: bytes) -> None:
        self._through("set_id", lambda: self._inner.set_id(pair, key_id))

    def read(
        self, key: Object, wanted: Iterable[pkcs11.Attribute]
    ) -> Mapping[pkcs11.Attribute, object]:
        return self._through("read", lambda: self._inner.read(key, wanted))

    def close(self) -> None:
        self._through("close", self._inner.close)

    def _through(self, call: str, work: Callable[[], T]) -> T:
        self._faults.meet(call)
        result = work()
        self._faults.leave(call)
        return result


def _known(call: str) -> str:
    if call not in CALLS:
        raise KeyError(call)
    return call
