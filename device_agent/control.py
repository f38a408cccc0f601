"""The socket by which commands reach an agent that runs: one line each way, JSON."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from device_agent.failures import NOT_NOW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

LONGEST_LINE: Final = 4096
QUESTION_S: Final = 5.0
LONGEST_PATH: Final = 100
"""sockaddr_un has 108 octets; a longer path is reached through its folder."""


@dataclass(frozen=True, slots=True)
class Reply:
    """exit_code: as the command would end by itself. text: for a person."""

    exit_code: int
    text: str
    connected: bool = False


@asynccontextmanager
async def listening(
    path: Path, answer: Callable[[str], Awaitable[Reply]]
) -> AsyncIterator[None]:
    """Answer questions while the block runs. The lock must be ours. Raises OSError."""
    _remove(path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(QUESTION_S):
                question = _read(await reader.readline())
            reply = await answer(str(question.get("command")))
            document = {
                "exit": reply.exit_code,
                "text": reply.text,
                "connected": reply.connected,
            }
            writer.write(json.dumps(document).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError, TimeoutError):
            return  # whoever asked is gone, or never meant us
        finally:
            writer.close()

    with _short(path) as short:
        # Mode 0600 by the process's umask: there is no moment at which others may.
        server = await asyncio.start_unix_server(serve, short, limit=LONGEST_LINE)
    try:
        yield
    finally:
        server.close()
        _remove(path)


async def ask(path: Path, command: str, timeout_s: float) -> Reply | None:
    """Ask the agent that runs; None when none does."""
    try:
        async with asyncio.timeout(timeout_s):
            with _short(path) as short:
                reader, writer = await asyncio.open_unix_connection(
                    short, limit=LONGEST_LINE
                )
            try:
                writer.write(json.dumps({"command": command}).encode() + b"\n")
                await writer.drain()
                told = _read(await reader.readline())
            finally:
                writer.close()
    except TimeoutError:
        return Reply(NOT_NOW, f"the running agent did not answer in {timeout_s:g} s")
    except (OSError, ValueError):
        return None
    exit_code = told.get("exit")
    return Reply(
        exit_code if isinstance(exit_code, int) else NOT_NOW,
        str(told.get("text")),
        told.get("connected") is True,
    )


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _read(line: bytes) -> dict[str, object]:
    """Raises ValueError for anything but an object."""
    try:
        document = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("not an object")  # noqa: TRY004 - bad content, not a bug
    return document


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A path that fits a socket address, for as long as the block runs."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)
