"""`birthmark`: the operators' commands, each a thin shell over gateway/operators."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import TyperException

from gateway.cli import ca, devices, psk, start, tokens
from gateway.cli.output import OUT, tell_error, usage_error

DEFAULT_DATA = "/var/lib/birthmark"

app = typer.Typer(
    name="birthmark",
    help="Give every device an identity the day it is made, and keep it for life.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("init")(start.init)
app.command("gateway")(start.gateway)
app.add_typer(ca.app, name="ca")
app.add_typer(tokens.app, name="token")
app.add_typer(psk.app, name="psk")
app.add_typer(devices.app, name="devices")
app.add_typer(start.db, name="db")


@app.callback()
def options(
    data: Annotated[
        Path | None,
        typer.Option(help="Data directory; BIRTHMARK_DATA says it too."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document.")
    ] = False,
) -> None:
    """Options of every command; they may stand anywhere on the line."""
    named = data or os.environ.get("BIRTHMARK_DATA") or DEFAULT_DATA
    OUT.folder = Path(named)
    OUT.json = as_json


def main() -> None:
    """Run the command line; exit 0 done, 1 refused or failed, 2 wrong usage."""
    arguments = in_front(sys.argv[1:])
    OUT.json = "--json" in arguments
    try:
        code = app(arguments, standalone_mode=False)
    except TyperException as error:
        sys.exit(usage_error(error.format_message()))
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the outermost shell of the process
        sys.exit(tell_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def in_front(arguments: list[str]) -> list[str]:
    """Move `--json` and `--data DIR` before the command, wherever they stood."""
    front: list[str] = []
    rest: list[str] = []
    at = 0
    while at < len(arguments):
        one = arguments[at]
        if one == "--":
            rest += arguments[at:]
            break
        if one == "--json" or one.startswith("--data="):
            front.append(one)
        elif one == "--data" and at + 1 < len(arguments):
            front += arguments[at : at + 2]
            at += 1
        else:
            rest.append(one)
        at += 1
    return front + rest
