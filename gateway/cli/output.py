"""How commands print: one JSON document for programs, tables where a person looks."""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gateway.operators.desk import open_desk
from provisioning.model.errors import (
    ConfigError,
    OutcomeUnknown,
    PeerError,
    Unavailable,
    Unusable,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from gateway.operators.desk import Desk

T = TypeVar("T")
Document = "dict[str, object]"
REFUSED, USAGE = 1, 2


@dataclass(slots=True)
class Out:
    """What the options of every command said; set once, before the command runs."""

    folder: Path = field(default_factory=Path)
    json: bool = False


OUT = Out()


def act(action: Callable[[Desk], Awaitable[T]]) -> T:
    """Run an action at the data directory's desk."""

    async def at_desk() -> T:
        async with open_desk(OUT.folder) as desk:
            return await action(desk)

    return asyncio.run(at_desk())


def show(
    document: Mapping[str, object], for_people: Callable[[], None] | None = None
) -> None:
    """Print the document, or what a person would rather see."""
    if OUT.json or for_people is None:
        sys.stdout.write(json.dumps(document, indent=None if OUT.json else 2) + "\n")
    else:
        for_people()


def say(line: str) -> None:
    """A line on standard output."""
    sys.stdout.write(line + "\n")


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """A table as wide as the terminal; plain where there is none."""
    from rich.console import Console  # noqa: PLC0415 - only where a person looks
    from rich.table import Table  # noqa: PLC0415

    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console().print(made)


def warn_behind(document: Mapping[str, object]) -> None:
    """Name the gateways that have not applied a change in time."""
    behind = document.get("not_applied")
    if isinstance(behind, list) and behind:
        sys.stderr.write(
            f"not applied yet by: {', '.join(str(name) for name in behind)}\n"
        )


def usage_error(message: str) -> int:
    """The command line was wrong."""
    return _error({"code": "usage", "detail": message, "retryable": False}, USAGE)


def tell_error(error: Exception) -> int:  # noqa: PLR0911 - one for each kind
    """Print an error of any kind in words; the exit code."""
    match error:
        case PeerError(refusal=refusal, detail=detail):
            return _error(
                {
                    "code": refusal.code,
                    "detail": detail,
                    "retryable": refusal.retryable,
                },
                REFUSED,
            )
        case ConfigError():
            return _error(
                {"code": "config", "detail": str(error), "retryable": False}, USAGE
            )
        case Unusable():
            return _error(
                {"code": "unusable", "detail": str(error), "retryable": False}, REFUSED
            )
        case Unavailable() | OutcomeUnknown():
            return _error(
                {"code": "away", "detail": str(error), "retryable": True}, REFUSED
            )
        case OSError(filename=str(name), strerror=str(why)):
            return _error(
                {
                    "code": "unusable",
                    "detail": f"{name}: {why}; run this as the data directory's owner.",
                    "retryable": False,
                },
                REFUSED,
            )
        case BaseExceptionGroup():
            return tell_error(_first(error))
        case _:
            sys.stderr.write("".join(traceback.format_exception(error)))
            return _error(
                {
                    "code": "internal",
                    "detail": "This is a bug; please report it with the lines above.",
                    "retryable": False,
                },
                REFUSED,
            )


def _first(group: BaseExceptionGroup[BaseException]) -> Exception:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if isinstance(found, Exception) else RuntimeError(repr(found))


def _error(document: dict[str, object], code: int) -> int:
    if OUT.json:
        sys.stdout.write(json.dumps(document) + "\n")
    sys.stderr.write(f"birthmark: {document['detail']}\n")
    return code
