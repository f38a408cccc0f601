"""`birthmark token`: enrolment tokens, shown once and kept as hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.output import act, say, show, table
from gateway.operators import actions
from provisioning.config import duration

if TYPE_CHECKING:
    from datetime import timedelta

app = typer.Typer(help="Enrolment tokens.", no_args_is_help=True)


def lifetime(text: str) -> timedelta:
    """A duration of the command line, such as `1h`."""
    found = duration(text)
    if not found:
        raise typer.BadParameter('a duration such as "30d", "1h", "90s" is wanted')
    return found


@app.command("create")
def create(
    device: Annotated[
        str | None, typer.Option(help="The device it is for; else any new device.")
    ] = None,
    uses: Annotated[int, typer.Option(min=1, max=1_000_000)] = 1,
    ttl: Annotated[str, typer.Option(help="How long it is good for.")] = "1h",
    profile: Annotated[
        str | None, typer.Option(help="The profile it admits to; else ldevid.")
    ] = None,
) -> None:
    """Make a token and print its secret, once."""
    life = lifetime(ttl)
    made = act(
        lambda desk: actions.create_token(
            desk, device=device, uses=uses, ttl=life, profile=profile
        )
    )

    def for_people() -> None:
        say(str(made["token"]))

    show(made, for_people)


@app.command("list")
def list_all() -> None:
    """Every token, without secrets."""
    document = act(actions.list_tokens)
    tokens = document["tokens"]
    assert isinstance(tokens, list)  # noqa: S101 - narrows the type

    def for_people() -> None:
        table(
            None,
            ("id", "device", "profile", "used", "expires", "revoked"),
            [
                (
                    one["id"],
                    one["device"] or "any new",
                    one["profile"] or "ldevid",
                    f"{one['used']}/{one['uses']}",
                    one["expires"],
                    "yes" if one["revoked"] else "",
                )
                for one in tokens
            ],
        )

    show(document, for_people)


@app.command("revoke")
def revoke(token_id: str) -> None:
    """End a token; devices that it admitted are not touched."""
    document = act(lambda desk: actions.revoke_token(desk, token_id))
    show(document, lambda: say(f"Token {token_id} is revoked."))
