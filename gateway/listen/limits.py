"""How many connections and handshakes a listener holds, and where keys come from."""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from provisioning.model.credentials import PskProof
from provisioning.model.errors import Unavailable, Unusable
from provisioning.model.events import CONNECTED, HANDSHAKE_FAILED, INCIDENT
from provisioning.tls.aio import Admittance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from provisioning.model.credentials import Proof
    from provisioning.model.ids import PskIdentity
    from provisioning.psk.keys import KeyCache
    from provisioning.tls.aio import TlsTransport
    from provisioning.tls.engine import Established, Failed


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """connections, handshakes: at the same time. deadline_s: for one handshake."""

    connections: int
    handshakes: int
    deadline_s: float


class Gatekeeper(Admittance):
    """Counts one listener's connections, lets handshakes begin, fetches PSK keys.

    A connection past `connections` is closed at once. A handshake past `handshakes`
    waits its turn unread, under the same deadline, and costs no TLS work meanwhile.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        name: str,
        limits: ListenerLimits,
        keys: KeyCache,
        tasks: asyncio.TaskGroup,
        tell: Callable[[str, Mapping[str, object]], None],
        *,
        chatty: bool = False,
    ) -> None:
        self.handshake_deadline_s = limits.deadline_s
        self._name = name
        self._limits = limits
        self._keys = keys
        self._tasks = tasks
        self._tell = tell
        self._chatty = chatty
        self._loop = asyncio.get_running_loop()
        self._open: set[TlsTransport] = set()
        self.empty = asyncio.Event()
        """Set while there is no connection."""
        self.empty.set()
        self._shaking: set[TlsTransport] = set()
        self._waiting: deque[TlsTransport] = deque()

    @property
    def open(self) -> int:
        """Connections at the moment."""
        return len(self._open)

    @override
    def arrived(self, transport: TlsTransport) -> None:
        self._open.add(transport)
        self.empty.clear()
        if len(self._open) > self._limits.connections:
            transport.abort()

    @override
    def begins(self, transport: TlsTransport) -> bool:
        if len(self._shaking) >= self._limits.handshakes:
            self._waiting.append(transport)
            return False
        self._shaking.add(transport)
        return True

    @override
    def ended(self, transport: TlsTransport, failed: Failed | None) -> None:
        self._make_room(transport)
        established = transport.established
        if established is not None:
            self._note(transport, established)
        if failed is not None:
            self._tell(
                HANDSHAKE_FAILED,
                {
                    "address": address_of(transport),
                    "listener": self._name,
                    "reason": failed.untrusted or failed.reason,
                },
            )

    def _make_room(self, transport: TlsTransport) -> None:
        """One handshake is over; the next ones that wait may begin."""
        if transport not in self._shaking:
            return
        self._shaking.remove(transport)
        while self._waiting and len(self._shaking) < self._limits.handshakes:
            following = self._waiting.popleft()
            if following in self._open and not following.is_closing():
                self._shaking.add(following)
                # Not at once: a thousand bad hellos in a row would be a deep stack.
                self._loop.call_soon(following.begin)

    def _note(self, transport: TlsTransport, established: Established) -> None:
        proof = established.proof
        if isinstance(proof, PskProof) and not established.resumed:
            self._keys.proven(proof.identity)
        if not self._chatty:
            return
        self._tell(
            CONNECTED,
            {
                "address": address_of(transport),
                "listener": self._name,
                "auth": _auth(proof),
                "resumed": established.resumed,
                "tls": established.version,
                "cipher": established.cipher,
                "bytes_up": established.bytes_up,
                "bytes_down": established.bytes_down,
            },
        )

    @override
    def lost(self, transport: TlsTransport) -> None:
        self._make_room(transport)
        self._open.discard(transport)
        if not self._open:
            self.empty.set()

    @override
    def cached_key(self, identity: PskIdentity) -> bytes | None:
        key = self._keys.cached(identity)
        return None if key is None else key.octets

    @override
    def fetch_key(self, transport: TlsTransport, identity: PskIdentity) -> None:
        self._tasks.create_task(self._fetch(transport, identity))

    async def _fetch(self, transport: TlsTransport, identity: PskIdentity) -> None:
        key: bytes | None = None
        try:
            # Shorter than the handshake's own deadline, so that the device still gets
            # the alert `internal_error`, which it treats as "later" (DESIGN).
            async with asyncio.timeout(self.handshake_deadline_s / 2):
                key = (await self._keys.key_for(identity)).octets
        except (Unavailable, Unusable, TimeoutError):
            key = None
        except Exception as error:  # noqa: BLE001 - the outermost shell of this task
            self._incident(error)
        try:
            transport.provide_key(identity, key)
        except Exception as error:  # noqa: BLE001 - as above: what the peer sent next
            self._incident(error)
            transport.abort()

    def _incident(self, error: Exception) -> None:
        self._tell(
            INCIDENT,
            {
                "where": "PSK key",
                "error": type(error).__name__,
                "stack": "".join(traceback.format_exception(error)),
            },
        )

    def close_all(self) -> None:
        """Say goodbye to every peer, at the end of the process."""
        for transport in tuple(self._open):
            transport.close()

    def abort_all(self) -> None:
        """End what did not go by itself."""
        for transport in tuple(self._open):
            transport.abort()


def _auth(proof: Proof | None) -> str | None:
    if proof is None:
        return None
    return "psk" if isinstance(proof, PskProof) else "certificate"


def address_of(transport: asyncio.BaseTransport) -> str:
    """The peer's address as `HOST:PORT`, `[HOST]:PORT`; empty when it is gone."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return ""
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
