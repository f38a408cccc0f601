"""What is logged, counted and audited: names and fields, one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class EventKind:
    """One kind of event.

    level: for the log. audited: also a row in the registry's audit events.
    fields: every name that may appear beside it; none of them carries a secret.
    """

    name: str
    level: str
    audited: bool
    fields: frozenset[str]


TABLE: dict[str, EventKind] = {}


def _row(name: str, level: str, fields: str, *, audited: bool = False) -> str:
    TABLE[name] = EventKind(name, level, audited, frozenset(fields.split()))
    return name


READY = _row("ready", "info", "https mqtts coaps http operator pid")
STOPPING = _row("stopping", "info", "signal")
STOPPED = _row("stopped", "info", "")
LIBRARY_SAID = _row("library_said", "warning", "logger line")
INCIDENT = _row("incident", "error", "incident where error stack")

TOKEN_AWAY = _row("token_away", "warning", "what why retry_after_s")
TOKEN_BACK = _row("token_back", "info", "what")
BROKER_STARTED = _row("broker_started", "info", "pid")
BROKER_ENDED = _row("broker_ended", "warning", "code retry_after_s")
BROKER_SAID = _row("broker_said", "info", "line")
BROKER_LINK_AWAY = _row("broker_link_away", "warning", "why retry_after_s")
BROKER_LINK_BACK = _row("broker_link_back", "info", "")
UPKEEP_FAILED = _row("upkeep_failed", "warning", "why")
REGISTRY_AWAY = _row("registry_away", "error", "why")
REGISTRY_BACK = _row("registry_back", "info", "")

HANDSHAKE_FAILED = _row("handshake_failed", "info", "address listener reason")
CONNECTED = _row(
    "connected",
    "debug",
    "address listener device auth resumed tls cipher bytes_up bytes_down",
)
CUT = _row("cut", "info", "device listener connections reason")
# Not audited: whoever is refused a million times would fill the disk.
REFUSED = _row("refused", "info", "code device address operation")
RAW_DER = _row("raw_der", "warning", "device operation")

ISSUED = _row("issued", "info", "device profile serial auth not_after", audited=True)
REPEATED = _row("repeated", "info", "device profile serial auth")
INTENT_VOIDED = _row("intent_voided", "warning", "device serial why", audited=True)
PSK_ISSUED = _row("psk_issued", "info", "device generation auth", audited=True)
SUPERSEDED = _row("superseded", "info", "device serial generation by", audited=True)
ROTATE_ASKED = _row("rotate_asked", "info", "device by", audited=True)
REVOKED = _row("revoked", "info", "device serials identities reason", audited=True)
SUSPENDED = _row("suspended", "info", "device", audited=True)
RESUMED = _row("resumed", "info", "device", audited=True)
READMITTED = _row("readmitted", "info", "device", audited=True)
ENROLMENT_TOKEN_CREATED = _row(
    "enrolment_token_created", "info", "token_id device uses expires", audited=True
)
ENROLMENT_TOKEN_REVOKED = _row(
    "enrolment_token_revoked", "info", "token_id", audited=True
)
INITIALISED = _row("initialised", "info", "fingerprint", audited=True)
CRL_PUBLISHED = _row("crl_published", "info", "issuer number entries")
OCSP_SIGNED = _row("ocsp_signed", "debug", "issuer count")
ROTATION_ANSWERED = _row("rotation_answered", "info", "device action serial reason")


def check(name: str, fields: Mapping[str, object]) -> EventKind:
    """The row of an event; raises KeyError for a name or field that has none."""
    kind = TABLE[name]
    unknown = set(fields) - kind.fields
    if unknown:
        message = f"event {name} has no field {sorted(unknown)}"
        raise KeyError(message)
    return kind
