"""What the agent holds and last did, read from its files without disturbing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from device_agent import plan
from device_agent.schedule import renewal_time
from provisioning.model.credentials import CredentialKind

if TYPE_CHECKING:
    from datetime import datetime

    from device_agent.home import Home


def document(home: Home) -> dict[str, object]:
    """As `status --json` prints it (DESIGN). Raises Unusable.

    `state` is the plan's word for where it stands; all is None before enrolment.
    """
    known = home.belonging() if home.check() else None
    found = home.slots.find() if known is not None else plan.Found()
    held = next((one for one in found.held if one.slot == found.active), None)
    last = home.last() if known is not None else None
    mode = renew_at = None
    if held is not None and known is not None:
        mode = "cert" if held.kind is CredentialKind.CERTIFICATE else "psk"
        renew_at = renewal_time(
            held.not_before, held.not_after, known.rule, held.jitter
        )
    return {
        "device": known.device.text if known else None,
        "state": _state(found),
        "mode": mode,
        "serial": held.serial if held else None,
        "identity": held.identity if held else None,
        "not_after": _moment(held.not_after) if held else None,
        "renew_at": _moment(renew_at),
        "gateway": known.url if known else None,
        "slot": held.slot if held else None,
        "last": last.as_json() if last else None,
    }


def _state(found: plan.Found) -> str:
    newest = max((held.number for held in found.held), default=0)
    asked = max((number for _, number in found.asked), default=0)
    active = next((one for one in found.held if one.slot == found.active), None)
    if active is None:
        if newest:
            return "proving"
        return "enrolling" if asked else "fresh"
    if newest > active.number:
        return "proving"
    return "renewing" if asked > active.number else "enrolled"


def _moment(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
