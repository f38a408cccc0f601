"""Files that are wholly there or not at all, whenever the power goes."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC = 0o644
PRIVATE = 0o600


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Replace the file in one step; folders that lack are made.

    On the disk when this returns: the content before its name (rename), the name
    before what comes next (fsync of the folder).
    """
    make_folder(path.parent, 0o755 if mode == PUBLIC else 0o700)
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)  # noqa: PTH105 - the temporary name is a str
    except BaseException:
        os.unlink(name)  # noqa: PTH108 - as above
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(path: Path, mode: int) -> None:
    """A folder of this mode, whatever the umask; its parents as `Path.mkdir` does."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_folder(path.parent, mode)
        path.mkdir(mode=mode, exist_ok=True)
        path.chmod(mode)
