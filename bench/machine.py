"""Processes of a run: started on one core, their CPU time and memory read, ended."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

TICKS = os.sysconf("SC_CLK_TCK")
BIN = Path(__file__).resolve().parent.parent / ".venv" / "bin"
_CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = {_CPUS[0]}, {_CPUS[-1]}


class BenchError(Exception):
    """A measurement could not be made; the text says why."""


def prepare_this_process() -> None:
    """Keep to the client's core, and allow as many sockets as may be had."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, CLIENT_CPU)


def pause(seconds: float) -> None:
    """Let the servers finish what they have in hand."""
    threading.Event().wait(seconds)


class Process:
    """One program on the servers' core, in a folder of its own, and its output."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        folder: Path,
        *,
        env: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        self.log = folder / f"{Path(argv[0]).name}.log"
        os.sched_setaffinity(0, SERVER_CPU)  # a child inherits it
        try:
            with self.log.open("ab") as log:
                self.popen = subprocess.Popen(
                    [str(word) for word in argv],
                    cwd=folder,
                    env={**os.environ, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    **{"stdout": log, "stderr": log, **more},
                )
        except FileNotFoundError as error:
            raise BenchError(f"{argv[0]} is not installed") from error
        finally:
            os.sched_setaffinity(0, CLIENT_CPU)

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self.popen.pid

    def pids(self) -> list[int]:
        """The process and its helpers, mosquitto below a gateway aside."""
        return [self.pid, *(p for p in _below(self.pid) if _name(p) != "mosquitto")]

    def cpu_s(self) -> float:
        """User and system time of all its threads and helpers so far."""
        return sum(_cpu_s(pid) for pid in self.pids())

    def rss_kib(self) -> int:
        """Resident memory of it and its helpers."""
        return sum(memory_kib(pid)["Rss"] for pid in self.pids())

    def line(self, mark: str, timeout_s: float) -> str:
        """The next line of standard output with this mark (stdout=PIPE)."""
        end = time.monotonic() + timeout_s
        found = b""
        stream = self.popen.stdout or self.popen.stderr
        if stream is None:
            raise BenchError("there is no pipe to read")
        while (left := end - time.monotonic()) > 0:
            if not select.select([stream], [], [], left)[0]:
                break
            piece = os.read(stream.fileno(), 65_536)
            found += piece
            for line in found.decode(errors="replace").splitlines():
                if mark in line:
                    return line
            if not piece:
                break
        raise BenchError(f"{self.log.stem} did not say {mark!r}: {self.last_words()}")

    def listening(self, port: int, timeout_s: float = 15.0) -> None:
        """Wait until it accepts connections."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            if self.popen.poll() is not None:
                break
            pause(0.05)
        raise BenchError(f"{self.log.stem} does not listen: {self.last_words()}")

    def said(self, mark: str, timeout_s: float = 15.0) -> None:
        """Wait until its log has this mark; for those that an empty visit upsets."""
        end = time.monotonic() + timeout_s
        while mark not in self.log.read_text(errors="replace"):
            if time.monotonic() > end or self.popen.poll() is not None:
                raise BenchError(f"{self.log.stem} is not up: {self.last_words()}")
            pause(0.05)

    def stop(self, timeout_s: float = 15.0) -> None:
        """End it; kill it when it does not."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for stream in (self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()

    def last_words(self) -> str:
        """What it wrote to its log at the end."""
        return self.log.read_text(errors="replace")[-600:].strip() or "it said nothing"


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """The process, ended whatever happens."""
    try:
        yield process
    finally:
        process.stop()


def free_port() -> int:
    """A port nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(argv: Iterable[str | Path]) -> str:
    """What a command prints; BenchError when it fails."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=120
        )
    except FileNotFoundError as error:
        raise BenchError(f"{words[0]} is not installed") from error
    if done.returncode:
        raise BenchError(f"{' '.join(words[:4])} failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def memory_kib(pid: int) -> dict[str, int]:
    """Rss and Private, in KiB, from /proc/PID/smaps_rollup (proc(5))."""
    found = {"Rss": 0, "Private": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, size = line.partition(":")
        for wanted in found:
            if name == wanted or name.startswith(f"{wanted}_"):
                found[wanted] += int(size.split()[0])
    return found


def _stat(pid: int) -> list[str]:
    # The name may hold blanks and brackets; what follows its last one does not.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:
        return ""


def _cpu_s(pid: int) -> float:
    try:
        fields = _stat(pid)
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            for child in (tasks / "children").read_text().split():
                found += [int(child), *_below(int(child))]
    return found
