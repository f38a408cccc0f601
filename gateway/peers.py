"""Who is on a connection: from what TLS proved to the credential the registry knows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.listen.limits import address_of
from gateway.live import Connection, Live
from provisioning.enrol.admission import standing_refusal
from provisioning.model.credentials import AuthMethod, CertificateProof
from provisioning.model.errors import PeerError, Unavailable
from provisioning.model.ids import PskIdentity
from provisioning.model.refusals import (
    CREDENTIAL_MISSING,
    CREDENTIAL_UNKNOWN,
    TOO_MANY_REQUESTS,
    Refusal,
)
from provisioning.x509.inspect import peer_facts

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta

    from provisioning.model.credentials import Proof, Standing
    from provisioning.model.ids import Serial
    from provisioning.registry.store import Registry
    from provisioning.tls.aio import TlsTransport


@dataclass(frozen=True, slots=True)
class Peer:
    """A connection's device. refusal: why it may do nothing now; None if it may.

    standing: None where the credential is not in the registry.
    """

    auth: AuthMethod
    standing: Standing | None
    refusal: Refusal | None


class Peers:
    """Finds out who is on a TLS connection, and tells the registry of it once."""

    def __init__(
        self,
        registry: Registry,
        live: Live,
        *,
        clock: Callable[[], datetime],
        grace: timedelta,
        most: int,
    ) -> None:
        self._registry = registry
        self._live = live
        self._clock = clock
        self._grace = grace
        self._most = most
        self.in_step: Callable[[], bool] = lambda: True
        """Whether what the registry's cache says is up to date; set by the app."""

    async def look(self, proof: Proof | None) -> Peer | None:
        """The peer as the registry sees it now; None without a credential.

        Asked again for every request: what was revoked since is refused.
        Raises Unavailable while the registry is away.
        """
        if proof is None:
            return None
        if isinstance(proof, CertificateProof):
            auth = AuthMethod.CERTIFICATE
            serial = _serial(proof.der)
            standing = (
                await self._registry.standing_of_certificate(serial, self._clock())
                if serial is not None
                else None
            )
        else:
            auth = AuthMethod.PSK
            standing = await self._registry.standing_of_psk(
                proof.identity, self._clock()
            )
        if standing is None:
            return Peer(auth, None, CREDENTIAL_UNKNOWN)
        return Peer(auth, standing, standing_refusal(standing, self._clock()))

    async def arrived(
        self, transport: TlsTransport, peer: Peer, cut: Callable[[Refusal], None]
    ) -> tuple[Peer, Connection | None]:
        """A device is let in on this connection: the registry is told, once.

        Its first connection proves a credential, its second ends the older one.
        Returns the peer as it stands after that, and what to `remove` from `Live`.
        """
        if not self.in_step():
            # A revocation could not be seen: nobody new until it can (DESIGN).
            raise Unavailable("the registry")
        established = transport.established
        standing = peer.standing
        if standing is None or established is None or peer.refusal is not None:
            return peer, None
        standing = await self._registry.connected(
            standing.credential.id,
            auth=peer.auth,
            resumed=established.resumed,
            address=address_of(transport),
            now=self._clock(),
            grace=self._grace,
        )
        refusal = standing_refusal(standing, self._clock())
        peer = Peer(peer.auth, standing, refusal)
        if refusal is not None or transport.is_closing():
            return peer, None
        credential = standing.credential
        for oldest in self._live.of(credential.device)[: 1 - self._most or None]:
            # The newest is the device; the oldest may be what a lost network left.
            self._live.remove(oldest)
            oldest.cut(TOO_MANY_REQUESTS)
        named = credential.serial or PskIdentity(
            credential.device, credential.generation or 0
        )
        connection = Connection(credential.device, named, cut)
        self._live.add(connection)
        # A revocation that was applied while the registry was told found nothing to
        # cut here; from now on it finds this connection, so one more look is enough.
        try:
            again = await self.look(established.proof)
        except BaseException:
            self._live.remove(connection)
            raise
        if again is None or again.refusal is not None:
            self._live.remove(connection)
            return again or peer, None
        return again, connection


def admitted(peer: Peer | None, *, despite: Refusal | None = None) -> Standing:
    """The standing of a peer that may go on; raises the refusal for any other.

    despite: one refusal that is judged elsewhere, such as expiry when re-enrolling.
    """
    if peer is None:
        raise PeerError(CREDENTIAL_MISSING)
    if peer.refusal is not None and peer.refusal is not despite:
        raise PeerError(peer.refusal)
    if peer.standing is None:
        raise PeerError(CREDENTIAL_UNKNOWN)
    return peer.standing


@functools.lru_cache(maxsize=4_096)
def _serial(der: bytes) -> Serial | None:
    """The serial in a device certificate; a device shows the same one every time."""
    try:
        return peer_facts(der).serial
    except PeerError:
        return None
