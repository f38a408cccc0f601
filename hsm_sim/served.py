"""A SoftHSM token behind p11-kit's server: a network HSM to cut, freeze and restart."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from provisioning.hsm.login import TokenConfig
from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from types import TracebackType


class ServedToken:
    """Serves the token of a config in a process of its own.

    config: how to reach it; one process reaches one of them at a time. A context
    manager that starts it and cuts it at the end.
    """

    def __init__(self, token: TokenConfig) -> None:
        server, client = shutil.which("p11-kit"), _client()
        if server is None or client is None:
            raise Unusable(
                HSM, "p11-kit is not installed; install p11-kit and p11-kit-modules"
            )
        self._argv = [server, "server", "--foreground", "--name", str(_address())]
        self._argv += ["--provider", token.module, f"pkcs11:token={token.token_label}"]
        self._conf = token.softhsm_conf
        self._process: subprocess.Popen[str] | None = None
        self.config = TokenConfig(
            client, token.token_label, token.pin, None, token.deadline_s
        )

    def start(self) -> None:
        """Return when the server listens."""
        _address().unlink(missing_ok=True)
        environment = dict(os.environ)
        if self._conf is not None:
            environment["SOFTHSM2_CONF"] = self._conf
        self._process = subprocess.Popen(  # noqa: S603 - p11-kit, by its whole path
            self._argv,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # It forks for each client: they all are signalled together.
            start_new_session=True,
        )
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        line = self._process.stdout.readline()
        if "P11_KIT_SERVER_ADDRESS" not in line:
            raise Unusable(HSM, f"p11-kit server does not start: {line!r}")

    def cut(self) -> None:
        """Kill the server and what serves its clients, as if the cable were pulled."""
        if self._process is None:
            return
        process, self._process = self._process, None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        _address().unlink(missing_ok=True)

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()


def _client() -> str | None:
    root = Path("/")
    for place in ("usr/lib/*/pkcs11", "usr/lib64/pkcs11", "usr/lib/pkcs11"):
        for folder in sorted(root.glob(place)):
            if (folder / "p11-kit-client.so").is_file():
                return str(folder / "p11-kit-client.so")
    return None


@functools.cache
def _address() -> Path:
    """The socket: one a process, for the client reads its address when it is loaded.

    Not in a test's own folder: a socket's path has 107 bytes at most (unix(7)).
    """
    folder = Path(tempfile.mkdtemp(prefix="birthmark-p11-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["P11_KIT_SERVER_ADDRESS"] = f"unix:path={folder / 'socket'}"
    return folder / "socket"
