"""Events on standard error: JSON lines for machines, plain lines on a terminal."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from provisioning.model import events

if TYPE_CHECKING:
    from collections.abc import Mapping

_RANK = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class EventLog:
    """Writes each event once, where it ends; what is not in the table is a bug."""

    def __init__(self, stream: TextIO | None = None, *, level: str = "info") -> None:
        self._stream = stream or sys.stderr
        self._plain = self._stream.isatty()
        self._floor = _RANK[level]

    def tell(self, name: str, fields: Mapping[str, object]) -> None:
        """One event; raises KeyError for a name or field that the table lacks."""
        kind = events.check(name, fields)
        if _RANK[kind.level] < self._floor:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._plain:
            rest = " ".join(f"{key}={value}" for key, value in fields.items())
            line = f"{now[11:23]} {kind.level:<7} {name} {rest}"
        else:
            line = json.dumps(
                {"at": now, "level": kind.level, "event": name, **fields}, default=str
            )
        self._stream.write(line + "\n")
        self._stream.flush()
