"""A gateway that clocks its own parts: `python -m bench.profiled --data DIR gateway`.

Every thread has one clock (its own CPU time) and one stack of parts; whatever runs is
charged to the part on top, so nothing is counted twice and the parts add up to what
the process used. Coroutines are charged step by step, greenlets (SQLAlchemy's) have
stacks of their own. SIGUSR1 writes what has been counted so far to $BENCH_PROFILE.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import greenlet  # type: ignore[import-untyped] # it has no stubs
from aiohttp.web_protocol import RequestHandler

import provisioning.ca.issue
import provisioning.enrol.answer
import provisioning.tls.aio
import provisioning.wire.est
import provisioning.x509.csr
from gateway.cli.main import main
from gateway.http.device import DeviceApi
from gateway.http.protocol import HttpConnection
from gateway.log import EventLog
from gateway.mqtt.relay import Relay
from gateway.peers import Peers
from provisioning.enrol.answer import Enrolment
from provisioning.hsm.keys import TokenEcPrivateKey
from provisioning.registry.store import Registry
from provisioning.registry.writer import Writer
from provisioning.tls import engine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

LOOP = "event loop, sockets, tasks (asyncio)"
HANDSHAKE = "TLS handshake"
RECORDS = "TLS records"
SHELL = "TLS transport's shell"
HTTP = "HTTP (aiohttp)"
ROUTE = "routing, EST bodies, answer"
PEER = "who is it (certificate read, standing)"
CSR = "CSR parsed, names and key judged"
CSR_SIGNATURE = "CSR signature verified"
ADMISSION = "admission (decide, intent made)"
ENROLMENT = "enrolment's tasks and futures"
BUILD = "certificate built"
SIGN = "certificate signed (PKCS#11 call)"
INSPECT = "certificate inspected (a verification in it)"
MQTT = "MQTT relay"
EVENTS = "events logged"
REGISTRY = "registry, all operations (SQLAlchemy)"

_clock = time.thread_time_ns


class Clock:
    """What one thread spent on which part, in nanoseconds."""

    def __init__(self, base: str) -> None:
        self.spent: Counter[str] = Counter()
        self.base = base
        self.stack = [base]
        self.stacks: dict[int, list[str]] = {}
        self.last = _clock()

    def push(self, part: str) -> None:
        now = _clock()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now
        self.stack.append(part)

    def pop(self) -> None:
        now = _clock()
        self.spent[self.stack.pop()] += now - self.last
        self.last = now

    def switch(self, origin: int, target: int) -> None:
        """Another greenlet goes on."""
        now = _clock()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now
        self.stacks[origin] = self.stack
        self.stack = self.stacks.pop(target, [REGISTRY])


CLOCKS: dict[int, Clock] = {}
OPERATIONS: Counter[str] = Counter()
"""Nanoseconds of the registry by what was asked of it; COUNTS: how often."""
COUNTS: Counter[str] = Counter()
MAIN = threading.get_ident()


def mine() -> Clock:
    """The clock of the thread that asks."""
    ident = threading.get_ident()
    found = CLOCKS.get(ident)
    if found is None:
        base = LOOP if ident == MAIN else f"thread {threading.current_thread().name}"
        found = CLOCKS[ident] = Clock(base)
    return found


def timed(owner: Any, name: str, part: str | Callable[[Any], str]) -> None:
    """Charge a function to a part; a callable names it by the first argument."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **named: Any) -> Any:
        clock = mine()
        clock.push(part if isinstance(part, str) else part(args[0]))
        try:
            return inner(*args, **named)
        finally:
            clock.pop()

    setattr(owner, name, outer)


class Steps:
    """A coroutine whose every step is charged to a part."""

    def __init__(self, inner: Coroutine[Any, Any, Any], part: str) -> None:
        self._inner = inner
        self._part = part

    def __await__(self) -> Generator[Any, Any, Any]:
        inner, part = self._inner, self._part
        clock = mine()
        value: Any = None
        error: BaseException | None = None
        while True:
            clock.push(part)
            try:
                asked = inner.send(value) if error is None else inner.throw(error)
            except StopIteration as done:
                return done.value
            finally:
                clock.pop()
            try:
                value, error = (yield asked), None
            except BaseException as thrown:  # noqa: BLE001 - handed on to the coroutine
                value, error = None, thrown


def timed_steps(owner: Any, name: str, part: str) -> None:
    """Charge a coroutine function's steps to a part."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    async def outer(*args: Any, **named: Any) -> Any:
        return await Steps(inner(*args, **named), part)

    setattr(owner, name, outer)


def _phase(one: engine.Engine) -> str:
    return HANDSHAKE if one.established is None else RECORDS


def _shared_among(attempt: Any) -> Any:
    """Split what a group cost the main thread among its operations, equally."""

    @functools.wraps(attempt)
    async def outer(self: Writer, group: Any) -> None:
        clock = mine()
        before = clock.spent[REGISTRY]
        await Steps(attempt(self, group), REGISTRY)
        share = (clock.spent[REGISTRY] - before) // len(group)
        for ticket in group:
            kind = type(ticket.operation).__name__
            OPERATIONS[kind] += share
            COUNTS[kind] += 1
        COUNTS["groups"] += 1

    return outer


def install() -> None:
    """Put the clocks in."""
    for name in ("receive", "provide", "outgoing"):
        timed(engine.ServerEngine, name, _phase)
    for name in ("send", "close", "release"):
        timed(engine.Engine, name, RECORDS)
    timed(engine.ServerEngine, "__init__", HANDSHAKE)
    for name in ("connection_made", "data_received", "connection_lost"):
        timed(provisioning.tls.aio.TlsTransport, name, SHELL)
    for name in ("connection_made", "data_received", "connection_lost"):
        timed(HttpConnection, name, HTTP)
    timed_steps(RequestHandler, "start", HTTP)
    timed_steps(DeviceApi, "handle", ROUTE)
    for name in ("look", "arrived"):
        timed_steps(Peers, name, PEER)
    timed(provisioning.wire.est, "certs_only", "PKCS#7 made")
    timed(provisioning.enrol.answer, "verify_csr", CSR)
    timed(provisioning.x509.csr, "_check_signature", CSR_SIGNATURE)
    timed(provisioning.enrol.answer, "admit", ADMISSION)
    timed(Enrolment, "_intend", ADMISSION)
    for name in ("_ask", "_carry"):
        timed_steps(Enrolment, name, ENROLMENT)
    timed(provisioning.ca.issue, "device_certificate", BUILD)
    timed(provisioning.ca.issue, "inspect", INSPECT)
    timed(TokenEcPrivateKey, "sign", SIGN)
    for name in ("data_received", "connection_lost", "_broker_sent"):
        timed(Relay, name, MQTT)
    timed_steps(Relay, "_open", MQTT)
    timed(EventLog, "tell", EVENTS)
    for name in ("changes_after", "beat"):
        timed_steps(Registry, name, "following changes")
    Writer._attempt = _shared_among(Writer._attempt)  # type: ignore[method-assign] # noqa: SLF001 - a clock is put in from outside
    greenlet.settrace(_switched)
    signal.signal(signal.SIGUSR1, _write)


def _switched(_event: str, places: tuple[Any, Any]) -> None:
    origin, target = places
    mine().switch(id(origin), id(target))


def _write(_number: int, _frame: object) -> None:
    clock = mine()
    clock.push("the clocks")
    clock.pop()
    spent: Counter[str] = Counter()
    known = 0
    for thread in threading.enumerate():
        if thread.ident is None:
            continue
        total = time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
        known += total
        counted = CLOCKS.get(thread.ident)
        if counted is not None and thread.ident != MAIN:
            inside = sum(v for k, v in counted.spent.items() if k != counted.base)
            spent.update({k: v for k, v in counted.spent.items() if k != counted.base})
            total -= inside
        if thread.ident != MAIN:
            spent[_named(thread)] += total
    spent.update(clock.spent)
    document = {
        "spent": spent,
        "operations": OPERATIONS,
        "counts": COUNTS,
        "threads": known,
        "process": time.process_time_ns(),
    }
    path = Path(os.environ["BENCH_PROFILE"])
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document))
    new.replace(path)


def _named(thread: threading.Thread) -> str:
    if thread.name == "birthmark-token":
        return "token's thread, what is left"
    if "_connection_worker_thread" in thread.name:
        return "registry, SQLite's threads"
    return f"thread {thread.name}"


if __name__ == "__main__":
    install()
    main()
