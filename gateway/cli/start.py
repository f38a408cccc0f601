"""`init`, `gateway` and `db upgrade`: from an empty folder to a running server."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from gateway.cli.output import OUT, say, show

db = typer.Typer(help="The registry's database.", no_args_is_help=True)


def init(  # noqa: PLR0913, PLR0917 - the options of the command
    org: Annotated[str, typer.Option(help="Organisation in the CAs' names.")] = (
        "Birthmark"
    ),
    domain: Annotated[
        str, typer.Option(help="Trust domain of the devices' SPIFFE IDs.")
    ] = "birthmark.local",
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of this gateway; repeat.")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="PKCS#11 module; without it, a SoftHSM token.")
    ] = None,
    token_label: Annotated[str, typer.Option(help="The token's label.")] = "birthmark",  # noqa: S107 - a name
    pin: Annotated[
        str,
        typer.Option(help="Its PIN: file:PATH, env:NAME or command:ARGV."),
    ] = "env:BIRTHMARK_PIN",
    ephemeral_ports: Annotated[
        bool, typer.Option("--ephemeral-ports", help="Find free ports.")
    ] = False,
) -> None:
    """Make configuration, token, CAs, server certificate and registry."""
    from gateway.operators.initialise import Wishes, initialise  # noqa: PLC0415

    wishes = Wishes(
        org,
        domain,
        tuple(host or ["localhost"]),
        module,
        token_label,
        pin,
        ephemeral_ports,
    )

    def progress(step: str) -> None:
        if not OUT.json:
            say(f"  {step}")

    made = asyncio.run(initialise(OUT.folder.absolute(), wishes, progress))

    def for_people() -> None:
        if not made["created"]:
            say(f"{made['data']} is initialised already; nothing was changed.")
        say(f"Data directory   {made['data']}")
        say(f"Devices enrol at {made['https']}")
        say(f"Root SHA-256     {made['sha256']}")
        if made["created"]:
            say(f"Next:            birthmark --data {made['data']} gateway")

    show(made, for_people)


def gateway() -> None:
    """Run the server in the foreground, until SIGTERM or Ctrl-C."""
    import uvloop  # noqa: PLC0415 - as below

    from gateway.app import run  # noqa: PLC0415 - the server's imports are many
    from provisioning import config  # noqa: PLC0415

    # asyncio's own loop in C: a fifth less CPU for each connection.
    uvloop.run(run(config.load(OUT.folder)))


@db.command("upgrade")
def upgrade() -> None:
    """Bring the registry's schema to this version."""
    from provisioning import config  # noqa: PLC0415
    from provisioning.registry.upgrade import upgrade as migrate  # noqa: PLC0415

    asyncio.run(migrate(config.load(OUT.folder).registry_url))
    show({"upgraded": True}, lambda: say("The registry is up to date."))
