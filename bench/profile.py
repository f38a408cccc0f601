"""Where the time goes, part by part, in µs of the gateway's CPU for each operation.

First without clocks, for the true sum, then in a gateway that clocks its own parts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from bench import connect, enrol, mqtt
from bench.house import IN_FLIGHT, House, enrolment, new_key
from bench.machine import BenchError, pause

if TYPE_CHECKING:
    from collections.abc import Callable

    Go = Callable[[], int]
    Prepare = Callable[[int], Go]

ROUNDS = 3
_UNDER_US = 1.0
_WARM_UP = 64

SCENES = {
    "enrol": ("enrol.fresh", "enrol.kept"),
    "connect": (
        "connect.mtls13",
        "connect.resumed13",
        "connect.psk13",
        "connect.psk12",
    ),
    "mqtt": ("mqtt.connect", "mqtt.publish"),
}


def run(what: str, out: TextIO, *, quick: bool = False) -> None:
    """Print a table for each of that group's operations."""
    count = 160 if quick else 1_000
    with tempfile.TemporaryDirectory(prefix="birthmark-bench-") as place:
        plain, clocked = Path(place) / "plain", Path(place) / "clocked"
        for folder in (plain, clocked):
            folder.mkdir()
        totals = _plain(plain, SCENES[what], count)
        report = clocked / "profile.json"
        os.environ["BENCH_PROFILE"] = str(report)
        house = House(clocked, (sys.executable, "-m", "bench.profiled"))
        try:
            for name in SCENES[what]:
                found, done = _measured(house, name, report, count)
                _print(name, found, done, totals[name], out)
        finally:
            house.process.stop()
    _print_bare(out)


def _prepare(house: House, name: str) -> Prepare:
    https, mqtts = house.ports["https"], house.ports["mqtts"]
    group, _, mode = name.partition(".")
    if group == "enrol":
        made = enrol.fresh if mode == "fresh" else enrol.kept
        return lambda n: made(house, https, enrolment, n)
    if group == "connect":
        callers, _ = connect.callers_of(house, mode)
        return lambda n: connect.work(https, callers, IN_FLIGHT, n)
    devices = house.devices(2 * IN_FLIGHT, "ldevid")
    works = mqtt.connections if mode == "connect" else mqtt.messages
    return lambda n: works(house, mqtts, devices, n)


def _plain(folder: Path, names: tuple[str, ...], count: int) -> dict[str, float]:
    """µs for each operation in a gateway without clocks."""
    house = House(folder)
    found = {}
    try:
        for name in names:
            prepare = _prepare(house, name)
            prepare(_WARM_UP)()
            go = prepare(count)
            pause(0.3)
            before = house.process.cpu_s()
            done = go()
            pause(0.3)
            found[name] = (house.process.cpu_s() - before) / done * 1e6
    finally:
        house.process.stop()
    return found


def _measured(
    house: House, name: str, report: Path, count: int
) -> tuple[dict[str, Any], int]:
    prepare = _prepare(house, name)
    prepare(_WARM_UP)()
    total: dict[str, Any] = {}
    done = 0
    for _ in range(ROUNDS):
        go = prepare(count)
        pause(0.3)
        before = _read(house, report)
        done += go()
        pause(0.3)
        _add(total, _read(house, report), before)
    return total, done


def _read(house: House, report: Path) -> dict[str, Any]:
    report.unlink(missing_ok=True)
    os.kill(house.process.pid, signal.SIGUSR1)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if report.exists():
            found: dict[str, Any] = json.loads(report.read_text())
            return found
        pause(0.01)
    raise BenchError("the clocked gateway does not report")


def _add(total: dict[str, Any], after: dict[str, Any], before: dict[str, Any]) -> None:
    for group, values in after.items():
        if isinstance(values, dict):
            into = total.setdefault(group, {})
            for name, value in values.items():
                more = value - before[group].get(name, 0)
                into[name] = into.get(name, 0) + more
        else:
            total[group] = total.get(group, 0) + values - before[group]


def _print(
    name: str, found: dict[str, Any], done: int, plain_us: float, out: TextIO
) -> None:
    whole = found["process"] / done / 1_000
    out.write(f"\n{name}: {done}, {whole:,.0f} µs each with the clocks")
    out.write(f" ({plain_us:,.0f} µs without)\n")
    left = whole
    for part, spent in sorted(found["spent"].items(), key=lambda one: -one[1]):
        us = spent / done / 1_000
        left -= us
        if us >= _UNDER_US:
            out.write(f"  {us:8,.1f}  {us / whole:5.1%}  {part}\n")
    out.write(f"  {left:8,.1f}  {left / whole:5.1%}  what is left of the process\n")
    counts = found["counts"]
    groups = counts.get("groups", 0)
    if not groups:
        return
    writes = sum(counts.values()) - groups
    out.write(f"  registry: {writes / groups:.1f} operations a transaction; each\n")
    for kind, spent in sorted(found["operations"].items(), key=lambda one: -one[1]):
        if counts.get(kind):
            us = spent / counts[kind] / 1_000
            each = counts[kind] / done
            out.write(f"  {us:8,.1f}  x {each:.2f}  {kind} (main thread's share)\n")


def _print_bare(out: TextIO) -> None:
    """What the cryptography costs by itself, on this machine at this time."""
    key = new_key()
    algorithm = ec.ECDSA(hashes.SHA256())
    signature = key.sign(b"", algorithm)
    out.write("\nBare costs in this process, for comparison\n")
    for what, work in (
        ("P-256 key made", new_key),
        ("P-256 signature, software", lambda: key.sign(b"", algorithm)),
        (
            "P-256 verification",
            lambda: key.public_key().verify(signature, b"", algorithm),
        ),
    ):
        before = time.thread_time()
        for _ in range(1_000):
            work()
        out.write(f"  {(time.thread_time() - before) * 1e3:8,.1f}  {what}\n")
