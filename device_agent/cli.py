"""The command line of `birthmark-agent`: every failure is one sentence."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from secrets import SystemRandom
from typing import TYPE_CHECKING, Final

from device_agent.failures import (
    DONE,
    FAILURES,
    Failure,
    as_json,
    exit_code,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from device_agent.enrol import Wish
    from device_agent.home import Home

DEFAULT_STATE: Final = "/var/lib/birthmark-agent"
ROTATION_S: Final = 120.0
"""How long `rotate` waits for the agent that runs."""

BUG: Final = 1
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    os.umask(0o077)
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except FAILURES as failure:
        return _fail(arguments, failure)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # noqa: BLE001 - the outermost shell
        # Never its text: a bug must not carry a secret to a terminal or a log.
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = ""
        if where is not None:
            name = Path(where.tb_frame.f_code.co_filename).name
            place = f" at {name}:{where.tb_lineno}"
        _print_error(f"this is a bug of the agent: {type(error).__name__}{place}")
        return BUG


def _run(arguments: argparse.Namespace) -> int:
    from device_agent.home import Home  # noqa: PLC0415 - keeps --help quick

    home = Home(Path(arguments.state))
    match arguments.command:
        case "enroll":
            return _enroll(home, arguments)
        case "run":
            from device_agent.run import run  # noqa: PLC0415 - MQTT is for it alone

            return asyncio.run(run(home, SystemRandom().random))
        case "rotate":
            return asyncio.run(_rotate(home, arguments))
        case _:
            return asyncio.run(_status(home, arguments))


def _enroll(home: Home, arguments: argparse.Namespace) -> int:
    from device_agent import enrol  # noqa: PLC0415 - keeps --help quick

    held = enrol.already(home)
    if held is not None:
        what = held.serial or held.identity
        _say(
            arguments, f"enrolled already, with {what}: nothing to do", _document(home)
        )
        return DONE
    from device_agent.wishes import read_wish  # noqa: PLC0415 - most starts end above

    wish: Wish = read_wish(arguments)
    held = asyncio.run(enrol.enrol(home, wish, SystemRandom().random))
    what = held.serial or held.identity
    _say(arguments, f"enrolled {wish.to.device} with {what}", _document(home))
    return DONE


async def _rotate(home: Home, arguments: argparse.Namespace) -> int:
    from device_agent import control, enrol  # noqa: PLC0415 - keeps --help quick

    if enrol.already(home) is None and home.check() and home.belonging() is None:
        raise enrol.not_enrolled(home)
    if not home.check():
        raise enrol.not_enrolled(home)
    if not home.lock.take():
        reply = await control.ask(home.control_path, "rotate", ROTATION_S)
        if reply is not None:
            if reply.exit_code == DONE:
                _say(arguments, reply.text, _document(home))
            else:
                _print_error(reply.text)
            return reply.exit_code
        enrol.take_lock(home)
    try:
        held = await enrol.rotate(home, SystemRandom().random)
    finally:
        home.lock.release()
    what = held.serial or held.identity
    _say(arguments, f"rotated: lives with {what} now", _document(home))
    return DONE


async def _status(home: Home, arguments: argparse.Namespace) -> int:
    from device_agent import control  # noqa: PLC0415 - keeps --help quick

    document = _document(home)
    reply = None
    if document["device"] is not None:
        reply = await control.ask(home.control_path, "status", 2.0)
    document["running"] = reply is not None
    document["connected"] = reply.connected if reply is not None else False
    lines = [f"{name}: {_shown(value)}" for name, value in document.items()]
    _say(arguments, "\n".join(lines), document)
    return DONE


def _document(home: Home) -> dict[str, object]:
    """What `status --json` prints (DESIGN), read from the files alone."""
    from device_agent.status import document  # noqa: PLC0415 - keeps --help quick

    return document(home)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(str(part) for part in value.values() if part is not None)
    return "-" if value is None else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="birthmark-agent",
        description="Enrols this device on boot and rotates before anything expires.",
        allow_abbrev=False,
    )
    parser.add_argument("--state", default=DEFAULT_STATE, metavar="DIR")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    enroll = commands.add_parser(
        "enroll",
        parents=[common],
        help="get the first credential",
        allow_abbrev=False,
        epilog="A token also comes from BIRTHMARK_TOKEN. No secret is an argument.",
    )
    enroll.add_argument("--gateway", required=True, metavar="URL")
    enroll.add_argument("--device-id", metavar="ID")
    proof = enroll.add_mutually_exclusive_group()
    proof.add_argument("--token-file", metavar="FILE", help="- is standard input")
    proof.add_argument(
        "--psk-file", metavar="FILE", help="as `psk create --json` prints"
    )
    proof.add_argument("--cert", metavar="FILE", help="factory or older certificate")
    enroll.add_argument("--key", metavar="FILE", help="the key of --cert")
    trust = enroll.add_mutually_exclusive_group(required=True)
    trust.add_argument("--ca-file", metavar="FILE", help="the root certificate, PEM")
    trust.add_argument("--ca-sha256", metavar="HEX", help="SHA-256 of the root's DER")
    enroll.add_argument("--mode", choices=("cert", "psk"))
    for name, what in (
        ("run", "stay connected, renew in time, obey rotation"),
        ("rotate", "get the next credential now"),
        ("status", "what this device holds, and what it last did"),
    ):
        commands.add_parser(name, parents=[common], help=what, allow_abbrev=False)
    return parser


def _fail(arguments: argparse.Namespace, failure: Failure) -> int:
    if arguments.json:
        print(json.dumps(as_json(failure)))  # noqa: T201 - a command prints
    _print_error(str(failure))
    return exit_code(failure)


def _say(arguments: argparse.Namespace, text: str, document: dict[str, object]) -> None:
    print(json.dumps(document) if arguments.json else text)  # noqa: T201 - a command prints


def _print_error(text: str) -> None:
    print(f"birthmark-agent: {text}", file=sys.stderr)  # noqa: T201 - a command prints


if __name__ == "__main__":
    sys.exit(main())
