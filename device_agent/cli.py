"""The command line of `birthmark-agent`: every failure is one sentence."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from typing_extensions import override

from device_agent.failures import (
    DONE,
    FAILURES,
    Failure,
    document_of,
    exit_code,
)
from provisioning.model.errors import ConfigError, Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from device_agent.enrol import Wish
    from device_agent.home import Home

T = TypeVar("T")

DEFAULT_STATE: Final = "/var/lib/birthmark-agent"
ROTATION_S: Final = 120.0
"""How long `rotate` waits for the agent that runs."""
ANOTHER_S: Final = 30.0
"""How long it waits for another command that is at work in the same folder."""

BUG: Final = 1
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    os.umask(0o077)
    _without_a_second_openssl()
    as_json = "--json" in (sys.argv if argv is None else argv)
    try:
        return _run(_parser().parse_args(argv))
    except FAILURES as failure:
        return _fail(failure, as_json=as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        what = str(error.filename or "the agent's state")
        why = error.strerror or type(error).__name__
        return _fail(Unusable(what, why), as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the outermost shell
        _print_error(_bug(error))
        return BUG


def _run(arguments: argparse.Namespace) -> int:
    from device_agent.home import Home  # noqa: PLC0415 - keeps --help quick

    home = Home(Path(arguments.state))
    match arguments.command:
        case "enroll":
            return _enroll(home, arguments)
        case "run":
            from device_agent.run import run  # noqa: PLC0415 - MQTT is for it alone

            return _complete(run(home, _roll()))
        case "rotate":
            return _complete(_rotate(home, arguments))
        case _:
            return _complete(_status(home, arguments))


def _complete(work: Coroutine[object, object, T]) -> T:
    import asyncio  # noqa: PLC0415 - keeps --help quick

    return asyncio.run(work)


def _roll() -> Callable[[], float]:
    from secrets import SystemRandom  # noqa: PLC0415 - keeps --help quick

    return SystemRandom().random


def _without_a_second_openssl() -> None:
    """Keep out the system's OpenSSL, 5 MiB that this process never uses.

    Its TLS is that of cryptography, which bundles its own. asyncio takes the missing
    module for a Python built without it; hashlib then uses the hashes that Python has
    built in, where it has. What is imported already stays.
    """
    absent = ["ssl"]
    if importlib.util.find_spec("_sha2") or importlib.util.find_spec("_sha256"):
        absent.append("_hashlib")
    for name in absent:
        # None makes `import` raise ModuleNotFoundError, as the import system promises.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # see above


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
    held = _complete(enrol.enrol(home, wish, _roll()))
    what = held.serial or held.identity
    _say(arguments, f"enrolled {wish.to.device} with {what}", _document(home))
    return DONE


async def _rotate(home: Home, arguments: argparse.Namespace) -> int:
    from device_agent import control, enrol  # noqa: PLC0415 - keeps --help quick

    if not home.check() or home.belonging() is None:
        raise enrol.not_enrolled(home)
    if not home.lock.take():
        reply = await control.ask(home.control_path, "rotate", ROTATION_S)
        if reply is not None:
            if reply.exit_code == DONE:
                _say(arguments, reply.text, _document(home))
            else:
                _print_error(reply.text)
            return reply.exit_code
        await enrol.wait_for_lock(home, ANOTHER_S)
    try:
        held = await enrol.rotate(home, _roll())
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


def _bug(error: Exception) -> str:
    """Where it happened, never its text: a bug must not carry a secret to a log."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = ""
    if where is not None:
        name = Path(where.tb_frame.f_code.co_filename).name
        place = f" at {name}:{where.tb_lineno}"
    return f"this is a bug of the agent: {type(error).__name__}{place}"


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a failure like the others: one sentence."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, f"{message}; --help says more")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="birthmark-agent",
        description="Enrols this device on boot and rotates before anything expires.",
        allow_abbrev=False,
    )
    parser.add_argument("--state", default=DEFAULT_STATE, metavar="DIR")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
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


def _fail(failure: Failure, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(document_of(failure)))  # noqa: T201 - a command prints
    _print_error(str(failure))
    return exit_code(failure)


def _say(arguments: argparse.Namespace, text: str, document: dict[str, object]) -> None:
    print(json.dumps(document) if arguments.json else text)  # noqa: T201 - a command prints


def _print_error(text: str) -> None:
    print(f"birthmark-agent: {text}", file=sys.stderr)  # noqa: T201 - a command prints


if __name__ == "__main__":
    sys.exit(main())
