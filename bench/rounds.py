"""Rounds in which subject and peer take turns, and what each cost in CPU time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.machine import BenchError, pause
from bench.results import RATE, Result, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.machine import Process

SETTLE_S = 0.1
"""For a server to finish what its clients no longer wait for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How thorough a run is. round_s: about how long one side's round takes."""

    rounds: int = 5
    round_s: float = 1.4
    warm_up: int = 256
    idle: int = 1_000
    quick: bool = False


QUICK = Plan(rounds=2, round_s=0.35, warm_up=64, idle=200, quick=True)


@dataclass(frozen=True, slots=True)
class Side:
    """One server. prepare: work for that many, whose call does it and counts it."""

    name: str
    process: Process
    prepare: Callable[[int], Callable[[], int]]

    def warm_up(self, plan: Plan) -> int:
        """How many fill a round, found by trying."""
        go = self.prepare(plan.warm_up)
        begun = time.monotonic()
        done = go()
        per_s = done / (time.monotonic() - begun)
        return max(plan.warm_up // 2, int(per_s * plan.round_s))


def compare(name: str, plan: Plan, subject: Side, peer: Side) -> Result:
    """The rate of each by its own CPU-second, in alternating rounds.

    Work is prepared outside the measured time. The subject's time is read after the
    peer's round, so that what it does later (such as its gathered writes) counts.
    """
    sizes = [side.warm_up(plan) for side in (subject, peer)]
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(plan.rounds):
        works = [
            side.prepare(size)
            for side, size in zip((subject, peer), sizes, strict=True)
        ]
        pause(SETTLE_S)
        before = [side.process.cpu_s() for side in (subject, peer)]
        done = [work() for work in works]
        pause(SETTLE_S)
        for n, side in enumerate((subject, peer)):
            spent = side.process.cpu_s() - before[n]
            if not spent:
                raise BenchError(f"{side.name} took no measurable time")
            rates[n].append(done[n] / spent)
    return spread(name, rates[0], RATE, (peer.name, rates[1]))
