"""What relying parties are told: CRL files and OCSP answers, kept fresh."""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cryptography import x509

from provisioning.ca.answers import PASSES, OcspAnswers, OcspReply
from provisioning.ca.files import PUBLIC, make_folder, write_atomically
from provisioning.ca.settings import CAS
from provisioning.model.credentials import RevocationReason
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.model.events import CRL_PUBLISHED
from provisioning.model.ids import Serial
from provisioning.x509.crl import CrlEntry, crl

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from datetime import datetime, timedelta
    from pathlib import Path

    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.ca.renew import Own
    from provisioning.ca.settings import CaSettings
    from provisioning.hsm.token import Token
    from provisioning.registry.changes import Change
    from provisioning.registry.store import Registry

_CRL, _OCSP = "CRL", "OCSP answers"
LOST_RETRY_S = 1.0
UNUSABLE_RETRY_S = 30.0
"""How soon it is tried again when the operator must act first."""
REVOKED = "revoked"
"""As changes spell the state of a credential."""
EARLY = 7
"""A list is replaced after this part of its life: the rest is for outages."""


class CrlFiles:
    """Keeps `public/crl/NAME.crl` of every CA fresh.

    Its owner publishes at start, after `changed`, and long before nextUpdate. While
    the token is away the lists that stand go on.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins, each by its name
        self,
        *,
        registry: Registry,
        token: Token,
        hierarchy: Hierarchy,
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
        self._dirty = asyncio.Event()

    def changed(self) -> None:
        """Something was revoked, or a revocation was taken back: publish soon."""
        self._dirty.set()

    async def refresh(self) -> None:
        """Publish a fresh list of every CA now.

        Raises Unavailable when token or registry are away, Unusable as the token;
        what was changed then still waits to be published.
        """
        # Before the registry is read: what is revoked from now on is another change.
        self._dirty.clear()
        try:
            await self._publish_all()
        except BaseException:
            self._dirty.set()
            raise

    async def _publish_all(self) -> None:
        for name in CAS:
            await self._publish(name)

    async def wait(self, period: timedelta) -> None:
        """Until something was revoked and others had time to be, or a time is over."""
        try:
            async with asyncio.timeout(period.total_seconds()):
                await self._dirty.wait()
        except TimeoutError:
            return
        # A campaign of revocations is one list, not a hundred.
        await asyncio.sleep(self._settings.debounce.total_seconds())

    async def _publish(self, name: str) -> None:
        issuer = self._hierarchy.issuers[name]
        path = self._settings.crl_path(name)
        # The number first: a list with a higher number then never knows less.
        number = await self._registry.next_crl_number(name)
        # A registry from a backup has forgotten numbers that relying parties saw.
        while number <= published_number(path):
            number = await self._registry.next_crl_number(name)
        entries = [
            CrlEntry(
                one.serial,
                one.revoked_at,
                one.reason or RevocationReason.UNSPECIFIED,
            )
            for one in await self._registry.revoked(name, self._clock())
            if one.revoked_at is not None
        ]
        this_update = self._clock().replace(microsecond=0)
        next_update = this_update + self._settings.crl_lifetime
        try:
            der = await self._token.use(
                name,
                lambda key: crl(issuer, number, this_update, next_update, entries, key),
            )
        except OutcomeUnknown:
            # A list that may have been signed and that nobody has: its number is
            # skipped, which numbers may be (RFC 5280, 5.2.3).
            raise Unavailable("HSM") from None
        if write_newer(path, der, number):
            self._tell(
                CRL_PUBLISHED,
                {"issuer": name, "number": number, "entries": len(entries)},
            )


class Publisher:
    """Everything that is published about certificates.

    `run` keeps it fresh; `changed` is told of every change of the registry; `use` of
    the gateway's own certificates when they were renewed.
    """

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
        self._settings = settings
        self._crls = CrlFiles(
            registry=registry,
            token=token,
            hierarchy=hierarchy,
            settings=settings,
            clock=clock,
            on_event=on_event,
        )
        self._answers = OcspAnswers(
            registry=registry,
            token=token,
            hierarchy=hierarchy,
            own=own,
            settings=settings,
            clock=clock,
            on_event=on_event,
        )
        # Set by `changed` when an answer was withdrawn, so that it is signed anew.
        self._withdrawn = asyncio.Event()
        # By what is troubled. Owned by the tasks of `run`.
        self._troubles: dict[str, str] = {}

    @property
    def trouble(self) -> str | None:
        """Why something cannot be kept fresh just now, for health; None if all is."""
        found = [f"{what}: {why}" for what, why in self._troubles.items()]
        return "; ".join(found) or None

    def changed(self, change: Change) -> None:
        """Apply one change of the registry (registry/changes.py); does no I/O."""
        serial = change.detail.get("serial")
        if (
            change.kind == "credential"
            and change.detail.get("state") == REVOKED
            and isinstance(serial, str)
        ):
            self._answers.withdraw(Serial.parse(serial))
            self._withdrawn.set()
            self._crls.changed()

    def use(self, own: Own) -> None:
        """The gateway's own certificates were renewed: staple and sign by the new."""
        self._answers.use(own)
        self._withdrawn.set()

    async def refresh(self) -> None:
        """Publish fresh CRLs now; raises Unavailable or Unusable."""
        await self._crls.refresh()

    async def answer(self, request_der: bytes) -> OcspReply:
        """The OCSP response to a request as sent by anybody."""
        return await self._answers.answer(request_der)

    def staple(self) -> bytes | None:
        """The OCSP response about the server's certificate, None without a fresh one.

        For the TLS engine, asked at each handshake.
        """
        return self._answers.staple()

    async def start(self) -> None:
        """Sign the staple before anybody connects.

        A token that is away is not waited for: `run` catches up.
        """
        try:
            await self._answers.sign_own()
        except (Unavailable, OutcomeUnknown, Unusable) as away:
            self._troubles[_OCSP] = str(away)

    async def run(self) -> None:
        """Keep everything fresh until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_crls())
            tasks.create_task(self._keep_answers())

    async def _keep_crls(self) -> None:
        while True:
            await self._until_done(_CRL, self._crls.refresh)
            await self._crls.wait(self._settings.crl_lifetime / EARLY)

    async def _keep_answers(self) -> None:
        while True:
            await self._until_done(_OCSP, self._answers.sign_all)
            for _ in range(self._looks_between()):
                await self._pause(self._settings.presign_every)
                await self._until_done(_OCSP, self._answers.sign_new)

    def _looks_between(self) -> int:
        """How often only new certificates are looked for, until all are again."""
        again = self._settings.ocsp_lifetime / (2 * PASSES)
        return max(1, again // self._settings.presign_every)

    async def _until_done(
        self, what: str, work: Callable[[], Awaitable[object]]
    ) -> None:
        """Do it, however long token or registry are away; what stands goes on."""
        while True:
            try:
                await work()
            except Unavailable as away:
                self._troubles[what] = str(away)
                await asyncio.sleep(away.retry_after_s)
            except OutcomeUnknown as lost:
                # A list or an answer that nobody has: made again, it is another one.
                self._troubles[what] = str(lost)
                await asyncio.sleep(LOST_RETRY_S)
            except OSError as full:
                # A full disk, or a folder that is not ours any more.
                self._troubles[what] = str(full)
                await asyncio.sleep(UNUSABLE_RETRY_S)
            except Unusable as broken:
                self._troubles[what] = str(broken)
                await asyncio.sleep(UNUSABLE_RETRY_S)
            else:
                self._troubles.pop(what, None)
                return

    async def _pause(self, period: timedelta) -> None:
        try:
            async with asyncio.timeout(period.total_seconds()):
                await self._withdrawn.wait()
        except TimeoutError:
            return
        self._withdrawn.clear()


def write_newer(path: Path, der: bytes, number: int) -> bool:
    """Write the list unless a newer one stands there; whether it was written.

    Another process (`birthmark ca crl`) may have drawn a later number and finished
    first. The lock is the folder's and held for the comparison and the write.
    """
    make_folder(path.parent, 0o755)
    with _locked(path.parent):
        if published_number(path) >= number:
            return False
        write_atomically(path, der, PUBLIC)
        return True


def published_number(path: Path) -> int:
    """The number of the list that stands there; 0 for none, or none of ours."""
    try:
        standing = x509.load_der_x509_crl(path.read_bytes())
        seen = standing.extensions.get_extension_for_class(x509.CRLNumber)
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return 0
    return seen.value.crl_number


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
