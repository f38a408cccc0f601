"""The asyncio face of a PKCS#11 token: callers wait here while its thread works."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import override

from provisioning.hsm.attributes import check_keys
from provisioning.hsm.login import TokenConfig, open_session
from provisioning.hsm.owner import Job, Owner, Trouble
from provisioning.hsm.token import HSM, Token
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.model.events import TOKEN_AWAY, TOKEN_BACK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.hsm.owner import Keyring
    from provisioning.hsm.session import Session

__all__ = ["Pkcs11Token", "TokenConfig", "open_token"]

T = TypeVar("T")

FROZEN_RETRY_S = 5.0
LEAST_RETRY_S = 1.0
ABANDONED_JOIN_S = 1.0


async def open_token(
    config: TokenConfig,
    *,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    opener: Callable[[TokenConfig, bool], Session] | None = None,
) -> Pkcs11Token:
    """Load the module, find the token and log in.

    on_event: told of token_away and token_back (model/events.py), on the loop.
    opener: opens a session, its second argument says whether it is the first; the
    simulator gives its own here.
    A token that is away now is returned all the same: its calls raise Unavailable
    until it comes, by itself. Raises Unusable when the operator must act first, and
    RuntimeError when this process has the module open already.
    """
    token = Pkcs11Token(config, on_event, opener or open_session)
    try:
        await token.started()
    except BaseException:
        await token.close()
        raise
    return token


class Pkcs11Token(Token):
    """A token behind a PKCS#11 module; made by `open_token`."""

    def __init__(
        self,
        config: TokenConfig,
        on_event: Callable[[str, dict[str, Any]], None] | None,
        opener: Callable[[TokenConfig, bool], Session],
    ) -> None:
        self._config = config
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._owner = Owner(lambda first: opener(config, first), self._notify)
        self._outgoing: list[Job] = []
        """Asked for since the loop last went round; handed over in one go."""
        self._inside = 0
        """Jobs that the thread has, or will have, and has not given back."""
        self._pending: deque[Job] = deque()
        """The same by their deadlines; those done in the middle leave later."""
        self._watch: asyncio.TimerHandle | None = None
        self._frozen = False
        self._told_away = False
        self._closed = False
        self._ended = self._loop.create_future()
        _own(config.module, self._owner, self._loop)
        self._owner.start()

    async def started(self) -> None:
        """Wait until the first try to open is over; raises Unusable if it says so."""
        with contextlib.suppress(Unavailable):
            await self._submit("the first session", _nothing)

    @property
    def trouble(self) -> str | None:
        """Why the token cannot be used just now, for health; None while it can."""
        trouble = self._owner.trouble
        if trouble is not None:
            return trouble.why
        if self._stuck():
            return "the module does not answer"
        return None

    @override
    async def use(
        self, label: str, work: Callable[[ec.EllipticCurvePrivateKey], T]
    ) -> T:
        return await self._submit(
            f"a signature by {label}", lambda ring: work(ring.key(label))
        )

    @override
    async def hmac(self, label: str, message: bytes) -> bytes:
        return await self._submit(
            f"an HMAC by {label}", lambda ring: ring.mac(label, message)
        )

    @override
    async def make_ec_key(self, label: str) -> ec.EllipticCurvePublicKey:
        return await self._submit(
            f"the making of key {label}", lambda ring: ring.make_ec(label).public_key
        )

    @override
    async def make_hmac_key(self, label: str) -> None:
        await self._submit(
            f"the making of secret {label}", lambda ring: ring.make_secret(label)
        )

    @override
    async def public_key(self, label: str) -> ec.EllipticCurvePublicKey:
        return await self._submit(
            f"the public key of {label}", lambda ring: ring.pair(label).public_key
        )

    @override
    async def set_id(self, label: str, key_id: bytes) -> None:
        await self._submit(
            f"the ID of {label}",
            lambda ring: ring.session.set_id(ring.pair(label), key_id),
        )

    @override
    async def check(self, ec_labels: Iterable[str], hmac_labels: Iterable[str]) -> None:
        ec_wanted, hmac_wanted = tuple(ec_labels), tuple(hmac_labels)
        await self._submit(
            "the check of the keys",
            lambda ring: check_keys(ring, ec_wanted, hmac_wanted),
        )

    @override
    async def close(self) -> None:
        """As hsm/token.py says; a module that is stuck is left behind, with its thread.

        Waits for the call in hand, for as long as a caller would.
        """
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._owner.stop()
        with contextlib.suppress(TimeoutError):
            # Shielded: a second `close` waits for the same end.
            await asyncio.wait_for(asyncio.shield(self._ended), self._config.deadline_s)
        self._expire_all()

    # The loop's side: what callers share, changed in plain functions only. --------

    def _submit(self, what: str, work: Callable[[Keyring], T]) -> asyncio.Future[T]:
        self._refuse_if_away()
        future: asyncio.Future[T] = self._loop.create_future()
        job = Job(what, work, future, self._loop.time() + self._config.deadline_s)
        if not self._outgoing:
            self._loop.call_soon(self._hand_over)
        self._outgoing.append(job)
        self._inside += 1
        self._pending.append(job)
        if self._watch is None:
            self._watch = self._loop.call_at(job.expires, self._expire)
        return future

    def _refuse_if_away(self) -> None:
        """Short outages are waited for; in long ones callers are told at once."""
        if self._closed:
            raise Unavailable(HSM, FROZEN_RETRY_S)
        trouble = self._owner.trouble
        if trouble is not None:
            if trouble.unusable:
                raise Unusable(HSM, trouble.why)
            if self._loop.time() - trouble.since > self._config.deadline_s:
                raise self._away(trouble)
        if self._stuck():
            raise Unavailable(HSM, FROZEN_RETRY_S)
        if self._inside >= self._config.waiting:
            raise Unavailable(HSM, LEAST_RETRY_S)

    def _away(self, trouble: Trouble | None) -> Unavailable:
        if trouble is None or trouble.retry_at is None:
            return Unavailable(HSM, FROZEN_RETRY_S)
        wait_s = trouble.retry_at - self._loop.time()
        return Unavailable(HSM, round(max(LEAST_RETRY_S, wait_s), 1))

    def _stuck(self) -> bool:
        """Whether one call has taken so long that no more callers should wait.

        Half of a deadline: a caller who gave up waited from before that call began,
        so that the whole one would not be over when it is looked at.
        """
        since = self._owner.busy_since
        patience_s = self._config.deadline_s / 2
        return since is not None and self._loop.time() - since > patience_s

    def _hand_over(self) -> None:
        if self._outgoing:
            jobs, self._outgoing = self._outgoing, []
            self._owner.submit(jobs)

    def _notify(self) -> None:
        """On the owner's thread: there is something to collect."""
        # A loop that is closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        owner = self._owner
        # Before the outbox is emptied: what comes later notifies again.
        owner.told = False
        outbox = owner.outbox
        while outbox:
            out = outbox.popleft()
            if isinstance(out, Job):
                self._deliver(out)
            else:
                self._tell(out)
        pending = self._pending
        while pending and pending[0].future.done():
            pending.popleft()
        if owner.ended and not self._ended.done():
            _disown(self._config.module, owner)
            self._ended.set_result(None)

    def _deliver(self, job: Job) -> None:
        self._inside -= 1
        if self._frozen:
            self._frozen = False
            self._tell(None)
        future = job.future
        if future.done():
            return
        if job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.result)

    def _expire(self) -> None:
        """The watch rang: answers that came meanwhile first, then the late ones."""
        self._watch = None
        self._collect()
        now = self._loop.time()
        while self._pending and self._pending[0].expires <= now:
            self._give_up(self._pending.popleft())
        while self._pending and self._pending[0].future.done():
            self._pending.popleft()
        if self._pending:
            self._watch = self._loop.call_at(self._pending[0].expires, self._expire)

    def _expire_all(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._pending:
            self._give_up(self._pending.popleft())

    def _give_up(self, job: Job) -> None:
        with self._owner.lock:
            # Under the lock: the thread asks the token only while somebody waits.
            if job.future.done():
                return
            error = (
                OutcomeUnknown(job.what)
                if job.asked
                else self._away(self._owner.trouble)
            )
            job.future.set_exception(error)
        if self._stuck() and not self._frozen:
            self._frozen = True
            self._tell(Trouble(job.expires, "the module does not answer", None))

    def _tell(self, trouble: Trouble | None) -> None:
        """Once when it goes and once when it comes, whichever way it was noticed."""
        if trouble is None:
            if self._told_away:
                self._told_away = False
                self._emit(TOKEN_BACK, {"what": HSM})
        elif not self._told_away or trouble.unusable:
            self._told_away = True
            retry_after_s = self._away(trouble).retry_after_s
            self._emit(
                TOKEN_AWAY,
                {"what": HSM, "why": trouble.why, "retry_after_s": retry_after_s},
            )

    def _emit(self, name: str, fields: dict[str, Any]) -> None:
        if self._on_event is not None:
            self._on_event(name, fields)


def _nothing(_ring: Keyring) -> None:
    """What opening waits for: that the thread has come this far."""


_owners: dict[str, tuple[int, Owner, asyncio.AbstractEventLoop]] = {}
"""Who owns a module, in which process: two threads in one crash it (FACTS)."""


def _own(module: str, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
    path = os.path.realpath(module)
    if path in _owners:
        pid, other, its_loop = _owners[path]
        if its_loop.is_closed():
            # Nobody can close it any more.
            other.stop()
            other.join(ABANDONED_JOIN_S)
        # After a fork the parent's threads are not here.
        if pid == os.getpid() and not other.ended:
            raise RuntimeError(
                f"{module} has an owner in this process already; close it first"
            )
    _owners[path] = (os.getpid(), owner, loop)


def _disown(module: str, owner: Owner) -> None:
    path = os.path.realpath(module)
    if path in _owners and _owners[path][1] is owner:
        del _owners[path]
