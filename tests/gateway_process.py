"""A gateway as an operator starts it: a data directory, its commands, its process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.operators import actions
from gateway.operators.desk import Desk, open_desk
from provisioning.hsm.initialise import find_softhsm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

BIN = Path(sys.executable).parent
START_S = 60.0
STOP_S = 12.0
POLL_S = 0.02


def until(found: Callable[[], T], seconds: float = 10.0) -> T:
    """What `found` gives once it is true; an AssertionError after the deadline."""
    pause = threading.Event()
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"not so within {seconds} s"
        pause.wait(POLL_S)
    return result


async def soon(found: Callable[[], Awaitable[T]], seconds: float = 10.0) -> T:
    """As `until`, for what has to be awaited."""
    async with asyncio.timeout(seconds):
        while not (result := await found()):  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(POLL_S)
    return result


class GatewayProcess:
    """One data directory, and the process that serves it while it runs."""

    def __init__(self, folder: Path, data: Path | None = None) -> None:
        self.folder = folder
        self.data = data or folder / "data"
        self.log = folder / "gateway.log"
        self.ready: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None

    # The operator's commands
    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """`birthmark --data DATA ARGV`, whatever it ends with."""
        environment = {k: v for k, v in os.environ.items() if k != "SOFTHSM2_CONF"}
        return subprocess.run(
            [str(BIN / "birthmark"), "--data", str(self.data), *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )

    def command(self, *argv: object) -> dict[str, Any]:
        """`birthmark ARGV --json`, which must end well; its document."""
        done = self.run(*argv, "--json")
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return json.loads(done.stdout)

    async def operate(self, action: Callable[[Desk], Awaitable[T]]) -> T:
        """What a command does, here: another process than the gateway, and quick."""
        async with open_desk(self.data) as desk:
            return await action(desk)

    def operate_now(self, action: Callable[[Desk], Awaitable[T]]) -> T:
        """The same, for tests without a loop."""
        return asyncio.run(self.operate(action))

    async def token(self, device: str | None, **wish: Any) -> str:
        """An enrolment token's secret."""
        wish = {"uses": 1, "ttl": actions.ROTATE_WITHIN, "profile": None} | wish
        made = await self.operate(
            lambda desk: actions.create_token(desk, device=device, **wish)
        )
        return str(made["token"])

    def token_now(self, device: str | None, **wish: Any) -> str:
        """The same, for tests without a loop."""
        return asyncio.run(self.token(device, **wish))

    # Its life
    def initialise(self, *options: str) -> dict[str, Any]:
        return self.command(
            "init", "--ephemeral-ports", "--host", "localhost", *options
        )

    def configure(self, table: str, **values: str) -> None:
        """Set keys of a table in birthmark.toml, written as TOML writes them."""
        path = self.data / "birthmark.toml"
        text = path.read_text()
        lines = "".join(f"{key} = {value}\n" for key, value in values.items())
        header = re.compile(rf"^\[{re.escape(table)}\].*\n", re.MULTILINE)
        if header.search(text) is None:
            text += f"\n[{table}]\n"
        path.write_text(header.sub(lambda found: found[0] + lines, text))

    def spawn(self) -> subprocess.Popen[str]:
        """The process, before it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "birthmark"), "--data", str(self.data), "gateway"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self.process

    def start(self) -> GatewayProcess:
        """Run it, and wait for the line that says it is ready."""
        process = self.spawn()
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if readable else ""
        if not line:
            self.stop(signal.SIGKILL)
            raise AssertionError(f"no ready line: {self.log.read_text()[-3000:]}")
        self.ready = json.loads(line)
        return self

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Signal it and wait; the exit code (negative: the signal that ended it)."""
        process = self.process
        assert process is not None
        if process.poll() is None:
            process.send_signal(how)
        try:
            return process.wait(STOP_S)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # What it leaves
    def said(self, event: str) -> list[dict[str, Any]]:
        """Every event of that name in the log."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                document = json.loads(line)
                if document.get("event") == event:
                    found.append(document)
        return found

    def certificate(self, name: str) -> Path:
        """DER of root, factory or issuing CA."""
        return self.data / "public" / "ca" / f"{name}.crt"

    def url(self, path: str = "", listener: str = "https") -> str:
        scheme = "http" if listener == "http" else "https"
        return f"{scheme}://localhost:{self.ready[listener]}{path}"


def missing() -> str | None:
    """What a machine lacks to run a gateway, and how to get it."""
    if find_softhsm() is None:
        return "needs SoftHSM: apt-get install softhsm2"
    if not any(
        (Path(place) / "mosquitto").exists()
        for place in [*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin"]
    ):
        return "needs mosquitto: apt-get install mosquitto"
    return None
