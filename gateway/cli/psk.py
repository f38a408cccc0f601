"""`birthmark psk`: pre-shared keys for devices that can do no certificates."""

from __future__ import annotations

import typer

from gateway.cli.output import act, say, show
from gateway.operators import actions

app = typer.Typer(help="Pre-shared keys.", no_args_is_help=True)


@app.callback()
def psk() -> None:
    """Pre-shared keys."""


@app.command("create")
def create(device: str) -> None:
    """Register a device for PSK and print its identity and key, once."""
    made = act(lambda desk: actions.create_psk(desk, device))

    def for_people() -> None:
        say(f"identity {made['identity']}")
        say(f"key      {made['key']}")

    show(made, for_people)
