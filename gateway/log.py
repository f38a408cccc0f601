"""Events on standard error: JSON lines for machines, plain lines on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from typing_extensions import override

from provisioning.model import events

if TYPE_CHECKING:
    from collections.abc import Mapping

_RANK = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class EventLog:
    """Writes each event once, where it ends; what is not in the table is a bug."""

    def __init__(self, stream: TextIO | None = None, *, level: str = "info") -> None:
        self._stream = stream or sys.stderr
        self._plain = self._stream.isatty()
        self._floor = _RANK.get(level, _RANK["info"])

    def wants(self, name: str) -> bool:
        """Whether this event would be written; where making its fields costs."""
        return _RANK[events.TABLE[name].level] >= self._floor

    def tell(self, name: str, fields: Mapping[str, object]) -> None:
        """One event; raises KeyError for a name or field that the table lacks."""
        if _RANK[events.TABLE[name].level] < self._floor:
            return
        kind = events.check(name, fields)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._plain:
            rest = " ".join(f"{key}={_shown(value)}" for key, value in fields.items())
            line = f"{now[11:23]} {kind.level:<7} {name} {rest}"
        else:
            line = json.dumps(
                {"at": now, "level": kind.level, "event": name, **fields}, default=str
            )
        # A full disk or a closed pipe behind standard error must not end the gateway.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()


def _shown(value: object) -> str:
    """For a terminal: what a peer sent must not move the cursor or begin a line."""
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


class _Libraries(logging.Handler):
    """What libraries log by themselves, as events of ours."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    @override
    def emit(self, record: logging.LogRecord) -> None:
        # The message alone: a traceback of theirs may hold what a peer sent.
        line = record.getMessage()[:500]
        self._log.tell(events.LIBRARY_SAID, {"logger": record.name, "line": line})


def listen_to_libraries(log: EventLog) -> None:
    """Send what libraries log, warnings and worse, to the event log."""
    logging.basicConfig(handlers=[_Libraries(log)], level=logging.WARNING, force=True)


def tell_of_loop(log: EventLog, context: Mapping[str, object]) -> None:
    """What no task or protocol caught (`loop.set_exception_handler`): a bug."""
    error = context.get("exception")
    stack = (
        "".join(traceback.format_exception(error))
        if isinstance(error, BaseException)
        else None
    )
    log.tell(
        events.INCIDENT,
        {
            "where": str(context.get("message"))[:200],
            "error": type(error).__name__,
            "stack": stack,
        },
    )
