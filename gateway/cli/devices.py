"""`birthmark devices`: the fleet, one device or a page at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.output import act, say, show, table, warn_behind
from gateway.cli.tokens import lifetime
from gateway.operators import actions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.operators.desk import Desk

app = typer.Typer(help="The fleet.", no_args_is_help=True)

Device = Annotated[str, typer.Argument(metavar="ID", help="The device ID.")]


@app.command("list")
def list_all(
    state: Annotated[str | None, typer.Option(help="Only of this state.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only IDs that begin so.")] = None,
    limit: Annotated[int, typer.Option(help="Devices on a page.")] = 100,
    cursor: Annotated[
        str | None, typer.Option(help="`next` of the page before.")
    ] = None,
) -> None:
    """A page of devices in the order of their IDs."""
    document = act(
        lambda desk: actions.list_devices(
            desk, cursor=cursor, limit=limit, state=state, prefix=prefix
        )
    )
    devices = document["devices"]
    assert isinstance(devices, list)  # noqa: S101 - narrows the type

    def for_people() -> None:
        table(
            None,
            ("device", "state", "credentials", "good until", "last seen", "rotate"),
            [
                (
                    one["id"],
                    one["state"],
                    one["credentials"],
                    one["not_after"],
                    one["last_seen"],
                    "asked" if one["rotate"] else "",
                )
                for one in devices
            ],
        )
        if document["next"]:
            say(f"more: --cursor {document['next']}")

    show(document, for_people)


@app.command("show")
def show_one(device: Device) -> None:
    """One device with its credentials."""
    document = act(lambda desk: actions.show_device(desk, device))
    credentials = document["credentials"]
    seen = document["last_seen"]
    assert isinstance(credentials, list)  # noqa: S101 - narrows the type

    def for_people() -> None:
        say(f"{document['id']}: {document['state']}")
        if isinstance(seen, dict):
            how = "resumed " if seen["resumed"] else ""
            say(f"last seen {seen['at']} by {how}{seen['auth']} from {seen['address']}")
        if document["rotate_by"]:
            say(f"asked to rotate by {document['rotate_by']}")
        table(
            None,
            ("kind", "profile", "serial or generation", "state", "until"),
            [
                (
                    one["kind"],
                    one["profile"],
                    one["serial"] or one["generation"],
                    one["state"],
                    one["not_after"] or "no end",
                )
                for one in credentials
            ],
        )

    show(document, for_people)


@app.command("revoke")
def revoke(
    device: Device,
    serial: Annotated[
        str | None, typer.Option(help="One certificate, not the device.")
    ] = None,
    reason: Annotated[str, typer.Option(help="As in a CRL.")] = "unspecified",
) -> None:
    """Revoke a device, or one certificate of it, for ever."""
    document = act(
        lambda desk: actions.revoke_device(desk, device, serial=serial, reason=reason)
    )
    revoked = document["revoked"]
    assert isinstance(revoked, list)  # noqa: S101 - narrows the type
    names = ", ".join(str(one) for one in revoked) or "no credential was left"
    show(document, lambda: say(f"{device} is revoked: {names}"))
    warn_behind(document)


@app.command("suspend")
def suspend(device: Device) -> None:
    """Keep a device out until it is resumed."""
    _simple(lambda desk: actions.suspend_device(desk, device))


@app.command("resume")
def resume(device: Device) -> None:
    """Let a suspended device in again."""
    _simple(lambda desk: actions.resume_device(desk, device))


@app.command("readmit")
def readmit(device: Device) -> None:
    """Let a revoked device enrol anew."""
    _simple(lambda desk: actions.readmit_device(desk, device))


@app.command("rotate")
def rotate(
    device: Device,
    within: Annotated[str, typer.Option(help="By when it should have.")] = "24h",
) -> None:
    """Ask a device to rotate its credential."""
    time = lifetime(within)
    _simple(lambda desk: actions.rotate_device(desk, device, within=time))


def _simple(action: Callable[[Desk], Awaitable[dict[str, object]]]) -> None:
    document = act(action)
    asked = f", asked to rotate by {document['by']}" if "by" in document else ""
    show(document, lambda: say(f"{document['device']} is {document['state']}{asked}"))
    warn_behind(document)
