"""One thread that owns one token: it takes jobs, mends the session, gives answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from pkcs11 import PKCS11Error

from provisioning.hsm.faults import Fault, Kind, judge, wait_s
from provisioning.hsm.keys import TokenEcPrivateKey
from provisioning.hsm.token import HSM
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from provisioning.hsm.session import EcPair, Secret, Session

SLICE_S = 0.002
"""How long answers are gathered at most before the loop is woken for them."""


class Job:
    """What a caller wants done, and what became of it.

    what: names it in OutcomeUnknown. expires: by the monotonic clock.
    asked: the token was asked for what cannot be taken back; under the owner's lock.
    """

    __slots__ = (
        "asked",
        "error",
        "expires",
        "future",
        "result",
        "runs",
        "what",
        "work",
    )

    def __init__(
        self,
        what: str,
        work: Callable[[Keyring], Any],
        future: asyncio.Future[Any],
        expires: float,
    ) -> None:
        self.what = what
        self.work = work
        self.future = future
        self.expires = expires
        self.asked = False
        self.runs = 0
        self.result: Any = None
        self.error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """The token cannot be used. since, retry_at: by the monotonic clock.

    retry_at: None when it is never tried again. unusable: the operator must act.
    """

    since: float
    why: str
    retry_at: float | None
    unusable: bool = False


class AbandonedError(Exception):
    """Nobody waits for this job any more, so the token is not asked."""


class Keyring:
    """The keys of one session, each looked for once (look-up is linear, FACTS)."""

    def __init__(self, session: Session, ask: Callable[[], None]) -> None:
        self.session = session
        self._ask = ask
        self._pairs: dict[str, tuple[EcPair, TokenEcPrivateKey]] = {}
        self._secrets: dict[str, Secret] = {}

    def pair(self, label: str) -> EcPair:
        return self._ec(label)[0]

    def key(self, label: str) -> TokenEcPrivateKey:
        return self._ec(label)[1]

    def secret(self, label: str) -> Secret:
        found = self._secrets.get(label)
        if found is None:
            found = self._secrets[label] = self.session.find_secret(label)
        return found

    def mac(self, label: str, message: bytes) -> bytes:
        return self.session.mac(self.secret(label).signer, message)

    def make_ec(self, label: str) -> EcPair:
        self._ask()
        return self.session.make_ec(label)

    def make_secret(self, label: str) -> None:
        self._ask()
        self.session.make_secret(label)

    def _ec(self, label: str) -> tuple[EcPair, TokenEcPrivateKey]:
        found = self._pairs.get(label)
        if found is None:
            pair = self.session.find_ec(label)

            def sign(digest: bytes) -> bytes:
                self._ask()
                return self.session.sign(pair.signer, digest)

            found = self._pairs[label] = (
                pair,
                TokenEcPrivateKey(pair.public_key, sign),
            )
        return found


class Owner:
    """The thread. A module that never answers holds it, and it alone.

    opener: opens a session; its argument says whether it is the first.
    notify: called on this thread when there is something in `outbox` for the loop.
    """

    def __init__(
        self, opener: Callable[[bool], Session], notify: Callable[[], None]
    ) -> None:
        # A daemon: a module that is stuck must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, name="birthmark-token", daemon=True
        )
        self._opener = opener
        self._notify = notify
        self._inbox: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._backlog: deque[Job] = deque()
        self._keyring: Keyring | None = None
        self._job: Job | None = None
        self._first = True
        self._failures = 0
        self._flushed = 0.0
        self._stop = False
        self.lock = threading.Lock()
        self.outbox: deque[Job | Trouble | None] = deque()
        """Answers, new troubles, and None for their end: the loop takes them out."""
        self.told = False
        """Whether the loop knows that the outbox has something; it clears this."""
        self.trouble: Trouble | None = None
        """Written by this thread only."""
        self.busy_since: float | None = None
        """Since when the module has been in one call; written by this thread only."""
        self.ended = False

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        self._inbox.put(jobs)

    def stop(self) -> None:
        """End after the job in hand; the others get Unavailable."""
        self._stop = True
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the end after `stop`, without a loop."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop:
            if self._keyring is None:
                self._open()
            if self._keyring is not None:
                self._work_off()
            elif self.trouble is not None and self.trouble.unusable:
                self._refuse_backlog()
            self._flush()
            self._receive()
        self._drain(None)
        self._refuse_backlog()
        self._close()
        self.ended = True
        self._flush()

    def _receive(self) -> None:
        """Wait for jobs, or until the token is to be tried again, or for the end."""
        with contextlib.suppress(Empty):
            self._drain(self._inbox.get(timeout=self._patience_s()))

    def _patience_s(self) -> float | None:
        """How long there is nothing to do without new jobs; None: for ever."""
        trouble = self.trouble
        if self._keyring is not None:
            return 0 if self._backlog else None
        if trouble is None or (trouble.unusable and self._backlog):
            return 0
        if trouble.retry_at is None:
            return None
        return max(0.0, trouble.retry_at - time.monotonic())

    def _drain(self, batch: list[Job] | None) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._backlog.extend(batch or ())
                batch = self._inbox.get_nowait()

    def _open(self) -> None:
        trouble = self.trouble
        if trouble is not None and (
            trouble.retry_at is None or trouble.retry_at > time.monotonic()
        ):
            return
        self.busy_since = time.monotonic()
        try:
            session = self._opener(self._first)
        except PKCS11Error as error:
            self._failed(judge(error))
        except Unusable as error:
            self._failed(error)
        except Exception as error:  # noqa: BLE001 - the thread's shell: it must live
            # By its name alone: what it says was not written to be shown.
            why = f"the module fails in an unforeseen way ({type(error).__name__})"
            self._failed(Unusable(HSM, why))
        else:
            self._first = False
            self._keyring = Keyring(session, self._ask)
            if self.trouble is not None:
                self.trouble = None
                self.outbox.append(None)
        finally:
            self.busy_since = None

    def _work_off(self) -> None:
        backlog = self._backlog
        while backlog and self._keyring is not None and not self._stop:
            self._do(backlog.popleft(), self._keyring)
            if time.monotonic() - self._flushed > SLICE_S:
                self._flush()

    def _do(self, job: Job, keyring: Keyring) -> None:
        with self.lock:
            if job.future.done():
                self._answer(job)
                return
            job.asked = False
            self.busy_since = time.monotonic()
        job.runs += 1
        self._job = job
        try:
            job.result = job.work(keyring)
        except PKCS11Error as error:
            self._meet(job, judge(error))
        except AbandonedError:
            self._answer(job)
        except Exception as error:  # noqa: BLE001 - the job's shell: its caller gets it
            self._answer(job, error)
        else:
            self._failures = 0
            self._answer(job)
        finally:
            self._job = None
            self.busy_since = None

    def _ask(self) -> None:
        """Note that the token is about to be asked; raises AbandonedError."""
        if threading.get_ident() != self._thread.ident:
            raise RuntimeError("a token's key works on the token's thread only")
        job = self._job
        if job is None:
            raise RuntimeError("a token's key works in the job it was given to only")
        with self.lock:
            if job.future.done():
                raise AbandonedError
            job.asked = True

    def _meet(self, job: Job, fault: Fault) -> None:
        """Deal with a fault that a job ran into."""
        match fault.kind:
            case Kind.LOST if job.runs == 1:
                self._backlog.appendleft(job)
                self._close()
            case Kind.LOST | Kind.AWAY:
                if job.asked:
                    self._answer(job, OutcomeUnknown(job.what))
                elif job.runs == 1:
                    self._backlog.appendleft(job)
                else:
                    self._answer(job, Unavailable(HSM, wait_s(self._failures + 1)))
                self._close()
                self._failed(fault)
            case Kind.PIN:
                self._answer(job, Unusable(HSM, str(fault)))
                self._close()
                self._failed(fault)
            case Kind.UNUSABLE:
                self._answer(job, Unusable(HSM, str(fault)))

    def _failed(self, fault: Fault | Unusable) -> None:
        """The session could not be had, or kept: when to try again, if ever."""
        now = time.monotonic()
        self._failures += 1
        never = isinstance(fault, Unusable) or fault.kind is Kind.PIN
        mine = isinstance(fault, Fault) and fault.kind in (Kind.AWAY, Kind.LOST)
        before = self.trouble
        self.trouble = Trouble(
            since=now if before is None else before.since,
            why=fault.why if isinstance(fault, Unusable) else str(fault),
            retry_at=None if never else now + wait_s(self._failures),
            unusable=not mine,
        )
        if before is None or before.unusable is mine:
            # Once an outage, and once more if it turns out to be the operator's.
            self.outbox.append(self.trouble)

    def _refuse_backlog(self) -> None:
        trouble = self.trouble
        while self._backlog:
            # One for each caller: an error that is raised twice keeps both stacks.
            self._answer(
                self._backlog.popleft(),
                Unusable(HSM, trouble.why)
                if trouble is not None and trouble.unusable
                else Unavailable(HSM),
            )

    def _answer(self, job: Job, error: Exception | None = None) -> None:
        job.error = error
        self.outbox.append(job)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if (self.outbox or self.ended) and not self.told:
            self.told = True
            self._notify()

    def _close(self) -> None:
        if self._keyring is None:
            return
        keyring, self._keyring = self._keyring, None
        self.busy_since = time.monotonic()
        # It is let go for good or ill: the next one starts from nothing.
        with contextlib.suppress(PKCS11Error):
            keyring.session.close()
        self.busy_since = None
