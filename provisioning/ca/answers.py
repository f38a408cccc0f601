"""OCSP answers: signed ahead, kept in memory, withdrawn the moment they are wrong.

While the token is away, what was signed goes on being given; only *good* for a
certificate that was revoked meanwhile is withdrawn, and asked for it the responder
says `tryLater`. Nonces are not echoed (RFC 9654, 2.1 allows it): an answer from store
costs no signature, so nobody can keep the token busy by asking.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provisioning.ca.settings import CAS, FACTORY, ISSUING, OCSP
from provisioning.model.credentials import RevocationReason
from provisioning.model.errors import OutcomeUnknown, PeerError, Unavailable, Unusable
from provisioning.model.events import OCSP_SIGNED
from provisioning.model.ids import Serial
from provisioning.x509.ocsp import (
    GOOD,
    UNKNOWN,
    CertId,
    IssuerId,
    OcspStatus,
    Responder,
    answer,
    internal,
    issuer_ids,
    malformed,
    parse_request,
    try_later,
    unauthorized,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.ca.renew import Own
    from provisioning.ca.settings import CaSettings
    from provisioning.hsm.token import Token
    from provisioning.registry.records import CertStatus
    from provisioning.registry.store import Registry

DEVICE_CAS = (ISSUING, FACTORY)
"""Whose certificates are signed for ahead; the root's are few."""
BATCH = 32
"""Answers signed in one visit to the token: a millisecond that others wait."""
BREATH_S = 0.02
"""Between batches, so that signing ahead takes a small part of one core."""
MOST_ASKING = 256
"""Questions that wait for a signature; the next one is told to try later."""
PASSES = 4
"""How often in an answer's life all are looked through; half of it stays for use."""
_TRIES = 3


@dataclass(frozen=True, slots=True)
class OcspReply:
    """A response, and how long it may be cached; None for errors, which may not."""

    der: bytes = field(repr=False)
    this_update: datetime | None = None
    next_update: datetime | None = None


@dataclass(eq=False, slots=True)
class _Flight:
    """Signatures under way; what is withdrawn meanwhile must not be kept."""

    withdrawn: set[Serial] = field(default_factory=set)


class OcspAnswers:
    """The store of signed answers. Everything in it is owned by the loop's thread."""

    def __init__(  # noqa: PLR0913 - the parts it joins, each by its name
        self,
        *,
        registry: Registry,
        token: Token,
        hierarchy: Hierarchy,
        own: Own,
        settings: CaSettings,
        clock: Callable[[], datetime],
        on_event: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._registry = registry
        self._token = token
        self._hierarchy = hierarchy
        self._settings = settings
        self._clock = clock
        self._tell = on_event
        self._ids: dict[str, tuple[IssuerId, ...]] = {
            name: issuer_ids(issuer.certificate)
            for name, issuer in hierarchy.issuers.items()
        }
        self._names = {one: name for name, ids in self._ids.items() for one in ids}
        self._store: dict[CertId, OcspReply] = {}
        self._flights: set[_Flight] = set()
        self._asking = 0
        # Withdrawn, and to be signed anew.
        self._to_sign: dict[Serial, None] = {}
        # By CA: the rows that the look before the last, and the last one, came to.
        self._looked = dict.fromkeys(DEVICE_CAS, (0, 0))
        self._responders: dict[str, Responder] = {}
        self._ours: dict[str, frozenset[Serial]] = {}
        self._server = self._use(own)

    def use(self, own: Own) -> None:
        """The gateway's own certificates were renewed: staple and sign by the new."""
        self._server = self._use(own)

    def withdraw(self, serial: Serial) -> None:
        """What was said about this certificate is no longer true."""
        for ids in self._ids.values():
            for one in ids:
                self._store.pop(CertId(one, serial), None)
        for flight in self._flights:
            flight.withdrawn.add(serial)
        self._to_sign[serial] = None

    def staple(self) -> bytes | None:
        """The answer about the server's certificate (RFC 6066, 8); None without one."""
        kept = self._kept(self._server)
        return None if kept is None else kept.der

    async def answer(self, request_der: bytes) -> OcspReply:
        """The response to a request as sent by anybody; never raises for its content.

        Errors (malformedRequest, tryLater, unauthorized) are responses too.
        """
        try:
            items = parse_request(request_der).items
        except PeerError:
            return OcspReply(malformed())
        kept = self._kept(items[0]) if len(items) == 1 else None
        return kept or await self._signed_now(items)

    async def sign_all(self) -> int:
        """Look through every unexpired certificate; how many answers were signed.

        Raises Unavailable or Unusable, with what was signed so far kept.
        """
        count = await self.sign_own()
        for name in DEVICE_CAS:
            self._looked[name] = (0, 0)
            count += await self._sign_after(name)
        now = self._clock()
        over = [one for one, kept in self._store.items() if not _fresh(kept, now)]
        for one in over:
            del self._store[one]
        return count

    async def sign_new(self) -> int:
        """Sign for what was issued or withdrawn since; raises as `sign_all`."""
        count = await self.sign_own()
        while self._to_sign:
            batch = list(self._to_sign)[:BATCH]
            for name in DEVICE_CAS:
                found = [await self._row(name, serial) for serial in batch]
                rows = [row for row in found if row is not None]
                count += await self._sign_ahead(name, rows)
            for done in batch:
                self._to_sign.pop(done, None)
        for name in DEVICE_CAS:
            count += await self._sign_after(name)
        return count

    async def _sign_after(self, name: str) -> int:
        """Sign for the rows after those that an earlier look has come to.

        It begins where the look before the last one ended: rows get their number when
        they are intended and appear when they are issued, a little out of order.
        """
        count = 0
        after, newest = self._looked[name]
        begin = newest
        while rows := await self._registry.unexpired_serials(
            name, after, BATCH, self._clock()
        ):
            after = rows[-1].id
            count += await self._sign_ahead(name, rows)
        self._looked[name] = (begin, max(after, newest))
        return count

    async def sign_own(self) -> int:
        """Sign for the server's and the CAs' certificates, where that is due."""
        due = [
            CertId(self._ids[name][0], serial)
            for name in CAS
            for serial in self._ours[name]
        ]
        due = [item for item in due if self._due(item)]
        for item in due:
            await self._sign(self._names[item.issuer], [[(item, GOOD)]], _Flight())
        return len(due)

    # Signing --------------------------------------------------------------------

    async def _signed_now(self, items: Sequence[CertId]) -> OcspReply:
        names = {self._names.get(item.issuer) for item in items}
        name = names.pop()
        # One response is signed by one issuer's responder.
        if names or name is None:
            return OcspReply(unauthorized())
        if self._asking >= MOST_ASKING:
            return OcspReply(try_later())
        self._asking += 1
        try:
            return await self._looked_up(name, items)
        except (Unavailable, OutcomeUnknown):
            return OcspReply(try_later())
        except Unusable:
            return OcspReply(internal())
        finally:
            self._asking -= 1

    async def _looked_up(self, name: str, items: Sequence[CertId]) -> OcspReply:
        for _ in range(_TRIES):
            flight = self._take_off()
            try:
                asked = [
                    (item, await self._status(name, item.serial)) for item in items
                ]
                reply = (await self._sign(name, [asked], flight))[0]
            finally:
                self._flights.discard(flight)
            if not flight.withdrawn.intersection(item.serial for item in items):
                return reply
        return OcspReply(try_later())

    async def _sign_ahead(self, name: str, rows: Iterable[CertStatus]) -> int:
        """Sign one batch of those that are due, named by SHA-1 as nearly all ask."""
        flight = self._take_off()
        try:
            by_sha1 = self._ids[name][0]
            due = [
                [(CertId(by_sha1, row.serial), _seen(row))]
                for row in rows
                if self._due(CertId(by_sha1, row.serial))
            ]
            if due:
                await self._sign(name, due, flight)
        finally:
            self._flights.discard(flight)
        await asyncio.sleep(BREATH_S if due else 0)
        return len(due)

    async def _sign(
        self,
        name: str,
        questions: Sequence[Sequence[tuple[CertId, OcspStatus]]],
        flight: _Flight,
    ) -> list[OcspReply]:
        """One visit to the token for all; answers to one question each are kept."""
        responder = self._responders[name]
        now = self._clock().replace(microsecond=0)
        until = min(
            now + self._settings.ocsp_lifetime,
            responder.certificate.not_valid_after_utc,
        )

        def sign(key: ec.EllipticCurvePrivateKey) -> list[bytes]:
            return [answer(items, responder, now, until, key) for items in questions]

        replies = [
            OcspReply(der, now, until) for der in await self._token.use(OCSP, sign)
        ]
        for items, reply in zip(questions, replies, strict=True):
            item, status = items[0]
            # What was never issued is not kept: strangers would fill the store.
            if len(items) == 1 and status.known and item.serial not in flight.withdrawn:
                self._store[item] = reply
        self._tell(OCSP_SIGNED, {"issuer": name, "count": len(replies)})
        return replies

    async def _status(self, name: str, serial: Serial) -> OcspStatus:
        if serial in self._ours[name]:
            return GOOD
        row = await self._row(name, serial)
        return UNKNOWN if row is None else _seen(row)

    async def _row(self, name: str, serial: Serial) -> CertStatus | None:
        return await self._registry.certificate_status(name, serial)

    # The store ------------------------------------------------------------------

    def _use(self, own: Own) -> CertId:
        self._responders = {
            name: Responder(der) for name, der in own.responders.items()
        }
        server = Serial(own.server_certificate.serial_number)
        for name in CAS:
            ours = set(self._hierarchy.issued_here(name))
            ours.add(Serial(self._responders[name].certificate.serial_number))
            if name == ISSUING:
                ours.add(server)
            # Those before were issued too, and stay good until they end.
            self._ours[name] = self._ours.get(name, frozenset()) | ours
        return CertId(self._ids[ISSUING][0], server)

    def _kept(self, item: CertId) -> OcspReply | None:
        kept = self._store.get(item)
        return kept if kept is not None and _fresh(kept, self._clock()) else None

    def _due(self, item: CertId) -> bool:
        """Whether less than half of its life is left: nothing, or soon nothing."""
        kept = self._store.get(item)
        if kept is None or kept.next_update is None:
            return True
        return self._clock() + self._settings.ocsp_lifetime / 2 >= kept.next_update

    def _take_off(self) -> _Flight:
        flight = _Flight()
        self._flights.add(flight)
        return flight


def _fresh(kept: OcspReply, now: datetime) -> bool:
    return kept.next_update is not None and now < kept.next_update


def _seen(row: CertStatus) -> OcspStatus:
    if row.revoked_at is None:
        return GOOD
    reason = row.reason or RevocationReason.UNSPECIFIED
    return OcspStatus(known=True, revoked_at=row.revoked_at, reason=reason)
