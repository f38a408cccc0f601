"""`birthmark ca`: the hierarchy, its trust anchors, its revocation lists."""

from __future__ import annotations

import base64
import sys
from typing import Annotated

import typer

from gateway.cli.output import OUT, act, say, show, table
from gateway.operators.authority import export_anchors, publish_crls, show_authority
from provisioning import config

app = typer.Typer(help="The certification authority.", no_args_is_help=True)


@app.command("show")
def show_cas() -> None:
    """The CAs with their fingerprints."""
    document = show_authority(config.load(OUT.folder))
    cas = document["cas"]
    assert isinstance(cas, list)  # noqa: S101 - narrows the type

    def for_people() -> None:
        table(
            None,
            ("CA", "profiles", "until"),
            [
                (
                    one["name"],
                    ", ".join(one["profiles"]),
                    one["not_after"] or "no end",
                )
                for one in cas
            ],
        )
        # Whole on a line, to be copied.
        for one in cas:
            say(f"{one['name']:<8} SHA-256 {one['sha256']}")

    show(document, for_people)


@app.command("export")
def export(
    form: Annotated[str, typer.Option("--format", help="pem or der.")] = "pem",
) -> None:
    """Print the trust anchors: what a verifier starts from."""
    made = export_anchors(config.load(OUT.folder), form)
    if OUT.json:
        text = made.decode() if form == "pem" else base64.b64encode(made).decode()
        show({"format": form, "anchors": text})
    else:
        sys.stdout.buffer.write(made)


@app.command("crl")
def crl() -> None:
    """Sign a fresh CRL of every CA and publish it."""
    document = act(publish_crls)
    published = document["published"]
    assert isinstance(published, list)  # noqa: S101 - narrows the type

    def for_people() -> None:
        table(
            None,
            ("CA", "number", "entries"),
            [(one["issuer"], one["number"], one["entries"]) for one in published],
        )

    show(document, for_people)
