"""wire.*: bytes of a connection's TLS records, up and down, without `whoami`.

Measured with the staple that the agent asks for, and in the peer the same staple.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from bench import peers
from bench.client import Secure, settle
from bench.connect import Caller, callers_of
from bench.machine import BenchError
from bench.results import Result

if TYPE_CHECKING:
    from pathlib import Path

    from bench.house import House
    from bench.rounds import Plan
    from provisioning.tls.engine import Established

UNIT = "bytes"


def measure(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """One of the modes: the sum, and beside it how much goes each way."""
    mode = name.removeprefix("wire.")
    callers, options = callers_of(house, mode, 3 if plan.quick else 16)
    staple = _staple(house, folder)
    with peers.s_server(house, folder, "-status_file", staple, *options) as (_, port):
        ours = [_bytes(one, house.ports["https"]) for one in callers]
        for one in callers:
            one.forget()
        theirs = [_bytes(callers[0], port) for _ in callers]
    sums = [up + down for up, down in ours]
    beside = median(up + down for up, down in theirs)
    return Result(
        name,
        median(sums),
        min(sums),
        max(sums),
        UNIT,
        (peers.S_SERVER, beside),
        median(sums) / beside,
        {"up + down": f"{_both(ours)}, the peer {_both(theirs)} (X25519)"},
    )


def _both(pairs: list[tuple[int, int]]) -> str:
    up, down = (median(pair[n] for pair in pairs) for n in (0, 1))
    return f"{up:,.0f} + {down:,.0f}"


def _bytes(caller: Caller, port: int) -> tuple[int, int]:
    """Of the handshake and the tickets; a session is made first where it is needed."""
    caller.forget()
    if caller.resumes:
        first = _shaken(caller, port)[0]
        caller.keep(first)
        first.close()
    connection, _ = _shaken(caller, port)
    found = connection.up, connection.down
    connection.close()
    return found


def _shaken(caller: Caller, port: int) -> tuple[Secure, Established]:
    connection = caller.connect(port, 0)
    established = settle(connection.open())
    connection.linger()
    caller.check(established)  # type: ignore[arg-type] # what `open` returns
    return connection, established  # type: ignore[return-value] # as above


def _staple(house: House, folder: Path) -> Path:
    """The OCSP response that the gateway staples, for the peer."""
    connection = Secure(house.ports["https"], house.tls13)
    established: Established = settle(connection.open())  # type: ignore[assignment] # as above
    connection.close()
    if established.staple is None:
        raise BenchError("the gateway staples nothing")
    path = folder / "staple.der"
    path.write_bytes(established.staple)
    return path
