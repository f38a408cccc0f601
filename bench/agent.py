"""agent.*: what `birthmark-agent run` holds in memory, and how soon it is connected."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from bench.machine import BIN, Process, memory_kib, pause, run
from bench.results import Result, spread

if TYPE_CHECKING:
    from pathlib import Path

    from bench.house import House
    from bench.rounds import Plan

DEVICE = "bench-agent"
_CONNECT_S = 60.0
_SETTLE_S = 2.0
"""After it is connected it asks how things stand, and is then idle."""


def measure(house: House, folder: Path, plan: Plan, _name: str) -> list[Result]:
    """All three from the same runs of an agent that has enrolled by token.

    first_connect: from exec to CONNACK, without a ticket, as after a first boot.
    """
    state = folder / "state"
    program = (BIN / "birthmark-agent", "--state", state)
    enrolled_s = _enrol(house, folder, program)
    rss, private, connected = [], [], []
    for _ in range(plan.rounds):
        (state / "session").unlink(missing_ok=True)
        begun = time.monotonic()
        process = Process((*program, "run"), folder, stderr=subprocess.PIPE)
        try:
            process.line("connected to", _CONNECT_S)
            connected.append(time.monotonic() - begun)
            pause(0.5 if plan.quick else _SETTLE_S)
            found = memory_kib(process.pid)
        finally:
            process.stop()
        rss.append(found["Rss"] / 1024)
        private.append(found["Private"] / 1024)
    return [
        spread("agent.rss", rss, "MiB"),
        spread("agent.private", private, "MiB"),
        spread(
            "agent.first_connect",
            connected,
            "s",
            more={"before it, `enroll` by token took": f"{enrolled_s:.2f} s"},
        ),
    ]


def _enrol(house: House, folder: Path, program: tuple[str | Path, ...]) -> float:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(house.cli("token", "create", "--device", DEVICE)["token"])
    ca = folder / "ca.pem"
    ca.write_bytes(house.root_pem)
    begun = time.monotonic()
    run(
        (
            *(*program, "enroll", "--device-id", DEVICE, "--token-file", token),
            *("--gateway", f"https://localhost:{house.ports['https']}"),
            *("--ca-file", ca),
        )
    )
    return time.monotonic() - begun
