"""The MQTT broker: an own mosquitto, kept running, or another one by its address.

The own one listens on a Unix socket in a folder that only this user may enter, so
nobody reaches it around the gateway. It keeps nothing on disk and never outlives us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provisioning.model.errors import Unavailable, Unusable
from provisioning.model.events import BROKER_ENDED, BROKER_SAID, BROKER_STARTED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LONGEST_SOCKET_PATH = 107  # sun_path less its closing zero (unix(7))
_ASK_AGAIN_S = 0.02
_LINE_LIMIT = 65_536

# PR_SET_PDEATHSIG (1) with SIGKILL (9), so that a killed gateway leaves no broker
# behind; then the parent is compared, should it have died before that. A program
# of its own, since preexec_fn is not safe beside threads.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens: a Unix socket's path, or host and port."""

    path: str | None = None
    host: str = "localhost"
    port: int = 1883

    async def connect(
        self, factory: Callable[[], asyncio.Protocol]
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Open a connection, as `loop.create_connection` does; OSError when away.

        The caller has a deadline: a broker whose backlog is full is asked again.
        """
        loop = asyncio.get_running_loop()
        if self.path is None:
            return await loop.create_connection(factory, self.host, self.port)
        sock = await self._unix(self.path)
        try:
            return await loop.create_unix_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _unix(self, path: str) -> socket.socket:
        """A connected socket.

        connect(2) on a Unix socket is done or refused at once; EAGAIN says that the
        backlog is full, which `loop.sock_connect` takes for "under way" and then for
        done. So it is asked again, here.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(path)
                except BlockingIOError:
                    await asyncio.sleep(_ASK_AGAIN_S)
                else:
                    return sock
        except BaseException:
            sock.close()
            raise


@dataclass(frozen=True, slots=True)
class MosquittoLimits:
    """What the own broker may keep for one device that is away or slow.

    keep_sessions: how long for one that is away, as mosquitto.conf(5) writes it.
    """

    max_packet_bytes: int = 1_048_576
    max_inflight: int = 20
    max_queued: int = 1_000
    max_queued_bytes: int = 4_194_304
    keep_sessions: str = "14d"


def configuration(socket_path: str, root: bool, limits: MosquittoLimits) -> str:
    """The text of mosquitto.conf (mosquitto.conf(5), 2.0).

    root: whether it is started by root; it would then become another user, who may
    not enter the socket's folder.
    """
    return "\n".join(
        (
            f"listener 0 {socket_path}",
            "allow_anonymous true",
            "persistence false",
            "user root" if root else "",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_timestamp false",
            "connection_messages false",
            "sys_interval 0",
            f"max_packet_size {limits.max_packet_bytes}",
            f"max_inflight_messages {limits.max_inflight}",
            f"max_queued_messages {limits.max_queued}",
            f"max_queued_bytes {limits.max_queued_bytes}",
            f"persistent_client_expiration {limits.keep_sessions}",
            "",
        )
    )


def find_mosquitto(program: str = "mosquitto") -> str:
    """The path of the program; Unusable with what to do where there is none.

    Debian puts it where only root's PATH looks.
    """
    places = os.pathsep.join(
        (os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin")
    )
    found = shutil.which(program, path=places)
    if found is None:
        raise Unusable(
            "the MQTT broker",
            f"{program} is not installed; install it (apt install mosquitto) or name "
            "another broker in birthmark.toml",
        )
    return found


def _no_event(_name: str, _fields: Mapping[str, object]) -> None:
    return None


@dataclass(slots=True)
class Mosquitto:
    """A mosquitto of our own; `run` is the task that owns it.

    folder: an existing one for configuration and socket, ours alone (0700 is set).
    start_s: for it to listen. stop_s: for it to end when told, then it is killed.
    backoff_s: before a restart, doubled up to backoff_most_s while it keeps ending.
    Raises Unusable where mosquitto is not installed.
    """

    folder: Path
    on_event: Callable[[str, Mapping[str, object]], None] = _no_event
    limits: MosquittoLimits = field(default_factory=MosquittoLimits)
    program: str = "mosquitto"
    start_s: float = 5.0
    stop_s: float = 3.0
    backoff_s: float = 0.1
    backoff_most_s: float = 10.0
    address: BrokerAddress = field(init=False)
    pid: int | None = field(init=False, default=None)
    _executable: str = field(init=False)
    _short: str | None = field(init=False, default=None)
    _up: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._executable = find_mosquitto(self.program)
        self.folder.chmod(0o700)
        path = str(self.folder.absolute() / "mosquitto.sock")
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            self._short = tempfile.mkdtemp(prefix="birthmark-")  # 0700
            path = str(Path(self._short) / "m.sock")
        self.address = BrokerAddress(path=path)

    async def ready(self, timeout_s: float = 10.0) -> None:
        """Wait until it listens; Unavailable when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable("the MQTT broker") from None

    def kill(self) -> None:
        """Have it end at once; `run` starts it again. For tests of what follows."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    async def run(self) -> None:
        """Start it, restart it when it ends, stop it when cancelled."""
        backoff_s = self.backoff_s
        loop = asyncio.get_running_loop()
        try:
            while True:
                started = loop.time()
                code = await self._run_once()
                if loop.time() - started > 2 * self.start_s:
                    backoff_s = self.backoff_s  # it did run: this is news
                self.on_event(BROKER_ENDED, {"code": code, "retry_after_s": backoff_s})
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, self.backoff_most_s)
        finally:
            self._remove_socket()
            if self._short is not None:
                shutil.rmtree(self._short, ignore_errors=True)

    async def _run_once(self) -> int:
        """One life of it; its exit code, or less than zero for a signal."""
        configuration_path = self._write_configuration()
        # A broker that outlived its gateway by a moment keeps its old socket, which
        # nobody can reach any more.
        self._remove_socket()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-ISc",
            _DIE_WITH_PARENT,
            str(os.getpid()),
            self._executable,
            "-c",
            str(configuration_path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            # Ctrl-C in a terminal is for the gateway, which stops it in its order.
            start_new_session=True,
        )
        self.pid = process.pid
        try:
            async with asyncio.TaskGroup() as tasks:
                if process.stderr is not None:
                    tasks.create_task(self._log(process.stderr))
                watch = tasks.create_task(self._watch_start(process))
                code = await process.wait()
                watch.cancel()
            return code
        finally:
            self._up.clear()
            self.pid = None
            await asyncio.shield(self._stop(process))

    async def _watch_start(self, process: asyncio.subprocess.Process) -> None:
        """Set `_up` once it accepts; end it when it does not in time."""
        try:
            async with asyncio.timeout(self.start_s):
                await self._accepting()
        except TimeoutError:
            _signal(process, kill=True)
            return
        self.on_event(BROKER_STARTED, {"pid": process.pid})
        self._up.set()

    async def _accepting(self) -> None:
        while True:
            try:
                transport, _ = await self.address.connect(asyncio.Protocol)
            except OSError:
                await asyncio.sleep(_ASK_AGAIN_S)
            else:
                transport.abort()
                return

    async def _log(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # longer than the limit; it was dropped
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self.on_event(BROKER_SAID, {"line": text})

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            _signal(process, kill=False)
            try:
                async with asyncio.timeout(self.stop_s):
                    await process.wait()
            except TimeoutError:
                _signal(process, kill=True)
                await process.wait()

    def _write_configuration(self) -> Path:
        path = self.folder / "mosquitto.conf"
        root = os.geteuid() == 0
        text = configuration(self.address.path or "", root, self.limits)
        path.write_text(text)
        path.chmod(0o600)
        return path

    def _remove_socket(self) -> None:
        if self.address.path is not None:
            Path(self.address.path).unlink(missing_ok=True)


def _signal(process: asyncio.subprocess.Process, *, kill: bool) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended on its own meanwhile
        if kill:
            process.kill()
        else:
            process.terminate()
