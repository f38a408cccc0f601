"""Files that survive a power cut, and that only their owner may read.

A write is: a new file beside, its content forced to the disk, renamed over the old one,
the folder forced to the disk. Before the rename the old content stands, after it the
new, never half of either (rename(2) is atomic; the fsync before it keeps the name from
reaching the disk before the content, which ext4 and XFS may otherwise do).
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from provisioning.model.errors import ConfigError, Unusable

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 1 << 20
"""Octets that any file of the agent may have; a larger one is damage."""

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Disk:
    """The writes that slots and state are made of; a test cuts the power at each."""

    def write_atomically(self, path: Path, content: bytes) -> None:
        """Replace a file, mode 0600; on return it is on the disk. Raises OSError."""
        beside = path.with_name(f".{path.name}.new")
        self.write(beside, content)
        self.rename(beside, path)
        self.sync(path.parent)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file, mode 0600, and force it to the disk."""
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, path: Path, to: Path) -> None:
        """Give a file or folder another name, at once."""
        path.rename(to)

    def sync(self, folder: Path) -> None:
        """Force the names in a folder to the disk."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_folder(self, folder: Path) -> None:
        """Make a folder, mode 0700, that was not there."""
        folder.mkdir(mode=0o700)

    def remove(self, folder: Path) -> None:
        """Remove a folder with the files in it, or nothing if there is none."""
        if folder.exists():
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def read_private(path: Path) -> bytes | None:
    """A file of the agent's own, None if it is not there.

    Raises Unusable for one that group or others may read, or that is not ours.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(str(path), _why(error)) from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Unusable(str(path), "it is not a file")
        if found.st_mode & _OTHERS:
            raise Unusable(str(path), "others may read it; look who did, chmod 600 it")
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise Unusable(str(path), "it is too large to be what it should be")
    return content


def read_secret(path: Path) -> bytes:
    """A file that a person named and that holds a secret.

    Raises ConfigError when it is not there, too large, or readable by group or others.
    """
    content, mode = _read_named(path)
    if mode & _OTHERS:
        why = "group or others may read it, and it holds a secret; chmod 600 it"
        raise ConfigError(str(path), why)
    return content


def read_public(path: Path) -> bytes:
    """A file that a person named and that everybody may read. Raises ConfigError."""
    return _read_named(path)[0]


def private_folder(folder: Path) -> None:
    """Make a folder, mode 0700, or check one: Unusable when others may enter it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_mode & _OTHERS and not any(folder.iterdir()):
            folder.chmod(0o700)  # empty: nobody can have read anything in it
            found = folder.stat()
    except OSError as error:
        raise Unusable(str(folder), _why(error)) from error
    check_folder(folder)


def check_folder(folder: Path) -> bool:
    """Whether it is there; Unusable for a folder that is not ours alone."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unusable(str(folder), _why(error)) from error
    if not stat.S_ISDIR(found.st_mode):
        raise Unusable(str(folder), "it is not a folder")
    if found.st_mode & _OTHERS:
        raise Unusable(str(folder), "others may enter it; look who did, chmod 700 it")
    if found.st_uid != os.geteuid():
        raise Unusable(
            str(folder), f"it belongs to user {found.st_uid}, not to this one"
        )
    return True


class Lock:
    """One process at a time; the kernel lets go of it however the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """True if it is ours now, False if another process has it."""
        if self._handle is None:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._handle = os.open(self._path, flags, 0o600)
            except OSError as error:
                raise Unusable(str(self._path), _why(error)) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let the next one in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _read_named(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(str(path), _why(error)) from error
    if len(content) > LARGEST:
        raise ConfigError(str(path), "it is too large to be what it should be")
    return content, mode


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
