"""Where the token's PIN comes from: a file, the environment or a command."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from provisioning.hsm.token import HSM
from provisioning.model.errors import ConfigError, Unusable

COMMAND_TIMEOUT_S = 15.0
MAX_PIN = 256


@dataclass(frozen=True, slots=True)
class Pin:
    """A PIN, which its repr does not show."""

    text: str = field(repr=False)


def read_pin(source: str, *, folder: Path | None = None) -> Pin:
    """Read a PIN from `file:PATH`, `env:NAME` or `command:ARGV`.

    folder: what a relative PATH starts from. ARGV is split as a shell would, but no
    shell runs it; the first line of its output is the PIN.
    Raises ConfigError for another form, which it does not repeat (it may be the PIN
    itself), and Unusable for a source that gives none or that others can read.
    """
    form, mark, rest = source.partition(":")
    readers = {"file": _from_file, "env": _from_environment, "command": _from_command}
    if not mark or not rest or form not in readers:
        raise ConfigError(
            "pin", "write file:PATH, env:NAME or command:ARGV, never the PIN itself"
        )
    pin = readers[form](rest, folder or Path())
    if not 0 < len(pin) <= MAX_PIN:
        raise Unusable(
            HSM, f"the PIN from {form} has {len(pin)} characters; put the PIN there"
        )
    return Pin(pin)


def _from_file(rest: str, folder: Path) -> str:
    path = folder / rest
    try:
        with path.open(encoding="utf-8") as file:
            # Of the opened file: the name could be pointed elsewhere in between.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise Unusable(
                    HSM,
                    f"the PIN file {path} has mode {mode:04o}, so others may read it; "
                    f"run chmod 600 on it, and change the PIN if others have",
                )
            return _first_line(file.read(4 * MAX_PIN))
    except OSError as error:
        raise Unusable(
            HSM, f"the PIN file {path} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError:
        # Without its cause, which quotes the file.
        raise Unusable(HSM, f"the PIN file {path} is not text") from None


def _from_environment(rest: str, _folder: Path) -> str:
    value = os.environ.get(rest)
    if value is None:
        raise Unusable(HSM, f"the environment has no {rest}; put the PIN there")
    return _first_line(value)


def _from_command(rest: str, folder: Path) -> str:
    try:
        argv = shlex.split(rest)
    except ValueError as error:
        raise ConfigError("pin", f"the command cannot be split: {error}") from error
    if not argv:
        raise ConfigError("pin", "the command is empty")
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own command, no shell
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=folder,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        text = done.stdout.decode()
    except OSError as error:
        raise Unusable(
            HSM, f"the PIN command {argv[0]} cannot be run: {error.strerror}"
        ) from error
    except subprocess.TimeoutExpired:
        # Without its cause, which carries the output.
        raise Unusable(
            HSM, f"the PIN command {argv[0]} took over {COMMAND_TIMEOUT_S:g} s"
        ) from None
    except UnicodeDecodeError:
        raise Unusable(HSM, f"the PIN command {argv[0]} printed no text") from None
    if done.returncode != 0:
        raise Unusable(HSM, f"the PIN command {argv[0]} ended with {done.returncode}")
    return _first_line(text)


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].rstrip("\r")
